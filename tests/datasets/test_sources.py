"""Where data come from: what every data set does with whole files, half files, no files and no network.

No test needs the network or the real data: `official` (conftest.py) serves small data sets on this machine.
"""

import io
import multiprocessing
import os
import socket
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from pdl_utils.datasets import sources
from pdl_utils.settings import data_root

pytestmark = pytest.mark.usefixtures("fresh_data")


def tree(root: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


def contents(data: object) -> dict[str, list[bytes]]:
    """What a data set holds, so that two can be compared with ==."""
    whole = {name: value for name, value in vars(data).items() if name != "provenance"}
    return {name: [np.asarray(item).tobytes() for item in value] for name, value in whole.items()}


def in_root() -> set[str]:
    return {path.name for path in data_root().iterdir()}


def test_a_download_equals_local_files_which_are_only_read(official, file_server, tmp_path, monkeypatch, capsys):
    downloaded = official.load()
    name = official.folder.split("/")[0]
    assert in_root() == {name, f".{name}.lock"}  # nothing is left behind
    (data_root() / name / "NOTICE.txt").write_text("three labels\nare unknown\n")
    file_server.files.clear()
    assert str(official.load().provenance).endswith("; three labels are unknown")
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "elsewhere"))
    before = tree(official.write())
    capsys.readouterr()
    data = official.load()
    assert data.provenance.real
    assert contents(data) == contents(downloaded)
    assert capsys.readouterr().out == f"{data.provenance}\n"
    assert tree(data_root()) == before


def test_a_damaged_file_is_an_error_that_names_it_and_nothing_is_removed(official, file_server):
    folder = official.write() / official.folder
    path, note = folder / official.damaged, folder / "my notes"
    path.write_bytes(path.read_bytes()[:-30])
    note.write_text("mine")
    before = tree(data_root())
    with pytest.raises(sources.DamagedFile, match=r"Replace it, or remove .* to download") as caught:
        official.load()
    assert str(path) in str(caught.value)
    assert tree(data_root()) == before
    path.unlink()
    with pytest.raises(sources.DamagedFile, match=r"missing|has 19 photographs"):
        official.load()
    assert note.exists()
    assert file_server.requests == 0


@pytest.mark.parametrize("fault", ["cut", "stalled", "gone", "no folder", "read-only"])
def test_a_failed_download_means_a_stand_in_or_an_error(fault, make_official, file_server, monkeypatch):
    cifar, tiny, started = make_official("cifar10"), make_official("tiny"), time.monotonic()
    monkeypatch.setattr(sources, "SILENCE", 0.2)
    file_server.fault, reason = fault, "download failed"
    if fault == "gone":
        file_server.shutdown()
        file_server.server_close()
    elif fault in ("no folder", "read-only"):
        reason = r"cannot be written to .* set PDL_DATA"
        data_root().touch() if fault == "no folder" else data_root().mkdir(mode=0o555)
        if fault == "read-only" and os.access(data_root(), os.W_OK):
            pytest.skip("permissions do not bind this user")
    assert cifar.load().provenance.tag == " · stand-in for CIFAR-10"
    with pytest.raises(sources.NoRealData, match=f"{reason}.* put the official files into .*{tiny.folder}"):
        tiny.load()
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData, match="or unset PDL_REQUIRE_REAL"):
        cifar.load()
    assert time.monotonic() - started < 30
    assert socket.getdefaulttimeout() is None
    locks = {f".{cifar.folder}.lock", f".{tiny.folder}.lock"}
    assert {path.name for path in data_root().parent.rglob("*")} <= {"data", *locks}
    if fault in ("cut", "stalled"):
        monkeypatch.setattr(sources, "SILENCE", 30)
        file_server.fault = None
        assert cifar.load().provenance.real


def test_a_download_with_a_damaged_file_is_not_put_in_place(make_official, monkeypatch):
    official = make_official("cifar10")
    monkeypatch.setitem(CIFAR10.meta, "md5", "another one")
    assert not official.load().provenance.real
    assert in_root() == {f".{official.folder}.lock"}


def test_offline_asks_nobody(make_official, file_server, monkeypatch, capsys):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    provenance = make_official("cifar10").load().provenance
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines) == f"{provenance}, because PDL_OFFLINE is set"
    assert max(map(len, lines)) <= 96  # JupyterLab breaks longer ones inside of words
    assert file_server.requests == 0


@pytest.mark.parametrize("error", [socket.gaierror("no such host"), TimeoutError("timed out")])
def test_without_a_network_one_data_set_waits_for_all(error, make_official, monkeypatch, capsys):
    ask = Mock(side_effect=error)
    officials = [make_official(name) for name in ("mnist", "cifar10", "photos")]
    monkeypatch.setattr(socket, "create_connection", ask)
    assert not any(official.load().provenance.real for official in officials)
    assert ask.call_count == 1
    assert capsys.readouterr().out.count("restart the kernel to ask again") == 2


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python is older than tarfile's filters")
def test_a_hostile_archive_changes_nothing_outside_its_folder(make_official, file_server, tmp_path, monkeypatch):
    """It has the right checksum, and tries to write through a link that leads out."""
    official, buffer = make_official("cifar10"), io.BytesIO()
    (tmp_path / "outside").mkdir()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("way/evil"))
    file_server.files = dict.fromkeys(file_server.files, buffer.getvalue())
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    assert not official.load().provenance.real
    assert list((tmp_path / "outside").iterdir()) == []
    assert in_root() == {f".{official.folder}.lock"}


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL of POSIX systems")
def test_when_the_process_that_fetches_is_killed_one_of_three_others_does(make_official, file_server, monkeypatch):
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    official, fork = make_official("cifar10"), multiprocessing.get_context("fork")  # patches and all

    def load() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork, which would wait for them
        official.load()

    first, *others = [fork.Process(target=load, daemon=True) for _ in range(4)]
    file_server.fault = "stalled"
    first.start()
    while file_server.requests < 2:  # torchvision asks twice: for redirects, then for the file
        time.sleep(0.01)
    for process in others:
        process.start()
    assert in_root() == {f".{official.folder}.partial", f".{official.folder}.lock"}
    file_server.fault = None  # of the next request
    first.kill()
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    assert file_server.requests == 2 + 2
    assert in_root() == {official.folder, f".{official.folder}.lock"}
