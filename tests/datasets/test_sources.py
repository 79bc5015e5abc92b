"""Where data come from: what every data set does with whole files, half files, no files and no network.

No test needs the network or the real data: `official` (conftest.py) serves small data sets on this machine.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import socket
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pdl_utils.datasets import sources
from pdl_utils.settings import data_root

pytestmark = pytest.mark.usefixtures("fresh_data")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or permissions of POSIX systems")


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


def contents(data: object) -> dict[str, list[bytes]]:
    """What a data set holds, so that two can be compared with ==."""
    whole = {name: value for name, value in vars(data).items() if name != "provenance"}
    return {name: [np.asarray(item).tobytes() for item in value] for name, value in whole.items()}


def test_whole_local_files_are_read_without_network_and_without_writing(official, file_server, capsys):
    root = official.write()
    before = tree(root)
    data = official.load()
    assert data.provenance.real
    assert capsys.readouterr().out == f"{data.provenance}\n"
    assert file_server.requests == 0
    assert tree(root) == before
    (root / official.folder / "NOTICE.txt").write_text("three labels\nare unknown\n", encoding="utf-8")
    assert str(official.load().provenance).endswith("; three labels are unknown")


def test_a_download_equals_local_files_and_leaves_nothing_behind(official, file_server, tmp_path, monkeypatch):
    downloaded = official.load()
    assert {path.name for path in data_root().iterdir()} == {official.folder, f".{official.folder}.lock"}
    asked = file_server.requests
    again = official.load()
    assert file_server.requests == asked  # nothing is downloaded twice
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "elsewhere"))
    official.write()
    assert contents(downloaded) == contents(again) == contents(official.load())


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "missing"])
def test_a_damaged_file_is_an_error_that_names_it_and_nothing_is_removed(official, damage, file_server):
    path = official.write() / official.damaged
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "zeros": bytes(len(content))}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    (data_root() / official.folder / "my notes").write_text("mine")
    before = tree(data_root())
    with pytest.raises(sources.DamagedFile) as caught:
        official.load()
    named = str(path) if "imagenette" not in official.folder or damage != "missing" else "val has 19 photographs"
    assert named in str(caught.value)
    assert f"remove {data_root() / official.folder} to" in str(caught.value)
    assert tree(data_root()) == before
    assert file_server.requests == 0


@pytest.mark.parametrize("fault", ["cut", "stalled", "not found", "refused", "no folder"])
@pytest.mark.parametrize("name", ["cifar10", "tiny"])  # with a stand-in, and without
def test_a_failed_download_is_said_and_leaves_nothing(fault, name, make_official, file_server, monkeypatch):
    official, files, started = make_official(name), dict(file_server.files), time.monotonic()
    monkeypatch.setattr(sources, "SILENCE", 0.2)
    file_server.truncated = fault == "cut"
    if fault == "stalled":
        file_server.stalled.set()
    elif fault == "not found":
        file_server.files.clear()
    elif fault == "refused":
        file_server.shutdown()
        file_server.server_close()
    elif fault == "no folder":
        data_root().touch()
    if name == "cifar10":
        assert official.load().provenance.tag == " · stand-in for CIFAR-10"
        monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(
        sources.NoRealData, match=r"download failed|cannot be written to .* set PDL_DATA"
    ) as caught:
        official.load()
    assert f"put the official files into {data_root() / official.folder}" in str(caught.value)
    assert ("unset PDL_REQUIRE_REAL" in str(caught.value)) == (name == "cifar10")
    assert time.monotonic() - started < 30
    assert socket.getdefaulttimeout() is None
    assert {path.name for path in data_root().parent.rglob("*")} <= {"data", f".{official.folder}.lock"}
    if fault in ("cut", "stalled", "not found"):
        monkeypatch.setattr(sources, "SILENCE", 30)
        file_server.truncated, file_server.files = False, files
        file_server.stalled.clear()
        assert official.load().provenance.real


def test_offline_asks_nobody(make_official, file_server, monkeypatch, capsys):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    provenance = make_official("cifar10").load().provenance
    assert capsys.readouterr().out == f"{provenance}, because PDL_OFFLINE is set\n"
    assert file_server.requests == 0


@pytest.mark.parametrize("error", [socket.gaierror("no such host"), TimeoutError("timed out")])
def test_without_a_network_one_data_set_waits_for_all(error, make_official, monkeypatch, capsys):
    asked = []

    def fail(*address: object, **_: object) -> None:
        asked.append(address)
        raise error

    officials = [make_official(name) for name in ("mnist", "cifar10", "photos")]
    monkeypatch.setattr(socket, "create_connection", fail)
    assert not any(official.load().provenance.real for official in officials)
    assert len(asked) == 1
    assert capsys.readouterr().out.count("restart the kernel to ask again") == 2


# A data root that cannot be written to


def let_permissions_bind() -> None:
    """Root may write everywhere; on Linux a thread can give that up (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(version, sets)
        for which in (0, 1):  # effective and permitted
            sets[which] &= ~0b110
        libc.capset(version, sets)


@posix
def test_a_data_root_that_can_only_be_read(make_official):
    cifar, tiny = make_official("cifar10"), make_official("tiny")
    cifar.write()
    before = tree(data_root())
    data_root().chmod(0o555)
    try:
        with ThreadPoolExecutor(1, initializer=let_permissions_bind) as thread:
            if thread.submit(os.access, data_root(), os.W_OK).result():
                pytest.skip("permissions do not bind this user")
            assert thread.submit(cifar.load).result().provenance.real
            with pytest.raises(sources.NoRealData, match=r"cannot be written to \(.*; set PDL_DATA to a folder"):
                thread.submit(tiny.load).result()
    finally:
        data_root().chmod(0o755)
    assert tree(data_root()) == before


# Hostile archives


def hostile(kind: str, outside: Path) -> bytes:
    """An archive that tries to write `evil` into the folder `outside`, or over the file `mine` in it."""
    names = {"parent": f"../../{outside.name}/evil", "absolute": str(outside / "evil"), "link": "way/evil"}
    buffer = io.BytesIO()
    if kind.startswith("zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(names[kind.split()[1]], b"evil")
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        if kind.endswith("link"):
            link = tarfile.TarInfo("way")
            link.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
            link.linkname = f"../../{outside.name}" if kind == "link" else str(outside / "mine")
            archive.addfile(link)
        member = tarfile.TarInfo(names.get(kind, "way"))
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python is older than tarfile's filters")
@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "hard link", "zip parent", "zip absolute"])
def test_a_hostile_archive_changes_nothing_outside_its_folder(
    kind, make_official, file_server, tmp_path, monkeypatch
):
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    outside, official = tmp_path / "outside", make_official("tiny" if "zip" in kind else "cifar10")
    outside.mkdir()
    (outside / "mine").write_text("mine")
    file_server.files = dict.fromkeys(file_server.files, hostile(kind, outside))
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)  # it has the right checksum
    with pytest.raises(sources.NoRealData):
        official.load()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"mine": "mine"}
    assert [path.name for path in data_root().iterdir()] == [f".{official.folder}.lock"]


# Several processes


def start(work: Callable[[], object]) -> multiprocessing.Process:
    """Call `work` in a process that has all that this one has, patches, too."""

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them
        work()

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


@posix
def test_three_processes_fetch_into_one_root_once(make_official, file_server, tmp_path):
    official = make_official("cifar10")
    files = [tmp_path / f"found {i}" for i in range(3)]
    children = [start(lambda file=file: file.write_text(repr(contents(official.load())))) for file in files]
    for child in children:
        child.join(60)
    assert {file.read_text() for file in files} == {repr(contents(official.load()))}
    assert file_server.requests == 2  # torchvision asks twice: for redirects, then for the file
    assert {path.name for path in data_root().iterdir()} == {official.folder, f".{official.folder}.lock"}


@posix
def test_when_the_process_that_fetches_is_killed_the_next_one_does(make_official, file_server):
    official = make_official("cifar10")
    file_server.stalled.set()
    first, patience = start(official.load), time.monotonic() + 30
    while not (file_server.requests and (data_root() / f".{official.folder}.partial").exists()):
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
