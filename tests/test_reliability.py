"""Faults, made for real: kills, full disks, hostile files, folders that can only be read, several processes.

What the modules' own tests try already (truncated, missing and half files, a network that is gone, …) is not
tried again here. After every fault: nothing lost, nothing half-written, and the next run goes on.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import test_ppi
import torch
from safetensors import SafetensorError
from test_datasets import MAKERS, contents, make_cifar10, make_imagenette, md5, tree
from test_training import problem, train
from torch import nn
from torchvision.datasets import CIFAR10, Imagenette

from pdl_utils import resnet, results
from pdl_utils import weights as checkpoints
from pdl_utils.datasets import network, photos, sources
from pdl_utils.datasets.ppi import ppi
from pdl_utils.grad_cam.hooks import evaluating, record_activations
from pdl_utils.grad_cam.metrics import insertion_deletion, receptive_field
from pdl_utils.provenance import Provenance
from pdl_utils.settings import Profile, save_atomically
from pdl_utils.training import NonFiniteLoss, UnusableState
from pdl_utils.weights import read_digests, save_weights, sha256

FORK = multiprocessing.get_context("fork")  # a child has the parent's patches and need not import torch
FULL = Profile("full", "a test")
KILLS = 20


# Killed

KILLING = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path

import torch

sys.path.insert(0, {tests!r})
from test_training import train

folder = Path({folder!r})
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.Adam([weight]).step()  # imports what every child would have to import again


def start(checkpoint, result):
    if child := os.fork():
        return child
    try:
        model, history = train(10, checkpoint)
        torch.save([model.state_dict(), history["loss"]], result)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


started = time.perf_counter()
assert os.waitpid(start(None, folder / "unbroken"), 0)[1] == 0
whole = time.perf_counter() - started
moments, runs = random.Random(0), 0
epochs = []  # that the state file held after each kill
while len(epochs) < {kills}:
    run = folder / f"run {{runs}}"
    run.mkdir()
    status = None
    while status != 0:
        child = start(run / "state.pt", folder / f"result {{runs}}")
        if len(epochs) < {kills}:
            time.sleep(moments.uniform(0, whole / 2))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        if status:
            state = run / "state.pt"
            epochs.append(len(torch.load(state, weights_only=True)["history"]) if state.exists() else 0)
    runs += 1
print(json.dumps({{"runs": runs, "epochs": epochs}}))
"""


def test_training_killed_at_20_random_moments_ends_in_the_same_weights(tmp_path):
    """Restarted after each kill until it is done; and again, until so many kills have struck."""
    code = KILLING.format(tests=str(Path(__file__).parent), folder=str(tmp_path), kills=KILLS)
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout)
    assert len(seen["epochs"]) == KILLS
    assert len(set(seen["epochs"])) >= 3  # early and late
    weights, losses = torch.load(tmp_path / "unbroken", weights_only=True)
    for run in range(seen["runs"]):
        resumed, theirs = torch.load(tmp_path / f"result {run}", weights_only=True)
        assert theirs == losses
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())
        left = {path.name for path in (tmp_path / f"run {run}").iterdir()} - {"state.pt"}
        assert all(re.fullmatch(r"\.state\.pt\.\d+\.partial", name) for name in left)  # hidden, and git ignores it


@pytest.mark.parametrize("written", ["", "ne", "new"], ids=["before", "half", "just before it is put in place"])
def test_killed_while_saving_the_old_file_stays(tmp_path, written):
    file = tmp_path / "state.pt"
    file.write_text("old")

    def killed(partial: Path) -> None:
        partial.write_text(written)
        os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=save_atomically, args=(killed, file))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert file.read_text() == "old"
    (tmp_path / f".state.pt.{os.getpid()}.partial").write_text("left by an earlier process of the same number")
    save_atomically(lambda partial: partial.write_text("new"), file)
    assert file.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", f".state.pt.{child.pid}.partial"}


# No space left


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Inside, the system refuses to write a file's further bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_state(folder: Path, version: int) -> Path:
    train(version, folder / "state.pt")
    return folder / "state.pt"


def save_shipped(folder: Path, version: int) -> Path:
    save_weights(folder / "net.safetensors", {"w": torch.full((50, 50), float(version))}, {"version": version})
    return folder / "net.safetensors"


def save_result(folder: Path, version: int) -> Path:
    results.record(FULL, "1_grad_cam", "hits", version, "share", Provenance("photographs", "a test"))
    return folder / "results.json"


