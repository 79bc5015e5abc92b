"""The loop: it learns, resumes to the same numbers after a cut, refuses other settings, and stops at nonsense."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pdl_utils import training
from pdl_utils.training import NonFiniteLoss, UnusableState, fit, run_file, sgd, warmup_cosine


def problem(seed=0):
    """A small classification task: model, batches of an epoch, loss, and all examples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)

    def batches(epoch):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        return [(x[rows], y[rows]) for rows in order.split(20)]

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    return model, batches, loss, (x, y)


class Cut(Exception):
    """In place of a kill: the training ends before an epoch."""


def train(epochs=4, file=None, *, cut=None, lr=0.03, optimizer=torch.optim.Adam, scores=None, **options):
    """Train for `epochs`, but end without warning before epoch `cut`; `scores` are what `evaluate` gives."""
    model, whole, loss, (x, y) = problem()
    steps = optimizer(model.parameters(), lr=lr)

    def batches(epoch):
        if epoch == cut:
            raise Cut
        return whole(epoch)

    def evaluate(net):
        score = (net(x).argmax(1) == y).float().mean() if scores is None else next(scores)
        weights.append(net[0].weight.detach().clone())
        return {"accuracy": score}

    weights = []
    options = {
        "scheduler": warmup_cosine(steps, steps=30, warmup=3),
        "evaluate": evaluate,
        "label": None,
    } | options
    model.history = fit(model, batches, loss, steps, epochs=epochs, file=file, **options)
    model.seen = weights  # of the first layer after each epoch
    return model


def test_it_learns_and_says_how():
    model = train(10)
    assert model.history["epoch"] == list(range(1, 11))
    assert model.history["loss"][-1] < 0.5 * model.history["loss"][0]
    assert model.history["accuracy"][-1] > 0.9
    assert not model.training


def test_it_trains_in_train_mode_and_evaluates_in_eval_mode_without_gradients():
    model, batches, loss, _ = problem()
    seen = []

    def watching(net, batch):
        seen.append(("train", net[2].training, torch.is_grad_enabled()))
        return loss(net, batch)

    def evaluate(net):
        seen.append(("evaluate", net[2].training, torch.is_grad_enabled()))
        return {}

    fit(model, batches, watching, torch.optim.SGD(model.parameters()), epochs=2, evaluate=evaluate, label=None)
    assert seen == 2 * [*3 * [("train", True, True)], ("evaluate", False, False)]


def test_a_bar_is_on_stdout_ends_at_the_last_epoch_and_is_closed_by_an_interruption(capsys, recwarn):
    train(4, label="demo")
    assert "demo: 100%" in capsys.readouterr().out
    with pytest.raises(Cut):
        train(4, label="cut", cut=2)
    train(4, label="next")
    shown = capsys.readouterr()
    assert shown.out.rstrip().splitlines()[-1].startswith(("\rnext: 100%", "next: 100%"))
    assert shown.out.count("\n") == 2  # one line a bar
    assert shown.err == ""
    assert not recwarn.list  # tqdm warns where three times 1/3 is more than 1


def test_interrupted_and_resumed_equals_unbroken_and_a_finished_training_is_read_back(tmp_path):
    unbroken, file = train(10), tmp_path / "state.pt"
    with pytest.raises(Cut):
        train(10, file, cut=4)
    for cut in (None, 0):  # goes on; then reads back, where an epoch would raise
        torch.manual_seed(99)  # a new process has another random state
        resumed = train(10, file, cut=cut)
        for name in ("loss", "accuracy"):
            assert resumed.history[name] == unbroken.history[name]
        for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert not resumed.training
    parts = {"model", "optimizer", "scheduler", "random", "history", "best", "settings"}
    assert set(torch.load(file, weights_only=True)) == parts


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([0.1, 0.9, 0.5, 0.3], 1), ([math.nan, 0.1, math.inf, 0.5], 3), ([0.2, math.nan], 0), ([math.nan] * 2, -1)],
)
def test_keep_best_restores_the_epoch_of_the_largest_finite_score_also_when_read_back(scores, kept, tmp_path):
    options = {"file": tmp_path / "state.pt", "keep_best": "accuracy"}
    seen = train(len(scores), scores=iter(scores), **options).seen
    again = train(len(scores), cut=0, **options)
    assert torch.equal(again[0].weight, seen[kept])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"lr": 0.05}, "lr of parameters 0 is 0.05, was 0.03"),
        ({"epochs": 5}, "epochs is 5, was 4"),
        ({"optimizer": torch.optim.RMSprop}, "optimizer is RMSprop, was Adam"),
        ({"keep_best": "accuracy"}, "keep_best is accuracy, was None"),
        ({"clip_norm": 1.0}, "clip_norm is 1.0, was None"),
    ],
)
@pytest.mark.parametrize("cut", [2, None], ids=["unfinished", "finished"])
def test_a_file_of_other_settings_is_refused_with_the_difference(other, difference, cut, tmp_path):
    file = tmp_path / "state.pt"
    if cut:
        with pytest.raises(Cut):
            train(file=file, cut=cut)
    else:
        train(file=file)
    before = file.read_bytes()
    with pytest.raises(UnusableState, match=f"other settings: .*{difference}"):
        train(file=file, **other)
    assert file.read_bytes() == before


def changed(change):
    """A function that saves a state with `change` made to what it holds."""
    return lambda file: torch.save(change(torch.load(file, weights_only=True)), file)


