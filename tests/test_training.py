"""The loop: it learns, resumes to the same numbers after a kill, and stops at nonsense."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdl_utils.training import (
    NonFiniteLoss,
    UnusableState,
    fit,
    run_file,
    sgd,
    warmup_cosine,
)  # fmt: skip


def problem(seed: int = 0):
    """A small classification task: model, batches of an epoch, loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, :3]).argmax(1)

    def batches(epoch):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        return [(x[rows], y[rows]) for rows in order.split(20)]

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    return model, batches, loss, (x, y)


class Cut(Exception):
    """In place of a kill: the training ends before an epoch."""


def train(epochs, checkpoint=None, *, cut=None, **options):
    """Train for `epochs`, but end without warning before epoch `cut`."""
    model, whole, loss, (x, y) = problem()

    def batches(epoch):
        if epoch == cut:
            raise Cut
        return whole(epoch)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    scheduler = warmup_cosine(optimizer, steps=30, warmup=3)
    history = fit(
        model, batches, loss, optimizer, epochs=epochs, scheduler=scheduler, checkpoint=checkpoint,
        evaluate=lambda net: {"accuracy": (net(x).argmax(1) == y).float().mean().item()},
        progress=False, **options,
    )  # fmt: skip
    return model, history


def test_it_learns_and_says_how():
    model, history = train(10)
    assert history["epoch"] == list(range(1, 11))
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["accuracy"][-1] > 0.9
    assert not model.training


def test_the_progress_bar_ends_at_the_last_epoch(capsys, recwarn):
    model, _, loss, (x, y) = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, lambda epoch: [(x, y)] * 10, loss, optimizer, epochs=4, label="demo", progress=True)
    assert "demo: 100%" in capsys.readouterr().err
    assert not recwarn.list  # tqdm warns where ten times 1/10 is more than 1


def test_it_trains_in_train_mode_and_evaluates_in_eval_mode_without_gradients():
    model, batches, loss, _ = problem()
    seen = []

    def watching(net, batch):
        seen.append(("train", net[2].training, torch.is_grad_enabled()))
        return loss(net, batch)

    def evaluate(net):
        seen.append(("evaluate", net[2].training, torch.is_grad_enabled()))
        return {}

    fit(
        model, batches, watching, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, evaluate=evaluate,
        progress=False,
    )  # fmt: skip
    assert seen == 2 * [*3 * [("train", True, True)], ("evaluate", False, False)]