def save_figure(folder: Path, version: int) -> Path:
    figure, axis = plt.subplots()
    axis.plot([0, version])
    results.show_figure(figure, "line", "a line", FULL)
    return folder / "line.png"


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("save", [save_state, save_shipped, save_result, save_figure])
def test_a_full_disk_loses_nothing_and_leaves_nothing_half(save, share, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    file = save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises((OSError, RuntimeError, SafetensorError)),
        files_no_longer_than(int(share * file.stat().st_size)),
    ):
        save(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(tmp_path, 2)  # there is space again
    assert file.read_bytes() != before[file.name]
    assert {path.name for path in tmp_path.iterdir()} == set(before)


def test_a_state_that_does_not_fit_on_the_disk_is_named(tmp_path):
    with pytest.raises(OSError, match=r"state\.pt cannot be written; is the disk full"), files_no_longer_than(100):
        save_state(tmp_path, 1)  # torch itself names neither


# Nonsense in training


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_leaves_the_last_whole_epoch_to_go_on_from(nonsense, tmp_path, monkeypatch):
    unbroken, _ = train(5)
    model, batches, loss, data = problem()

    def breaks_in_epoch_3(network: nn.Module, batch: tuple) -> torch.Tensor:
        counted.append(1)
        return loss(network, batch) * (nonsense if len(counted) > 2 * 3 + 1 else 1)

    counted: list[int] = []
    monkeypatch.setattr("test_training.problem", lambda: (model, batches, breaks_in_epoch_3, data))
    with pytest.raises(NonFiniteLoss, match="epoch 3, batch 2"):
        train(5, tmp_path / "state.pt")
    monkeypatch.undo()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    resumed, _ = train(5, tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), unbroken.parameters(), strict=True))


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\0" * len(c)])
def test_a_damaged_state_is_not_taken_for_a_fresh_start(damage, tmp_path):
    file = tmp_path / "state.pt"
    train(2, file)
    file.write_bytes(damage(file.read_bytes()))
    before = file.read_bytes()
    with pytest.raises(UnusableState, match=r"state\.pt is damaged .*; delete it to start over"):
        train(3, file)
    assert file.read_bytes() == before


# Hooks


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def record_and_break(model: nn.Module) -> None:
    with record_activations(model, ["0", "1"], start_graph=True):
        model(torch.zeros(2, 3, 8, 8))


def break_inside_the_hook(model: nn.Module) -> None:
    model[1] = nn.Identity()
    model[0].register_forward_hook(lambda *_: 1 / 0)
    record_and_break(model)


def break_beside_the_model(model: nn.Module) -> None:
    with record_activations(model, "0"), evaluating(model):
        assert not model.training
        raise ZeroDivisionError


IMAGES, LABELS = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "use",
    [
        record_and_break,
        break_inside_the_hook,
        break_beside_the_model,
        lambda model: receptive_field(model, IMAGES, "0"),
        lambda model: insertion_deletion(model, IMAGES, IMAGES[:, 0], LABELS, steps=2, blur=1.0),
    ],
    ids=["layer", "hook", "caller", "receptive field", "insertion"],
)
def test_an_exception_leaves_no_hook_no_mode_and_no_gradient_setting(use):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Breaks()).train()
    model[0].eval()
    with pytest.raises(ZeroDivisionError):
        use(model)
    assert not model[1]._forward_hooks
    assert len(model[0]._forward_hooks) == (use is break_inside_the_hook)  # the one that is not ours
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


# Hostile files


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
    if zipped:
        torch.save({"model": bomb}, file)
    else:
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(UnusableState, match=r"state\.pt is damaged \(UnpicklingError\)"):
        train(2, file)