OTHERS = {  # how a file is made unusable
    "another model": changed(lambda state: {**state, "model": {"weight": torch.zeros(2)}}),
    "another optimizer": changed(lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}}),
    "no scheduler": changed(lambda state: {name: part for name, part in state.items() if name != "scheduler"}),
    "weights alone": changed(lambda state: state["model"]),
    "a tensor": changed(lambda state: torch.zeros(3)),
    "half a file": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "an empty file": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_something_else_is_named_and_kept(other, tmp_path):
    file = tmp_path / "state.pt"
    train(2, file)
    OTHERS[other](file)
    before = file.read_bytes()
    with pytest.raises(UnusableState, match=r"state\.pt is (of another model|damaged or no training)"):
        train(2, file)
    assert file.read_bytes() == before


def test_a_state_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        train(2, tmp_path)


def test_of_several_processes_the_first_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    train(2, tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_a_wrapper_is_known_by_its_type():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(4, 4), nn.Linear(4, 3)  # an attribute of this name makes no wrapper

        def forward(self, x):
            return self.head(self.module(x))

    model, seen = Network(), []
    _, batches, loss, _ = problem()

    def evaluate(net):
        seen.append(net)
        return {}

    fit(model, batches, loss, torch.optim.SGD(model.parameters()), epochs=1, evaluate=evaluate, label=None)
    assert seen == [model]


def test_numbers_of_evaluate_are_made_plain_and_reserved_names_refused(tmp_path):
    train(2, tmp_path / "state.pt", evaluate=lambda net: {"F1": np.float32(0.5), "n": torch.tensor(3)})
    history = train(2, tmp_path / "state.pt", cut=0).history
    assert [type(value) for value in history["F1"] + history["n"]] == [float] * 4
    with pytest.raises(ValueError, match="evaluate gave loss, seconds, which the loop enters itself; rename"):
        train(2, evaluate=lambda net: {"loss": 1.0, "seconds": 2.0})


def test_an_epoch_without_a_batch_is_named():
    model, _, loss, _ = problem()
    with pytest.raises(ValueError, match="demo, epoch 1: no batch; are there fewer examples"):
        fit(model, lambda epoch: [], loss, torch.optim.SGD(model.parameters()), epochs=1, label="demo")


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, batches, _, _ = problem()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteLoss, match=r"demo, epoch 1, batch 1: loss is nan; lower the learning rate"):
        fit(model, batches, lambda net, batch: net(batch[0]).sum() * math.nan, optimizer, epochs=1, label="demo")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("batch", "message"), [(5, "train, epoch 2: weights"), (4, "train, epoch 2, batch 3: loss")]
)
def test_weights_that_are_not_finite_are_not_saved(batch, message, tmp_path):
    """The loss is finite, its gradient is not: in the second epoch's last batch, or before it."""
    model, batches, loss, _ = problem()
    count, file = iter(range(9)), tmp_path / "state.pt"

    def breaks(net, data):
        root = (net[0].weight.sum() * 0).sqrt()  # 0, with a gradient of 0 · ∞
        return loss(net, data) + (root if next(count) == batch else 0)

    with pytest.raises(NonFiniteLoss, match=message):
        fit(model, batches, breaks, torch.optim.SGD(model.parameters(), lr=0.1), epochs=3, file=file, label=None)
    state = torch.load(file, weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_gradients_are_clipped():
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat(gradients).norm().item())
            return super().step(closure)

    train(1, optimizer=Spy, clip_norm=1e-3)
    assert 0 < max(norms) <= 1.001e-3


def test_schedule_and_decay_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer, scheduler = sgd(model, 1.0, 0.1, steps=10, warmup=2)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], [p.ndim for p in decayed["params"]]) == (0.1, [4])
    assert (plain["weight_decay"], len(plain["params"])) == (0, 3)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


# The name of a kept training


CODE = '''
import torch.nn.functional as F
from torch import nn
SLOPE = 0.2

def helper(x):
    return F.leaky_relu(x, SLOPE)

def loss(net, batch):
    """A sentence."""
    return helper(net(batch)).mean()

class Layer(nn.Module):
    def forward(self, x):
        return x + 1
'''


@pytest.mark.parametrize(
    ("old", "new", "trains_anew"),
    [
        ("x + 1", "x + 2", True),  # in a layer
        ("leaky_relu(x", "leaky_relu(2 * x", True),  # in what the loss uses
        ("SLOPE = 0.2", "SLOPE = 0.3", True),
        ("A sentence.", "A better sentence.", False),
        ("def helper", "# A comment.\ndef helper", False),
    ],
)
def test_a_changed_layer_or_loss_is_another_file_and_a_better_sentence_is_not(
    old, new, trains_anew, tmp_path, monkeypatch
):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    names = []
    for number, code in enumerate([CODE, CODE.replace(old, new)]):
        path, module = tmp_path / f"version_{number}.py", ModuleType("notebook_of_a_reader")
        path.write_text(code)
        exec(compile(code, str(path), "exec"), vars(module))
        monkeypatch.setitem(sys.modules, "notebook_of_a_reader", module)
        names.append(run_file("a net", nn.Sequential(module.Layer(), nn.ReLU()), module.loss, seed=0))
    assert (names[0] != names[1]) is trains_anew


def test_another_setting_or_loop_is_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    file = run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
    assert file.parent == tmp_path / "runs"
    assert file.name.startswith("gat-skips-seed-0-")
    assert file == run_file("GAT + skips, seed 0", widths=[256, 256], seed=0)
    assert file != run_file("GAT + skips, seed 0", widths=[256, 257], seed=0)
    monkeypatch.setattr(training, "OWN", ("epoch",))  # a constant that the loop uses
    assert file != run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
