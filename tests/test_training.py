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
from torch.nn.utils import parameters_to_vector as vector

from pdl_utils import training
from pdl_utils.training import NonFiniteLoss, UnusableState, fit, run_file, sgd, warmup_cosine

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def loss(net, rows):
    return F.cross_entropy(net(X[rows]), Y[rows])


class Cut(Exception):
    """In place of a kill: the training ends before an epoch."""


def train(
    epochs=4, file=None, *, cut=None, lr=0.03, optimizer=torch.optim.Adam, loss_fn=loss, scores=None, size=20,
    horizon=30, **options,
):  # fmt: skip
    """Train for `epochs`, but end without warning before epoch `cut`; `scores` are what `evaluate` gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    model.module, model.seen = nn.Identity(), []  # a name that makes it no wrapper; first weights after each epoch
    steps = optimizer(model.parameters(), lr=lr)

    def batches(epoch):
        if epoch == cut:
            raise Cut
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        return [rows for rows in order.split(size) if len(rows) == size]

    def evaluate(net):
        model.seen.append(net[0].weight.clone())
        accuracy = (net(X).argmax(1) == Y).float().mean()
        return {"accuracy": accuracy if scores is None else scores[len(model.seen) - 1]}

    options = {"scheduler": warmup_cosine(steps, horizon, warmup=3), "evaluate": evaluate, "label": None} | options
    model.history = fit(model, batches, loss_fn, steps, epochs=epochs, file=file, **options)
    return model


def test_it_learns_in_train_mode_and_evaluates_in_eval_mode_without_gradients():
    seen = []

    def watching(net, rows):
        seen.append(("train", net.training, torch.is_grad_enabled()))
        return loss(net, rows)

    def evaluate(net):
        seen.append(("evaluate", net.training, torch.is_grad_enabled()))
        return {"accuracy": (net(X).argmax(1) == Y).float().mean()}

    model = train(10, loss_fn=watching, evaluate=evaluate)
    assert seen == 10 * [*3 * [("train", True, True)], ("evaluate", False, False)]
    assert model.history["epoch"] == list(range(1, 11))
    assert model.history["loss"][-1] < 0.5 * model.history["loss"][0]
    assert model.history["accuracy"][-1] > 0.9


def test_a_bar_is_on_stdout_ends_at_the_last_epoch_and_is_closed_by_an_interruption(capsys, monkeypatch):
    monkeypatch.delenv("PDL_PROGRESS", raising=False)  # `make test` sets it
    with pytest.raises(Cut):
        train(4, label="cut", cut=2)
    train(4, label="next")
    shown = capsys.readouterr()
    assert shown.out.rstrip().splitlines()[-1].startswith(("\rnext: 100%", "next: 100%"))
    assert shown.out.count("\n") == 2  # one line a bar
    assert shown.err == ""


def test_interrupted_and_resumed_equals_unbroken_and_a_finished_training_is_read_back(tmp_path):
    unbroken, file = train(10), tmp_path / "state.pt"
    with pytest.raises(Cut):
        train(10, file, cut=4)
    for cut in (None, 0):  # goes on; then reads back, where an epoch would raise
        torch.manual_seed(99)  # a new process has another random state
        resumed = train(10, file, cut=cut)
        for name in ("loss", "accuracy"):
            assert resumed.history[name] == unbroken.history[name]
        assert torch.equal(vector(resumed.parameters()), vector(unbroken.parameters()))
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
        "steps of the schedule is 50, was 30": {"horizon": 50},
    }
    for difference, other in others.items():
        with pytest.raises(UnusableState, match=f"other settings: .*{difference}"):
            train(file=file, **other)
    assert file.read_bytes() == before
    with pytest.raises(TypeError, match=r"only tensors, Python's numbers"):  # it could not be read back
        train(file=tmp_path / "other.pt", lr=np.float64(0.03))
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_damaged_or_of_something_else_is_named_and_kept(tmp_path):
    file = tmp_path / "state.pt"
    train(1, file)
    whole, state = file.read_bytes(), torch.load(file, weights_only=True)
    for other in (None, state["model"], {**state, "model": {}}):
        torch.save(other, file) if other else file.write_bytes(whole[: len(whole) // 2])
        before = file.read_bytes()
        with pytest.raises(UnusableState, match=r"state\.pt is damaged, or of another model; remove it"):
            train(1, file)
        assert file.read_bytes() == before
    with pytest.raises(IsADirectoryError):  # what cannot be opened is not called damaged
        train(1, tmp_path)


def test_of_several_processes_the_first_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    train(1, tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_an_epoch_without_a_batch_and_an_optimizer_of_another_model_are_named():
    with pytest.raises(ValueError, match="demo, epoch 1: no batch; are there fewer examples"):
        train(1, size=61, label="demo")
    strange = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="weights that are not the model's"):
        train(1, optimizer=lambda parameters, lr: torch.optim.SGD([*parameters, strange], lr))


def test_numbers_of_evaluate_are_made_plain_and_reserved_names_refused(tmp_path):
    odd = {np.str_("F1"): np.float32(0.5), "n": torch.tensor(3)}
    train(2, tmp_path / "state.pt", evaluate=lambda net: odd)
    history = train(2, tmp_path / "state.pt", cut=0).history
    assert [type(value) for value in history["F1"] + history["n"]] == [float] * 4
    with pytest.raises(ValueError, match="evaluate gave loss, seconds, which the loop enters itself; rename"):
        train(2, evaluate=lambda net: {"loss": 1.0, "seconds": 2.0})


@pytest.mark.parametrize(
    ("factor", "where", "stepped"),
    [(math.nan, "epoch 2, batch 3: loss is nan; lower the learning rate", False), (0, "epoch 2: weights", True)],
)
def test_what_is_not_finite_stops_and_is_not_saved(factor, where, stepped, tmp_path):
    """A loss that is NaN; or 0 with a gradient of 0 · ∞, in an epoch's last batch."""
    nets, file = [], tmp_path / "state.pt"

    def breaks(net, rows):
        nets.append(net)
        return loss(net, rows) + ((net[0].weight.sum() * factor).sqrt() if len(nets) == 6 else 0)

    with pytest.raises(NonFiniteLoss, match=f"demo, {where}"):
        train(3, file, loss_fn=breaks, label="demo")
    assert vector(nets[0].parameters()).isfinite().all() != stepped
    state = torch.load(file, weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())


