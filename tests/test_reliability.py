"""Faults, made for real: kills, full disks, pickles that run code, several processes.

After every fault: nothing lost, nothing half-written, and the next run goes on. Faults that belong to one module
are tried in its own tests; docs/reliability.md lists them all.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from pdl_utils import notebook, resnet
from pdl_utils.datasets import DamagedFile, cifar10, ppi
from pdl_utils.notebook import Run
from pdl_utils.settings import data_root, save_atomically
from pdl_utils.training import History, UnusableState, fit
from pdl_utils.weights import save_weights

POSIX = os.name == "posix"
posix = pytest.mark.skipif(not POSIX, reason="needs fork, SIGKILL and limits of POSIX systems")
FORK = multiprocessing.get_context("fork") if POSIX else None  # a child has the parent's patches
KILLS = 20


def train(epochs: int, file: Path | None = None) -> tuple[nn.Module, History]:
    """A small training, three batches an epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(60, 4)

    def batches(epoch: int) -> tuple[torch.Tensor, ...]:
        return x[torch.randperm(60, generator=torch.Generator().manual_seed(epoch))].split(20)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch), batch[:, :3].argmax(1))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    return model, fit(model, batches, loss, optimizer, epochs=epochs, file=file, label=None)


def start(work: Callable[[], object]) -> multiprocessing.Process:
    """Call `work` in a process that has all that this one has, patches, too."""

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them forever
        work()

    process = FORK.Process(target=run)
    process.start()
    return process


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
def test_training_killed_at_20_random_moments_ends_in_the_same_weights(tmp_path):
    """In a process without a GPU, whose threads would not live on in a fork."""
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


@posix
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


def save_figure(file: Path, version: int) -> None:
    figure, axis = plt.subplots()
    axis.plot([0, version])
    run = Run("1_grad_cam", "full")
    run.show(figure, file.stem, "a line")
    if "figures" in run.rows:  # the notebook goes on, and says so
        raise OSError(run.rows["figures"])


def weights(version: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50, 50), float(version))}


SAVED = {  # file → how a version of it, 1 or 2, is saved; its folder is also that of figures
    "state.pt": lambda file, version: save_atomically(partial(torch.save, weights(version)), file),
    "net.safetensors": lambda file, version: save_weights(file, weights(version), {"version": version}),
    "line.png": save_figure,
}


@posix
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", SAVED)
def test_a_full_disk_loses_nothing_and_leaves_nothing_half(name, share, tmp_path, monkeypatch):
    import resource  # POSIX only

    monkeypatch.setenv("PDL_FIGURES", str(tmp_path))
    monkeypatch.setattr(notebook, "display", lambda *_, **__: None)  # pytest writes what is shown to a file, too
    SAVED[name](tmp_path / name, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before[name])), hard))
    try:
        with pytest.raises((OSError, SafetensorError)) as caught:
            SAVED[name](tmp_path / name, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if name != "net.safetensors":  # torch itself names neither the file nor the cause
        assert f"{name} cannot be written; is the disk full" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    SAVED[name](tmp_path / name, 2)  # there is space again
    assert (tmp_path / name).read_bytes() != before[name]
    assert {path.name for path in tmp_path.iterdir()} == set(before)


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


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_to_resume_from_is_not_run(zipped, bomb, tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"model": bomb}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnusableState, match=r"state\.pt is damaged"):
        train(2, file)


def test_a_pickle_as_weights_of_ones_own_is_not_run(bomb, fresh_data):
    file = data_root() / "weights" / "resnet18.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(resnet.UnfitWeights, match="cannot be read"):
        resnet.pretrained_resnet("resnet18")


def test_a_pickle_as_a_file_of_a_data_set_is_not_run(bomb, make_official):
    batch = make_official("cifar10").write() / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps(bomb))
    with pytest.raises(DamagedFile, match="data_batch_3"):
        cifar10()
    array = data_root() / "ppi" / "raw" / "train_graph_id.npy"
    array.parent.mkdir(parents=True)
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedFile, match="train_graph_id"):
        ppi()


if __name__ == "__main__":
    kill_and_restart(Path(sys.argv[1]))
