"""Faults, made for real: kills, full disks, pickles that run code.

After every fault: nothing lost, nothing half-written, and the next run goes on. Faults that belong to one module
are tried in its own tests; docs/reliability.md lists them all.
"""

import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pdl_utils import resnet
from pdl_utils.datasets import DamagedFile, cifar10, ppi
from pdl_utils.settings import data_root, save_atomically
from pdl_utils.training import UnusableState, fit
from pdl_utils.weights import save_weights

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL and limits of POSIX systems")
KILLS = 20


def train(epochs, file=None):
    """A small training, three batches an epoch: the model and its history."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(60, 4)

    def batches(epoch):
        return x[torch.randperm(60, generator=torch.Generator().manual_seed(epoch))].split(20)

    def loss(model, batch):
        return F.cross_entropy(model(batch), batch[:, :3].argmax(1))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    return model, fit(model, batches, loss, optimizer, epochs=epochs, file=file, label=None)


# Killed


def kill_and_restart(folder):
    """Train in processes that are killed at random moments and restarted, until `KILLS` have struck; each finished
    training must equal an unbroken one. A moment is a number of function calls: no matter how busy the machine."""
    moments, epochs = random.Random(0), []  # epochs: what each kill left behind

    def finish(run, kill_at=None):
        calls = itertools.count()
        sys.setprofile(lambda *_: next(calls) == kill_at and os.kill(os.getpid(), signal.SIGKILL))
        model, history = train(10, run / "state.pt")
        sys.setprofile(None)
        torch.save([next(calls), model.state_dict(), history["loss"]], run / "result")

    # tqdm's own lock is shared with every fork: one that is killed while it holds it would block all others.
    tqdm.set_lock(threading.RLock())
    train(1)  # imports what every process would have to import again
    finish(folder)
    total, weights, losses = torch.load(folder / "result", weights_only=True)
    while len(epochs) < KILLS:
        run, process = Path(mkdtemp(dir=folder)), None
        while process is None or process.exitcode != 0:
            kill_at = moments.randrange(total // 2) if len(epochs) < KILLS else None
            process = multiprocessing.get_context("fork").Process(target=finish, args=(run, kill_at))
            process.start()
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
            if process.exitcode:
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
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr


# No space left


@posix
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("of", ["state", "weights"])
def test_a_full_disk_loses_nothing_and_leaves_nothing_half(of, share, tmp_path):
    import resource  # POSIX only

    def save(number):
        weights = {"w": torch.full((50, 50), number)}
        if of == "state":
            return save_atomically(partial(torch.save, weights), tmp_path / "net")
        return save_weights(tmp_path / "net", weights, {})

    def content():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    save(0.0)
    before = content()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before["net"])), hard))
    try:
        with pytest.raises(OSError, match=r"net cannot be written; .*PDL_DATA and PDL_FIGURES"):
            save(1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content() == before
    (tmp_path / f".net.{os.getpid()}.partial").write_text("left by a killed process of the same number")
    save(1.0)  # there is space again
    assert content()["net"] != before["net"]


# Pickles that run code


@pytest.fixture
def bomb(tmp_path):
    """Unpickled by something that is not careful, it makes a folder."""
    folder = tmp_path / "it ran"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(folder),))})()
    pickle.loads(pickle.dumps(bomb))
    folder.rmdir()  # it was there: the bomb is live
    yield bomb
    assert not folder.exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_to_resume_from_is_not_run(zipped, bomb, tmp_path):
    file = tmp_path / "state.pt"
    torch.save({"model": bomb}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnusableState, match=r"state\.pt is damaged"):
        train(2, file)


def test_a_pickle_as_a_file_of_the_data_root_is_not_run(bomb, make_official):
    weights, array = data_root() / "weights/resnet18.safetensors", data_root() / "ppi/raw/train_graph_id.npy"
    batch = make_official("cifar10").write() / "cifar-10-batches-py/data_batch_3"
    for file in (weights, array):
        file.parent.mkdir(parents=True)
    for file in (weights, batch):
        file.write_bytes(pickle.dumps(bomb))
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    with pytest.raises(resnet.UnfitWeights, match="cannot be read"):
        resnet.pretrained_resnet("resnet18")
    for load, file in ((cifar10, batch), (ppi, array)):
        with pytest.raises(DamagedFile, match=file.stem):
            load()


if __name__ == "__main__":
    kill_and_restart(Path(sys.argv[1]))