def test_interrupted_and_resumed_equals_unbroken(tmp_path):
    unbroken, long = train(10)
    with pytest.raises(Cut):
        train(10, tmp_path / "state.pt", cut=4)
    torch.manual_seed(99)  # a new process has another random state
    resumed, pieced = train(10, tmp_path / "state.pt")
    assert pieced["loss"] == long["loss"]
    assert pieced["accuracy"] == long["accuracy"]
    for ours, theirs in zip(resumed.state_dict().values(), unbroken.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_keep_best_restores_the_best_epoch_even_after_resuming(tmp_path):
    scores = iter([0.1, 0.9, 0.5, 0.3])
    weights = []

    def evaluate(net):
        weights.append(net[0].weight.detach().clone())
        return {"score": next(scores)}

    def run(cut):
        model, whole, loss, _ = problem()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def batches(epoch):
            if epoch == cut:
                raise Cut
            return whole(epoch)

        fit(
            model, batches, loss, optimizer, epochs=4, evaluate=evaluate, keep_best="score",
            checkpoint=tmp_path / "state.pt", progress=False,
        )  # fmt: skip
        return model

    with pytest.raises(Cut):
        run(cut=3)
    assert torch.equal(run(cut=None)[0].weight, weights[1])
    assert torch.equal(run(cut=0)[0].weight, weights[1]), "a finished training is read back"


def test_a_finished_training_is_read_back_and_is_small(tmp_path):
    file = tmp_path / "state.pt"
    trained, history = train(3, file)
    assert set(torch.load(file, weights_only=True)) == {"model", "history"}
    again, same = train(3, file, cut=0)
    assert same.rows == history.rows
    assert torch.equal(again[0].weight, trained[0].weight)
    assert not again.training
    with pytest.raises(UnusableState, match="a finished training of 3 epochs, not of 5"):
        train(5, file)


def test_another_setting_is_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    file = run_file("GAT + skips, seed 0", seed=0, widths=[256, 256])
    assert file.parent == tmp_path / "runs"
    assert file.name.startswith("gat-skips-seed-0-")
    assert file == run_file("GAT + skips, seed 0", widths=[256, 256], seed=0)
    assert file != run_file("GAT + skips, seed 0", widths=[256, 257], seed=0)


def test_one_of_several_processes_saves(tmp_path):
    train(2, tmp_path / "state.pt", save=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("NaN or infinity in training")
@pytest.mark.parametrize(
    ("scores", "kept"),
    [([math.nan, 0.1, 0.9, math.inf, 0.5], 2), ([0.2, math.nan, 0.1], 0), ([math.nan, math.nan], -1)],
)
def test_a_score_that_is_not_finite_is_no_best(scores, kept):
    model, batches, loss, _ = problem()
    weights, left = [], iter(scores)

    def evaluate(net):
        weights.append(net[0].weight.detach().clone())
        return {"score": next(left)}

    fit(
        model, batches, loss, torch.optim.SGD(model.parameters(), lr=0.1), epochs=len(scores),
        evaluate=evaluate, keep_best="score", progress=False,
    )  # fmt: skip
    assert torch.equal(model[0].weight, weights[kept])


@pytest.mark.fault("NaN or infinity in training")
def test_a_loss_that_is_not_finite_stops_before_the_step():
    model, batches, _, _ = problem()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFiniteLoss, match=r"demo, epoch 1, batch 1: loss is nan; lower the learning rate"):
        fit(
            model, batches, lambda net, batch: net(batch[0]).sum() * float("nan"), optimizer, epochs=1,
            label="demo", progress=False,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.fault("NaN or infinity in training")
@pytest.mark.parametrize(
    ("batch", "message"), [(5, "demo, epoch 2: weights"), (4, "demo, epoch 2, batch 3: loss")]
)
def test_weights_that_are_not_finite_are_not_saved(batch, message, tmp_path):
    """The loss is finite, its gradient is not: in the second epoch's last batch, or before it."""
    model, batches, loss, _ = problem()
    count = iter(range(9))

    def breaks(net, data):
        root = (net[0].weight.sum() * 0).sqrt()  # 0, with a gradient of 0 · ∞
        return loss(net, data) + (root if next(count) == batch else 0)

    with pytest.raises(NonFiniteLoss, match=message):
        fit(
            model, batches, breaks, torch.optim.SGD(model.parameters(), lr=0.1), epochs=3,
            evaluate=lambda net: pytest.fail("evaluated") if net[0].weight.isnan().any() else {},
            checkpoint=tmp_path / "state.pt", label="demo", progress=False,
        )  # fmt: skip
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["model"].values())


OTHERS = {
    "another model": lambda state: {**state, "model": {"weight": torch.zeros(2)}},
    "another optimizer": lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}},
    "no scheduler": lambda state: {name: part for name, part in state.items() if name != "scheduler"},
    "weights alone": lambda state: state["model"],
    "a tensor": lambda state: torch.zeros(3),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_something_else_is_named_and_kept(other, tmp_path):
    file = tmp_path / "state.pt"
    with pytest.raises(Cut):
        train(2, file, cut=1)
    torch.save(OTHERS[other](torch.load(file, weights_only=True)), file)
    before = file.read_bytes()
    with pytest.raises(UnusableState, match=r"state\.pt is damaged or not a state of this training; delete it"):
        train(2, file)
    assert file.read_bytes() == before


def test_a_state_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        train(2, tmp_path)


def test_gradients_are_clipped():
    model, batches, loss, _ = problem()
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
            return super().step(closure)

    fit(model, batches, loss, Spy(model.parameters(), lr=0.1), epochs=1, clip_norm=1e-3, progress=False)
    assert max(norms) <= 1.001e-3


def test_schedule_and_decay_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer, scheduler = sgd(model, 1.0, 0.1, steps=10, warmup=2)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in decayed["params"]] == [4]
    assert plain["weight_decay"] == 0
    assert len(plain["params"]) == 3
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
