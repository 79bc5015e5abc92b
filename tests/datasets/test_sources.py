"""Where data come from: what every data set does with whole files, half files, no files and no network.

No test needs the network or the real data: `official` (conftest.py) serves small data sets on this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import socket
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdl_utils.datasets import sources
from pdl_utils.settings import data_root

pytestmark = pytest.mark.usefixtures("fresh_data")


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


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


def test_download_gives_the_same_as_local_files_and_leaves_nothing_behind(
    official, contents, file_server, tmp_path, monkeypatch
):
    downloaded = official.load()
    assert downloaded.provenance.real
    left = {path.name for path in data_root().iterdir()} - {f".{official.folder}.lock"}
    assert left == {official.folder}
    asked = file_server.requests
    again = official.load()
    assert file_server.requests == asked  # nothing is downloaded twice
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "elsewhere"))
    official.write()
    assert contents(downloaded) == contents(again) == contents(official.load())


@pytest.mark.parametrize("name", ["cifar10", "tiny"])  # with a stand-in, and without
def test_require_real_says_what_to_do(name, make_official, monkeypatch, file_server):
    official = make_official(name)
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData) as caught:
        official.load()
    message = str(caught.value)
    assert "PDL_OFFLINE is set" in message
    assert str(data_root() / official.folder) in message
    assert ("unset PDL_REQUIRE_REAL" in message) == (name == "cifar10")
    assert file_server.requests == 0
    official.write()
    assert official.load().provenance.real


@pytest.mark.fault("no network")
def test_no_network_means_a_stand_in_that_says_so(make_official, file_server, capsys):
    official = make_official("cifar10")
    file_server.shutdown()
    file_server.server_close()
    provenance = official.load().provenance
    assert not provenance.real
    assert provenance.tag
    assert capsys.readouterr().out == f"{provenance}, because 127.0.0.1 does not answer (no network?)\n"


@pytest.mark.fault("connection cut")
def test_truncated_download_is_named_and_fetched_again(official, file_server, capsys):
    file_server.truncated = 2  # torchvision asks twice: for redirects, then for the file
    assert official.load().provenance.real
    out = capsys.readouterr().out
    assert "attempt 1 of 3" in out
    assert "attempt 2 of 3" not in out
    assert any(f"({name}) failed" in out for name in file_server.files)
    assert not list(data_root().glob("*.partial"))


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: bytes(len(c)), None],
    ids=["half", "empty", "zeros", "missing"],
)
def test_damaged_local_file_is_named_never_used_and_fetched_again(official, damage, contents, capsys, monkeypatch):
    whole = contents(official.load())
    path = data_root() / official.damaged
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    capsys.readouterr()
    with pytest.raises(sources.NoRealData):
        official.load()
    out = capsys.readouterr().out
    assert f"{path} is" in out or f"{path} cannot be decoded" in out or "val has 19 photographs, not 20\n" in out
    monkeypatch.delenv("PDL_OFFLINE")
    assert contents(official.load()) == whole
    assert path.read_bytes() == official.files[official.damaged]


# What is the same for every data set: tried with one, which has no stand-in


@pytest.fixture
def tiny(make_official):
    return make_official("tiny")


@pytest.mark.fault("connection cut")
def test_download_that_never_comes_whole_is_not_used(tiny, file_server, capsys):
    file_server.truncated = 10**6
    with pytest.raises(sources.NoRealData, match="failed 3 times"):
        tiny.load()
    assert "attempt 3 of 3" in capsys.readouterr().out
    assert not (data_root() / tiny.folder).exists()


@pytest.mark.fault("download stalls")
def test_download_that_stalls_ends(tiny, file_server, monkeypatch, capsys):
    file_server.stalled.set()
    monkeypatch.setattr(sources, "STALL", 0.1)
    started = time.monotonic()
    with pytest.raises(sources.NoRealData, match="failed 3 times"):
        tiny.load()
    assert time.monotonic() - started < 5
    assert "timed out" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None
    assert not (data_root() / tiny.folder).exists()
    file_server.stalled.clear()
    assert tiny.load().provenance.real


@pytest.mark.fault("data root that cannot be written to")
def test_data_root_that_cannot_be_made_is_said(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(sources.NoRealData, match="cannot be written to"):
        tiny.load()


def let_permissions_bind() -> None:
    """Root may write everywhere; on Linux a thread can give that up (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0 and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(version, sets)
        for which in (0, 1):  # effective and permitted
            sets[which] &= ~0b110
        libc.capset(version, sets)


@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX systems")
@pytest.mark.fault("data root that cannot be written to")
@pytest.mark.parametrize("state", ["whole", "damaged", "empty"])
def test_a_data_root_that_can_only_be_read(tiny, state):
    data_root().mkdir()
    if state != "empty":
        tiny.write()
    if state == "damaged":
        (data_root() / tiny.damaged).write_bytes(b"")
    before = tree(data_root())
    data_root().chmod(0o555)
    try:
        with ThreadPoolExecutor(1, initializer=let_permissions_bind) as thread:
            if thread.submit(os.access, data_root(), os.W_OK).result():
                pytest.skip("permissions do not bind this user")
            refused = pytest.raises(sources.NoRealData, match="cannot be written to")
            with contextlib.nullcontext() if state == "whole" else refused:
                thread.submit(tiny.load).result()
    finally:
        data_root().chmod(0o755)
    assert tree(data_root()) == before


# Is there a network?


@pytest.mark.fault("no network")
@pytest.mark.parametrize(("blocked", "patience"), [("getaddrinfo", 4), ("create_connection", 0.5)])
def test_offline_is_noticed_in_under_5_seconds_for_all_data_sets(blocked, patience, monkeypatch):
    """Names that are never looked up, with the real patience; hosts that never answer, in less time."""
    monkeypatch.setattr(sources, "PATIENCE", patience)
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(60)
        raise OSError("no answer")

    monkeypatch.setattr(socket, blocked, hang)
    started = time.monotonic()
    assert all(sources.network_problem(f"https://{host}.test/x") for host in "abcdef" * 2)
    assert time.monotonic() - started < patience + 1
    release.set()


@pytest.mark.fault("no network")
def test_failing_dns_is_noticed_at_once_and_asked_once(monkeypatch):
    asked = []

    def fail(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    started = time.monotonic()
    for url in ("https://a.test/x", "https://a.test/y", "https://b.test/x"):
        assert f"{url[8:14]} does not answer" in sources.network_problem(url)
    assert time.monotonic() - started < 1
    assert asked == ["a.test", "b.test"]


@pytest.mark.fault("no network")
def test_one_silent_host_does_not_hide_another(file_server, monkeypatch):
    connect = socket.create_connection

    def slow_for_one(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == "a.test":
            time.sleep(timeout)
            raise TimeoutError
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", slow_for_one)
    monkeypatch.setattr(sources, "PATIENCE", 0.4)
    assert sources.network_problem("http://a.test/x")
    assert sources.network_problem(file_server.url) is None


def test_behind_a_proxy_the_proxy_is_asked(file_server, monkeypatch):
    monkeypatch.setenv("http_proxy", file_server.url)
    assert sources.network_problem("http://a.test/x") is None
    monkeypatch.setenv("PDL_OFFLINE", "1")
    assert sources.network_problem("http://a.test/x") == "PDL_OFFLINE is set"


# Hostile archives, under the checksum that is expected


def hostile_tar(kind: str, outside: Path) -> bytes:
    """An archive that tries to write `evil` into the folder `outside`, or over the file `mine` in it."""
    names = {"parent": f"../../{outside.name}/evil", "absolute": str(outside / "evil"), "link": "way/evil"}
    buffer = io.BytesIO()
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


@pytest.fixture
def outside(tmp_path) -> Iterator[Path]:
    """A folder beside the data root that nothing may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    yield folder
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"mine": "mine"}


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python is older than tarfile's filters")
@pytest.mark.fault("hostile archive")
@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "hard link"])
def test_hostile_tar_changes_nothing_outside_its_folder(kind, make_official, outside, monkeypatch):
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    official, content = make_official("cifar10"), hostile_tar(kind, outside)
    official.serve(content)
    with pytest.raises(sources.NoRealData):
        official.load()
    assert [path.name for path in data_root().iterdir()] == [f".{official.folder}.lock"]
    careless = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115
    with careless, sources.careful_downloads(), contextlib.suppress(tarfile.FilterError):
        careless.extractall(data_root() / "inside")  # without a filter, as torchvision 0.21 does it


@pytest.mark.fault("hostile archive")
@pytest.mark.parametrize("where", ["../../outside/evil", "{outside}/evil"])
def test_hostile_zip_changes_nothing_outside_its_folder(where, tiny, outside):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(where.format(outside=outside), b"evil")
    tiny.serve(buffer.getvalue())
    with pytest.raises(sources.NoRealData):
        tiny.load()
