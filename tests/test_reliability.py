"""Faults, made for real: kills, full disks, pickles that run code, read-only folders, several processes.

After every fault: nothing lost, nothing half-written, and the next run goes on. Faults that belong to one module
are tried in its own tests; docs/reliability.md lists them all, by the marker `fault`, and a test compares.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from pdl_utils import resnet
from pdl_utils.datasets import cifar10, ppi
from pdl_utils.datasets.synthetic_graphs import Recipe
from pdl_utils.grad_cam.hooks import evaluating, record_activations
from pdl_utils.notebook import Run
from pdl_utils.settings import REPOSITORY, Profile, data_root, save_atomically
from pdl_utils.training import History, NonFiniteLoss, UnusableState, fit, warmup_cosine
from pdl_utils.weights import read_digests, save_weights, sha256

POSIX = os.name == "posix"
posix = pytest.mark.skipif(not POSIX, reason="needs fork, SIGKILL and limits of POSIX systems")
FORK = multiprocessing.get_context("fork") if POSIX else None  # a child has the parent's patches
FULL = Profile("full", "a test")
KILLS = 20


def train(
    epochs: int, checkpoint: Path | None = None, nonsense: float = 1.0, **options: object
) -> tuple[nn.Module, History]:
    """A small training, three batches an epoch; the loss of its eighth batch is multiplied by `nonsense`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(60, 4)

    def batches(epoch: int) -> list[tuple[torch.Tensor, float]]:
        order = torch.randperm(60, generator=torch.Generator().manual_seed(epoch))
        return [(x[rows], nonsense if (epoch, i) == (2, 1) else 1.0) for i, rows in enumerate(order.split(20))]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, float]) -> torch.Tensor:
        return batch[1] * F.cross_entropy(model(batch[0]), batch[0][:, :3].argmax(1))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    scheduler = warmup_cosine(optimizer, steps=3 * epochs, warmup=3)
    options |= {"scheduler": scheduler, "checkpoint": checkpoint, "progress": False}
    return model, fit(model, batches, loss, optimizer, epochs=epochs, **options)


def start(work: Callable[[], object]) -> multiprocessing.Process:
    """Call `work` in a process that has all that this one has, patches, too."""

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them forever
        work()

    process = FORK.Process(target=run)
    process.start()
    return process


def at_once(work: Callable[[int], object]) -> None:
    """`work(0)`, `work(1)` and `work(2)` in three processes at the same time."""
    together = FORK.Barrier(3)
    processes = [start(lambda i=i: (together.wait(30), work(i))) for i in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


# Killed


def kill_and_restart(folder: Path) -> None:
    """Train in processes that are killed at random moments and restarted until they are done; again, until
    `KILLS` have struck. Each finished training must equal one that nothing has struck.

    A moment is a number of function calls, which a slow disk or a busy processor does not change.
    """
    moments, epochs = random.Random(0), []  # epochs: what each kill left behind

    def finish(run: Path, kill_at: float) -> None:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")
            if calls >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        model, history = train(10, run / "state.pt")
        sys.setprofile(None)
        torch.save([calls, model.state_dict(), history["loss"]], run / "result")

    def run_once(run: Path, kill_at: float = math.inf) -> int:
        process = start(partial(finish, run, kill_at))
        process.join()
        return process.exitcode

    # tqdm's own lock is shared with every fork: one that is killed while it holds it would block all others.
    tqdm.set_lock(threading.RLock())
    train(1)  # imports what every process would have to import again
    assert run_once(folder / "unbroken") == 0
    calls, weights, losses = torch.load(folder / "unbroken" / "result", weights_only=True)
    while len(epochs) < KILLS:
        run, exitcode = Path(mkdtemp(dir=folder)), None
        while exitcode != 0:
            exitcode = run_once(run, moments.uniform(1, calls / 2) if len(epochs) < KILLS else math.inf)
            assert exitcode in (0, -signal.SIGKILL), exitcode
            if exitcode:
                state = run / "state.pt"
                epochs.append(len(torch.load(state, weights_only=True)["history"]) if state.exists() else 0)
        _, resumed, theirs = torch.load(run / "result", weights_only=True)
        assert theirs == losses
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())
        left = {path.name for path in run.iterdir()} - {"state.pt", "result"}
        assert all(re.fullmatch(r"\.state\.pt\.\d+\.partial", name) for name in left)  # hidden, and git ignores it
    assert len(set(epochs)) >= 3, epochs  # early and late


@posix
@pytest.mark.fault("training killed")
def test_training_killed_at_20_random_moments_ends_in_the_same_weights(tmp_path):
    """In a process without a GPU, whose threads would not live on in a fork."""
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


