"""The loop: it learns, resumes to the same numbers after a cut, refuses other settings, and stops at nonsense."""

import linecache
import math
import sys
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from pdl_utils import training
from pdl_utils.training import NonFiniteLoss, UnusableState, fit, run_file, sgd, warmup_cosine

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def loss(net, rows):
    return F.cross_entropy(net(X[rows]), Y[rows])


class Cut(Exception):
    """In place of a kill: the training ends before an epoch."""


def train(
    epochs=4, file=None, *, cut=None, lr=0.03, optimizer=torch.optim.Adam, loss_fn=loss, scores=None, **options
):
    """Train for `epochs`, but end without warning before epoch `cut`; `scores` are what `evaluate` gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    steps = optimizer(model.parameters(), lr=lr)

    def batches(epoch):
        if epoch == cut:
            raise Cut
        return torch.randperm(60, generator=torch.Generator().manual_seed(epoch)).split(20)

    def evaluate(net):
        model.seen.append(net[0].weight.clone())
        accuracy = (net(X).argmax(1) == Y).float().mean()
        return {"accuracy": accuracy if scores is None else scores[len(model.seen) - 1]}

    model.seen = []  # weights of the first layer after each epoch
    options = {"scheduler": warmup_cosine(steps, 30, warmup=3), "evaluate": evaluate, "label": None} | options
    model.history = fit(model, batches, loss_fn, steps, epochs=epochs, file=file, **options)
    return model


def test_it_learns_and_says_how():
    model = train(10)
    assert model.history["epoch"] == list(range(1, 11))
    assert model.history["loss"][-1] < 0.5 * model.history["loss"][0]
    assert model.history["accuracy"][-1] > 0.9
    assert not model.training


def test_it_trains_in_train_mode_and_evaluates_in_eval_mode_without_gradients():
    seen = []

    def watching(net, rows):
        seen.append(("train", net.training, torch.is_grad_enabled()))
        return loss(net, rows)

    def evaluate(net):
        seen.append(("evaluate", net.training, torch.is_grad_enabled()))
        return {}

    train(2, loss_fn=watching, evaluate=evaluate)
    assert seen == 2 * [*3 * [("train", True, True)], ("evaluate", False, False)]


def test_a_bar_is_on_stdout_ends_at_the_last_epoch_and_is_closed_by_an_interruption(capsys, recwarn, monkeypatch):
    monkeypatch.delenv("PDL_PROGRESS", raising=False)  # `make test` sets it
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
        assert torch.equal(parameters_to_vector(resumed.parameters()), parameters_to_vector(unbroken.parameters()))
        assert not resumed.training


@pytest.mark.parametrize(("scores", "kept"), [([math.nan, 0.9, math.inf, 0.5], 1), ([math.nan] * 2, -1)])
def test_keep_best_restores_the_epoch_of_the_largest_finite_score_also_when_read_back(scores, kept, tmp_path):
    options = {"file": tmp_path / "state.pt", "keep_best": "accuracy", "scores": scores}
    first, again = train(len(scores), **options), train(len(scores), cut=0, **options)
    assert torch.equal(first[0].weight, first.seen[kept])
    assert torch.equal(again[0].weight, first.seen[kept])


def test_a_file_of_other_settings_is_refused_with_the_difference_and_kept(tmp_path):
    file = tmp_path / "state.pt"
    with pytest.raises(Cut):
        train(file=file, cut=2)
    before = file.read_bytes()
    others = {
        "lr of parameters 0 is 0.05, was 0.03": {"lr": 0.05},
        "epochs is 5, was 4": {"epochs": 5},
        "optimizer is RMSprop, was Adam": {"optimizer": torch.optim.RMSprop},
        "keep_best is accuracy, was None": {"keep_best": "accuracy"},
        "clip_norm is 1.0, was None": {"clip_norm": 1.0},
    }
    for difference, other in others.items():
        with pytest.raises(UnusableState, match=f"other settings: .*{difference}"):
            train(file=file, **other)
    assert file.read_bytes() == before


def test_a_file_that_is_damaged_or_of_something_else_is_named_and_kept(tmp_path):
    file = tmp_path / "state.pt"
    train(1, file)
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    another_model = {**state, "model": {"weight": torch.zeros(2)}}
    for content in (whole[: len(whole) // 2], b"", state["model"], another_model):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        before = file.read_bytes()
        with pytest.raises(UnusableState, match=r"state\.pt is damaged, or of another model; remove it"):
            train(1, file)
        assert file.read_bytes() == before


def test_a_state_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        train(1, tmp_path)


def test_of_several_processes_the_first_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    train(1, tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def tiny(batches, **options):
    """One epoch of a model with an attribute `module`, which makes it no wrapper."""
    model = nn.Linear(1, 1)
    model.module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    return model, fit(model, lambda epoch: batches, lambda net, x: net(x).sum(), optimizer, epochs=1, **options)


def test_a_wrapper_is_known_by_its_type():
    seen = []
    model, _ = tiny([torch.ones(1)], evaluate=lambda net: seen.append(net) or {}, label=None)
    assert seen == [model]


def test_an_epoch_without_a_batch_is_named():
    with pytest.raises(ValueError, match="demo, epoch 1: no batch; are there fewer examples"):
        tiny([], label="demo")


def test_numbers_of_evaluate_are_made_plain_and_reserved_names_refused(tmp_path):
    train(2, tmp_path / "state.pt", evaluate=lambda net: {"F1": np.float32(0.5), "n": torch.tensor(3)})
    history = train(2, tmp_path / "state.pt", cut=0).history
    assert [type(value) for value in history["F1"] + history["n"]] == [float] * 4
    with pytest.raises(ValueError, match="evaluate gave loss, seconds, which the loop enters itself; rename"):
        train(2, evaluate=lambda net: {"loss": 1.0, "seconds": 2.0})


def test_a_loss_that_is_not_finite_stops_before_the_step():
    nets = []

    def nonsense(net, rows):
        nets.append(net)
        return loss(net, rows) * math.nan

    with pytest.raises(NonFiniteLoss, match=r"demo, epoch 1, batch 1: loss is nan; lower the learning rate"):
        train(1, loss_fn=nonsense, label="demo")
    assert torch.equal(parameters_to_vector(nets[0].parameters()), parameters_to_vector(train(0).parameters()))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is finite, its gradient is not: in the second epoch's last batch."""
    count, file = iter(range(9)), tmp_path / "state.pt"

    def breaks(net, rows):
        root = (net[0].weight.sum() * 0).sqrt()  # 0, with a gradient of 0 · ∞
        return loss(net, rows) + (root if next(count) == 5 else 0)

    with pytest.raises(NonFiniteLoss, match="train, epoch 2: weights"):
        train(3, file, loss_fn=breaks)
    state = torch.load(file, weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_gradients_are_clipped():
    still, moved = train(0), train(1, optimizer=torch.optim.SGD, lr=1.0, clip_norm=1e-3)
    way = parameters_to_vector(moved.parameters()) - parameters_to_vector(still.parameters())
    assert 0 < way.norm() <= 3.003e-3  # three steps


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

def scaled(x):
    return 2 * x

def helper(x):
    return F.leaky_relu(scaled(x), SLOPE)

def loss(net, batch):
    """A sentence."""
    return len(BRANCHES) * helper(net(batch)).mean()  # a comment

class Base(nn.Module):
    def forward(self, x):
        return x + 1

class Layer(Base):
    pass

def unused():
    return 5

BRANCHES = [helper]
'''


def name_of_training(home, code, file, patch):
    """The name that `code` gives, as a module or as a cell of a notebook."""
    patch.setitem(linecache.cache, file, (len(code), None, code.splitlines(keepends=True), file))
    module = ModuleType(home)
    module.__file__ = file
    patch.setitem(sys.modules, home, module)
    exec(compile(code, file, "exec"), vars(module))
    return run_file("a net", nn.Sequential(module.Layer(), nn.ReLU()), module.loss, seed=0)


@pytest.mark.parametrize("home", ["layers_of_a_reader", "__main__"])
@pytest.mark.parametrize(
    ("old", "new", "trains_anew"),
    [
        ("x + 1", "x + 2", True),  # in a layer
        (".mean()", ".sum()", True),  # in the loss
        ("2 * x", "3 * x", True),  # in what the loss uses
        ("SLOPE = 0.2", "SLOPE = 0.3", True),
        ("A sentence.", "A better sentence.", False),
        ("a comment", "a better comment", False),
        ("return 5", "return 6", "module"),  # what is not used, in a notebook
    ],
)
def test_changed_code_is_another_file_and_a_better_sentence_is_not(home, old, new, trains_anew, monkeypatch):
    before = name_of_training(home, CODE, "<code>", monkeypatch)
    after = name_of_training(home, CODE.replace(old, new), "<code>", monkeypatch)
    assert (before != after) is (home != "__main__" if trains_anew == "module" else trains_anew)


def test_another_name_setting_or_loop_is_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    file = run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
    assert file.parent == tmp_path / "runs"
    assert file.name.startswith("gat-skips-seed-0-")
    assert file == run_file("GAT + skips, seed 0", widths=[256, 256], seed=0)
    assert file != run_file("GAT + skips, seed 0", widths=[256, 257], seed=0)
    assert file != run_file("GAT - skips, seed 0", seed=0, widths=[256, 256])
    loop = [line.replace("optimizer.step()", "pass") for line in linecache.getlines(training.__file__)]
    monkeypatch.setitem(linecache.cache, training.__file__, (1, None, loop, training.__file__))
    assert file != run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])


def test_a_setting_that_a_file_cannot_hold_is_refused_before_the_training(tmp_path):
    with pytest.raises(TypeError, match=r"write float\(…\) or int\(…\) for lr of parameters 0"):
        train(file=tmp_path / "state.pt", cut=0, lr=np.float64(0.03))
    with pytest.raises(TypeError, match=r"functools\.partial.* has no code of its own"):
        run_file("a net", partial(loss, rows=3))
