"""Where data come from: what every data set does with whole files, half files, no files and no network.

No test needs the network or the real data: `official` (conftest.py) serves small data sets on this machine.
"""

from __future__ import annotations

import contextlib
import io
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
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


def test_a_notice_beside_the_files_belongs_to_their_provenance(official):
    root = official.write()
    (root / official.folder / "NOTICE.txt").write_text("three labels\nare unknown\n", encoding="utf-8")
    assert str(official.load().provenance).endswith("; three labels are unknown")


def test_require_real_says_what_to_do(official, monkeypatch, file_server):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData) as caught:
        official.load()
    message = str(caught.value)
    assert "PDL_OFFLINE is set" in message
    assert str(data_root() / official.folder) in message
    assert ("unset PDL_REQUIRE_REAL" in message) == official.has_stand_in
    assert file_server.requests == 0
    official.write()
    assert official.load().provenance.real


def no_real_data(official, because: str) -> str:
    """Load what cannot be had; what was printed or raised in its place."""
    if official.has_stand_in:
        data = official.load()
        assert not data.provenance.real
        assert data.provenance.tag
        return str(data.provenance)
    with pytest.raises(sources.NoRealData, match=because):
        official.load()
    return because


@pytest.mark.fault("no network")
def test_no_network_means_a_stand_in_that_says_so(official, file_server, capsys):
    file_server.shutdown()
    file_server.server_close()
    said = no_real_data(official, "127.0.0.1 does not answer")
    if official.has_stand_in:
        assert capsys.readouterr().out == f"{said}, because 127.0.0.1 does not answer (no network?)\n"


@pytest.mark.fault("connection cut")
def test_truncated_download_is_named_and_fetched_again(official, file_server, capsys):
    file_server.truncated = 2  # torchvision asks twice: for redirects, then for the file
    assert official.load().provenance.real
    out = capsys.readouterr().out
    assert "attempt 1 of 3" in out
    assert "attempt 2 of 3" not in out
    assert official.archive in out
    assert not list(data_root().glob("*.partial"))


@pytest.mark.fault("connection cut")
def test_download_that_never_comes_whole_is_not_used(official, file_server, capsys):
    file_server.truncated = 10**6
    no_real_data(official, "failed 3 times")
    assert "attempt 3 of 3" in capsys.readouterr().out
    assert not (data_root() / official.folder).exists()


@pytest.mark.fault("download stalls")
def test_download_that_stalls_ends(official, file_server, monkeypatch, capsys):
    file_server.stalled.set()
    monkeypatch.setattr(sources, "STALL", 0.1)
    started = time.monotonic()
    no_real_data(official, "failed 3 times")
    assert time.monotonic() - started < 5
    assert "timed out" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None
    assert not (data_root() / official.folder).exists()
    file_server.stalled.clear()
    assert official.load().provenance.real


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", None], ids=["half", "empty", "missing"]
)
def test_damaged_local_file_is_named_and_fetched_again(official, damage, contents, capsys):
    whole = contents(official.load())
    path = data_root() / official.damaged
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    capsys.readouterr()
    assert contents(official.load()) == whole
    out = capsys.readouterr().out
    assert f"{path} is" in out or f"{path} cannot be decoded" in out or "val has 19 photographs, not 20\n" in out
    assert path.read_bytes() == official.files[official.damaged]


@pytest.mark.fault("damaged files")
def test_damaged_local_file_is_never_used_offline(official, capsys, monkeypatch):
    path = official.write() / official.damaged
    path.write_bytes(path.read_bytes()[:-30] if path.suffix else bytes(len(path.read_bytes())))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    no_real_data(official, "PDL_OFFLINE is set")
    out = capsys.readouterr().out
    assert f"{path} is" in out or f"{path} cannot be decoded" in out


@pytest.mark.fault("data root that cannot be written to")
def test_data_root_that_cannot_be_made_is_said(official, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "file" / "data"))
    no_real_data(official, "cannot be written to")
    if official.has_stand_in:
        assert "cannot be written to" in capsys.readouterr().out


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
    assert "a.test does not answer" in sources.network_problem("https://a.test/x")
    assert sources.network_problem("https://a.test/y")
    assert sources.network_problem("https://b.test/x")
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
@pytest.mark.parametrize("loader", ["photos", "a careless one"])
def test_hostile_tar_changes_nothing_outside_its_folder(loader, kind, make_official, outside, monkeypatch):
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    content = hostile_tar(kind, outside)
    if loader == "a careless one":  # torchvision 0.21 calls `extractall` without a filter
        archive = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115
        with archive, sources.careful_downloads(), contextlib.suppress(tarfile.FilterError):
            archive.extractall(data_root() / "inside")
        return
    official = make_official(loader)
    official.serve(content)
    with pytest.raises(sources.NoRealData):
        official.load()
    assert [path.name for path in data_root().iterdir()] == [f".{official.folder}.lock"]


@pytest.mark.fault("hostile archive")
@pytest.mark.parametrize("where", ["../../outside/evil", "{outside}/evil"])
def test_hostile_zip_changes_nothing_outside_its_folder(where, make_official, outside):
    official = make_official("tiny")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(where.format(outside=outside), b"evil")
    official.serve(buffer.getvalue())
    with pytest.raises(sources.NoRealData):
        official.load()