@pytest.mark.parametrize("where", ["local", "from the network"])
def test_a_pickle_as_pretrained_weights_is_not_run(where, bomb, file_server, fresh_data, monkeypatch, tmp_path):
    """Even with the digest that its name promises."""
    torch.save(bomb, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"resnet18-{sha256(tmp_path / 'weights.pth')[:8]}.pth"
    entry = SimpleNamespace(url=file_server.url + name, meta={"categories": []}, transforms=None)
    monkeypatch.setattr(resnet, "get_model_weights", lambda arch: SimpleNamespace(IMAGENET1K_V1=entry))
    if where == "local":
        sources.data_root().mkdir()
        (sources.data_root() / name).write_bytes(content)
    else:
        file_server.files[name] = content
    with pytest.raises((pickle.UnpicklingError, sources.NoRealData)):
        resnet.torchvision_network("resnet18")


def test_a_pickle_as_a_batch_of_cifar10_is_not_run(bomb, file_server, fresh_data, monkeypatch, capsys):
    official = make_cifar10(file_server, monkeypatch)
    file = official.write() / official.damaged
    file.write_bytes(pickle.dumps(bomb))
    assert official.load().provenance.real
    assert f"{file} is truncated or corrupt" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_feats.npy", "test_graph_id.npy"])
def test_a_pickle_as_an_array_of_ppi_is_not_run(name, bomb, fresh_data, monkeypatch, capsys):
    file = test_ppi.write_raw() / name
    np.save(file, np.array([bomb], dtype=object), allow_pickle=True)
    monkeypatch.setenv("PDL_OFFLINE", "1")
    assert not ppi(test_ppi.TINY).provenance.real
    assert f"{file} is truncated or corrupt" in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["pre_transform", "pre_filter", "train", "val", "test"])
def test_a_pickle_among_the_processed_files_of_ppi_is_not_run(name, zipped, bomb, fresh_data, monkeypatch):
    processed = test_ppi.write_raw().parent / "processed"
    monkeypatch.setenv("PDL_OFFLINE", "1")
    ppi()
    torch.save(bomb, processed / f"{name}.pt", _use_new_zipfile_serialization=zipped)
    test_ppi.check(ppi())
    for path in processed.iterdir():
        torch.load(path, weights_only=True)  # made again