@posix
@pytest.mark.fault("killed while saving")
@pytest.mark.parametrize("written", ["", "ne", "new"], ids=["before", "half", "just before it is put in place"])
def test_killed_while_saving_the_old_file_stays(tmp_path, written):
    file = tmp_path / "state.pt"
    file.write_text("old")

    def killed(partial: Path) -> None:
        partial.write_text(written)
        os.kill(os.getpid(), signal.SIGKILL)

    child = start(lambda: save_atomically(killed, file))
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert file.read_text() == "old"
    (tmp_path / f".state.pt.{os.getpid()}.partial").write_text("left by an earlier process of the same number")
    save_atomically(lambda partial: partial.write_text("new"), file)
    assert file.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", f".state.pt.{child.pid}.partial"}


# No space left


def save_figure(folder: Path, version: int) -> None:
    figure, axis = plt.subplots()
    axis.plot([0, version])
    Run("1_grad_cam", FULL).show(figure, "line", "a line")


SAVED = {  # file → how a version of it, 1 or 2, is saved into a folder, which is also that of figures
    "state.pt": lambda folder, version: train(3, folder / "state.pt", stop_after=version),
    "net.safetensors": lambda folder, version: save_weights(
        folder / "net.safetensors", {"w": torch.full((50, 50), float(version))}, {"version": version}
    ),
    "results.json": lambda folder, version: Run("1_grad_cam", FULL).record("hits", version, "share"),
    "line.png": save_figure,
}


@posix
@pytest.mark.fault("disk full")
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", SAVED)
def test_a_full_disk_loses_nothing_and_leaves_nothing_half(name, share, tmp_path, monkeypatch):
    import resource  # POSIX only

    monkeypatch.setenv("PDL_FIGURES", str(tmp_path))
    SAVED[name](tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before[name])), hard))
    try:
        with pytest.raises((OSError, SafetensorError)) as caught:
            SAVED[name](tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if name == "state.pt":  # torch itself names neither the file nor the cause
        assert "state.pt cannot be written; is the disk full?" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    SAVED[name](tmp_path, 2)  # there is space again
    assert (tmp_path / name).read_bytes() != before[name]
    assert {path.name for path in tmp_path.iterdir()} == set(before)


# Nonsense in training


@pytest.mark.fault("NaN or infinity in training")
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_the_last_whole_epoch_to_go_on_from(nonsense, tmp_path):
    file = tmp_path / "state.pt"
    with pytest.raises(NonFiniteLoss, match="epoch 3, batch 2"):
        train(5, file, nonsense)
    state = torch.load(file, weights_only=True)
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    resumed, unbroken = train(5, file)[0], train(5)[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), unbroken.parameters(), strict=True))


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\0" * len(c)])
def test_a_damaged_state_is_not_taken_for_a_fresh_start(damage, tmp_path):
    file = tmp_path / "state.pt"
    train(3, file, stop_after=2)
    file.write_bytes(damage(file.read_bytes()))
    before = file.read_bytes()
    with pytest.raises(UnusableState, match=r"state\.pt is damaged .*; delete it to start over"):
        train(3, file)
    assert file.read_bytes() == before


# Hooks


@pytest.mark.fault("exception inside a hook context")
def test_an_exception_in_the_callers_code_leaves_no_hook_no_mode_and_no_gradient_setting():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).train()
    model[0].eval()

    def err() -> None:
        with record_activations(model, "0"), evaluating(model):
            assert not model.training
            assert torch.is_grad_enabled()
            raise ZeroDivisionError

    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            err()
        assert not torch.is_grad_enabled()
    assert not model[0]._forward_hooks
    assert [module.training for module in model.modules()] == [True, False, True]
    assert all(parameter.requires_grad for parameter in model.parameters())


# Pickles that run code