def test_gradients_are_clipped():
    still, moved = train(0), train(1, optimizer=torch.optim.SGD, lr=1.0, clip_norm=1e-3)
    way = vector(moved.parameters()) - vector(still.parameters())
    assert 0 < way.norm() <= 3.003e-3  # three steps


def test_schedule_and_decay_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer, scheduler = sgd(model, 1.0, 0.1, steps=10, warmup=2)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], [p.ndim for p in decayed["params"]]) == (0.1, [4])
    assert (plain["weight_decay"], len(plain["params"])) == (0, 3)
    rates = []
    for _ in range(11):
        rates.append(decayed["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose([*rates[:3], rates[6], rates[10]], [0.5, 1, 1, 0.5, 0], atol=1e-12)


# The name of a kept training


CODE = '''
import torch
import torch.nn.functional as F
from torch import nn
SLOPE = 0.2
def helper(x):
    return F.leaky_relu(2 * x, SLOPE)
def loss(net, batch):
    """A sentence."""
    return len(BRANCHES) * helper(net(batch)).mean() * WEIGHTS[0]  # a comment
class Base(nn.Module):
    def forward(self, x):
        return x + 1
class Layer(Base):
    pass
def unused():
    return 5
BRANCHES = [helper]
WEIGHTS = torch.ones(2)
'''


@pytest.mark.parametrize("home", ["a_module_of_a_reader", "__main__"])  # in a module; or in a notebook
def test_changed_code_is_another_file_and_a_better_sentence_is_not(home, monkeypatch):
    module = ModuleType(home)
    module.__file__ = "<code>"
    monkeypatch.setitem(sys.modules, home, module)

    def name_after(old, new):
        code = CODE.replace(old, new)
        monkeypatch.setitem(linecache.cache, "<code>", (1, None, code.splitlines(keepends=True), "<code>"))
        exec(compile(code, "<code>", "exec"), vars(module))
        return run_file("a net", nn.Sequential(module.Layer(), nn.ReLU()), module.loss, seed=0)

    name = name_after("", "")
    for old, new in {"A sentence.": "A better sentence.", "a comment": "a better one"}.items():
        assert name == name_after(old, new), new
    in_layer = {"x + 1": "x + 2"}
    in_loss = {".mean()": ".sum()", "2 * x": "3 * x", "SLOPE = 0.2": "SLOPE = 0.3", "ones(2)": "zeros(2)"}
    for old, new in (in_layer | in_loss).items():
        assert name != name_after(old, new), new
    assert (name == name_after("return 5", "return 6")) is (home == "__main__")  # what the loss does not use


def test_another_name_setting_or_loop_is_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    file = run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
    assert file.parent == tmp_path / "runs"
    assert file.name.startswith("gat-skips-seed-0-")
    assert len(run_file("a long name " * 40).name) < 100  # a file system allows 255 bytes
    assert file == run_file("GAT + skips, seed 0", widths=[256, 256], seed=0)
    assert file != run_file("GAT + skips, seed 0", widths=[256, 257], seed=0)
    assert file != run_file("GAT - skips, seed 0", seed=0, widths=[256, 256])
    assert run_file("a net", nn.Sequential(nn.ReLU())) != run_file("a net", nn.Sequential(nn.Tanh()))
    loop = [line.replace("optimizer.step()", "pass") for line in linecache.getlines(training.__file__)]
    monkeypatch.setitem(linecache.cache, training.__file__, (1, None, loop, training.__file__))
    assert file != run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
    with pytest.raises(TypeError, match=r"functools\.partial.* has no code of its own"):
        run_file("a net", partial(loss, rows=3))