def hostile_tar(kind: bytes, target: str) -> bytes:
    """A link named `way` that leads outside, and a file that goes through it or over it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = kind, target
        archive.addfile(link)
        for name in ["way"] if target.endswith("mine") else ["way/mine", "way/evil"]:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python is older than tarfile's filters")
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "../../outside"),
        (tarfile.SYMTYPE, "../../outside/mine"),
        (tarfile.SYMTYPE, "/absolute"),
        (tarfile.LNKTYPE, "../../outside/mine"),
        (tarfile.LNKTYPE, "/absolute"),
    ],
)
@pytest.mark.parametrize("maker", [make_cifar10, make_imagenette])
def test_links_in_an_archive_lead_nowhere(maker, kind, target, file_server, fresh_data, monkeypatch, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    official = maker(file_server, monkeypatch)
    content = hostile_tar(kind, str(outside / "mine") if target == "/absolute" else target)
    file_server.files[official.archive] = content
    if maker is make_cifar10:
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    else:
        monkeypatch.setitem(Imagenette._ARCHIVES, "320px", (photos.IMAGENETTE_URL, md5(content)))
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData):
        official.load()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine": "mine"}
    assert [path.name for path in sources.data_root().iterdir()] == [f".{official.folder}.lock"]


# One data root, several processes


def in_child(work: Callable[[], object]) -> tuple[multiprocessing.Process, Callable]:
    """Start `work` in a forked process; the process, and a function that waits for (result, what it printed)."""
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them forever
        printed = io.StringIO()
        with redirect_stdout(printed):
            try:
                result = work()
            except Exception as error:
                result = error
        send.send_bytes(pickle.dumps((result, printed.getvalue())))  # plain: torch would share memory

    process = FORK.Process(target=run)
    process.start()
    send.close()  # so that waiting ends when the child does

    def result() -> tuple[object, str]:
        try:
            return pickle.loads(receive.recv_bytes())
        finally:
            process.join(30)

    return process, result


def record_result(folder: Path, name: str) -> None:
    results.record(FULL, "1_grad_cam", name, 1.0, "share")


def ship_weights(folder: Path, name: str) -> None:
    save_weights(folder / name, {"w": torch.zeros(3)}, {})


@pytest.mark.parametrize(
    ("save", "module", "reads", "names"),
    [
        (
            record_result,
            results.json,
            "loads",
            lambda f: json.loads((f / "results.json").read_text())["1_grad_cam"],
        ),
        (ship_weights, checkpoints, "read_digests", read_digests),
    ],
    ids=["results", "digests"],
)
def test_processes_that_save_at_once_lose_nothing(save, module, reads, names, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    original = getattr(module, reads)

    def slowly(*args):
        found = original(*args)
        time.sleep(0.02)
        return found

    def save_some(process: int) -> None:
        monkeypatch.setattr(module, reads, slowly)
        together.wait(30)
        for i in range(4):
            save(tmp_path, f"{process}-{i}")

    together = FORK.Barrier(3)
    answers = [in_child(partial(save_some, process))[1] for process in range(3)]
    assert [answer()[0] for answer in answers] == [None] * 3
    assert sorted(names(tmp_path)) == [f"{process}-{i}" for process in range(3) for i in range(4)]


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_three_processes_fetch_into_one_root_once(maker, file_server, fresh_data, monkeypatch, tmp_path):
    official = maker(file_server, monkeypatch)
    together = FORK.Barrier(3)

    def load() -> dict[str, object]:
        together.wait(30)
        return contents(official.load())

    answers = [in_child(load)[1] for _ in range(3)]
    found = [answer()[0] for answer in answers]
    asked = file_server.requests
    assert found[0]["provenance"].real
    assert found[0] == found[1] == found[2]
    left = {path.name for path in sources.data_root().iterdir()}
    assert left == {official.folder, f".{official.folder}.lock"}
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "alone"))
    assert contents(official.load()) == found[0]
    assert file_server.requests == 2 * asked


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_when_the_process_that_fetches_is_killed_the_next_one_does(maker, file_server, fresh_data, monkeypatch):
    official = maker(file_server, monkeypatch)
    file_server.stalled.set()
    first, _ = in_child(official.load)
    staging = sources.data_root() / f".{official.folder}.partial"
    patience = time.monotonic() + 30
    while not (file_server.requests and staging.exists()):
        time.sleep(0.01)
        assert time.monotonic() < patience
    _, answer = in_child(official.load)
    time.sleep(0.2)  # the second one waits for the first
    assert not (sources.data_root() / official.folder).exists()
    first.kill()
    first.join(30)
    file_server.stalled.clear()
    data, _ = answer()
    assert data.provenance.real
    left = {path.name for path in sources.data_root().iterdir()}
    assert left == {official.folder, f".{official.folder}.lock"}


# A network that is too slow; a data root that can only be read


@pytest.mark.parametrize("maker", ["cifar10", "photos", "tiny"])
def test_a_download_that_stalls_ends(maker, file_server, fresh_data, monkeypatch, capsys):
    official = MAKERS[maker](file_server, monkeypatch)
    file_server.stalled.set()
    monkeypatch.setattr(network, "STALL", 0.2)
    with suppress(sources.NoRealData):
        assert not official.load().provenance.real
    assert "attempt 3 of 3" in capsys.readouterr().out
    assert not (sources.data_root() / official.folder).exists()
    file_server.stalled.clear()
    assert official.load().provenance.real


def let_permissions_bind() -> None:
    """Root may write everywhere; on Linux it can give that up (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(version, sets)
        for which in (0, 1):  # effective and permitted
            sets[which] &= ~0b110
        libc.capset(version, sets)


def load_read_only(load: Callable[[], object]) -> tuple[object, str]:
    """What `load` gives, and prints, in a process that may read the data root and not write to it."""
    root = sources.data_root()

    def try_to() -> object:
        let_permissions_bind()
        return None if os.access(root, os.W_OK) else load()

    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    modes = {path: path.stat().st_mode for path in folders}
    for path in folders:
        path.chmod(0o555)
    try:
        found, printed = in_child(try_to)[1]()
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    if found is None:
        pytest.skip("permissions do not bind this user")
    return found, printed


@pytest.mark.parametrize("state", ["whole", "damaged", "empty"])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_data_root_that_can_only_be_read(maker, state, file_server, fresh_data, monkeypatch):
    official = maker(file_server, monkeypatch)
    root = sources.data_root()
    official.write() if state != "empty" else root.mkdir()
    file = root / official.damaged
    if state == "damaged":
        file.write_bytes(file.read_bytes()[:-30])
    before = tree(root)
    found, printed = load_read_only(official.load)
    assert tree(root) == before
    if state == "whole":
        assert found.provenance.real
        return
    assert ("cannot be removed" in printed) == (state == "damaged")
    if official.has_stand_in:
        assert not found.provenance.real
        assert "cannot be written to" in printed
    else:
        assert isinstance(found, sources.NoRealData)
        assert "cannot be written to" in str(found)


def test_ppi_in_a_data_root_that_can_only_be_read(fresh_data, monkeypatch):
    raw = test_ppi.write_raw()
    monkeypatch.setenv("PDL_OFFLINE", "1")
    found, _ = load_read_only(ppi)
    test_ppi.check(found)
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]