class Bomb:
    """Unpickled by something that is not careful, it runs code that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return exec, (f"import os; os.mkdir({self.folder!r})",)


@pytest.fixture
def bomb(tmp_path) -> Iterator[Bomb]:
    bomb = Bomb(tmp_path / "it ran")
    pickle.loads(pickle.dumps(bomb))
    Path(bomb.folder).rmdir()  # it was there: the bomb is live
    yield bomb
    assert not Path(bomb.folder).exists()


@pytest.mark.fault("pickle that runs code")
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_to_resume_from_is_not_run(zipped, bomb, tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"model": bomb}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnusableState, match=r"state\.pt is damaged .*UnpicklingError"):
        train(2, file)


@pytest.mark.fault("pickle that runs code")
def test_a_pickle_as_torchvisions_weights_is_not_run(bomb, fresh_data, monkeypatch, tmp_path):
    """Even with the digest that its name promises."""
    torch.save(bomb, tmp_path / "weights.pth")
    name = f"resnet18-{sha256(tmp_path / 'weights.pth')[:8]}.pth"
    data_root().mkdir()
    (tmp_path / "weights.pth").rename(data_root() / name)
    entry = SimpleNamespace(url=f"https://a.test/{name}")
    monkeypatch.setattr(resnet, "get_model_weights", lambda arch: SimpleNamespace(IMAGENET1K_V1=entry))
    with pytest.raises(pickle.UnpicklingError):
        resnet.torchvision_network("resnet18")


@pytest.mark.fault("pickle that runs code")
def test_a_pickle_as_weights_of_ones_own_is_not_run(bomb, fresh_data):
    file = data_root() / "weights" / "resnet18.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(resnet.UnfitWeights, match="cannot be read"):
        resnet.pretrained_resnet("resnet18")


@pytest.mark.fault("pickle that runs code")
def test_a_pickle_as_a_file_of_a_data_set_is_not_run(bomb, make_official, monkeypatch, capsys):
    batch = make_official("cifar10").write() / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(bomb))
    array = data_root() / "ppi" / "raw" / "train_graph_id.npy"
    array.parent.mkdir(parents=True)
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    monkeypatch.setenv("PDL_OFFLINE", "1")
    assert not cifar10().provenance.real
    assert not ppi(Recipe((60,), (60,), (60,), modules=4, complex_size=10, degree=8)).provenance.real
    said = capsys.readouterr().out
    assert f"{batch} is truncated or corrupt" in said
    assert f"{array} is truncated or corrupt" in said


# One folder, several processes


@posix
@pytest.mark.fault("several processes save")
@pytest.mark.parametrize(
    ("save", "read"),
    [
        (
            lambda folder, name: Run("1_grad_cam", FULL).record(name, 1.0, "share"),
            lambda folder: json.loads((folder / "results.json").read_text(encoding="utf-8"))["1_grad_cam"],
        ),
        (lambda folder, name: save_weights(folder / name, {"w": torch.zeros(3)}, {}), read_digests),
    ],
    ids=["results", "digests"],
)
def test_processes_that_save_at_once_lose_nothing(save, read, tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_FIGURES", str(tmp_path))
    at_once(lambda process: [save(tmp_path, f"{process}-{i}") for i in range(12)])
    assert set(read(tmp_path)) == {f"{process}-{i}" for process in range(3) for i in range(12)}


@posix
@pytest.mark.fault("several processes fetch")
def test_three_processes_fetch_into_one_root_once(make_official, contents, file_server, monkeypatch, tmp_path):
    official = make_official("cifar10")
    at_once(lambda process: (tmp_path / f"found {process}").write_text(repr(contents(official.load()))))
    assert {path.name for path in data_root().iterdir()} == {official.folder, f".{official.folder}.lock"}
    asked = file_server.requests
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "alone"))
    alone = official.load()
    assert alone.provenance.real
    assert file_server.requests == 2 * asked
    assert {path.read_text() for path in tmp_path.glob("found *")} == {repr(contents(alone))}


@posix
@pytest.mark.fault("killed while downloading")
def test_when_the_process_that_fetches_is_killed_the_next_one_does(make_official, file_server):
    official = make_official("cifar10")
    file_server.stalled.set()
    first = start(official.load)
    staging = data_root() / f".{official.folder}.partial"
    patience = time.monotonic() + 30
    while not (file_server.requests and staging.exists()):
        time.sleep(0.01)
        assert time.monotonic() < patience
    second = start(official.load)
    time.sleep(0.2)  # the second one waits for the first
    assert second.is_alive()
    assert not (data_root() / official.folder).exists()
    first.kill()
    first.join(30)
    file_server.stalled.clear()
    second.join(30)
    assert {path.name for path in data_root().iterdir()} == {official.folder, f".{official.folder}.lock"}
    file_server.files.clear()
    assert official.load().provenance.real  # what the second one has put in place


# The table


def test_the_table_of_faults_lists_what_is_tried(request):
    """In a run of all test files; a choice of tests does not have them all."""
    marked = {
        path for path in (REPOSITORY / "tests").rglob("test_*.py") if "mark.fault(" in path.read_text("utf-8")
    }
    files = defaultdict(set)
    for item in request.session.items:
        for mark in item.iter_markers("fault"):
            files[mark.args[0]].add(item.path.name)
    options = request.config.option
    if options.keyword or options.markexpr or not marked <= {item.path for item in request.session.items}:
        pytest.skip("not all tests of faults were collected")
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| (`[^|]+`) \|$", page, re.MULTILINE)
    assert {name: set(re.findall(r"test_\w+\.py", where)) for name, where in rows} == files


if __name__ == "__main__":
    kill_and_restart(Path(sys.argv[1]))
