"""`obtain`, the one place that decides where a data set comes from: verified files under the data root, else the
official source through the official loader, else an offline stand-in. It prints what it used.
The environment has the last word:

    PDL_DATA=folder       the data root (default: `data/` of the checkout)
    PDL_OFFLINE=1         leave the network alone
    PDL_REQUIRE_REAL=1    a stand-in is an error
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock
from torchvision.datasets.utils import check_md5

from pdl_utils.settings import data_root, flag

ATTEMPTS = 3
PAUSE = 1.0  # seconds between two attempts
STALL = 20.0  # seconds without a byte after which a download has failed
PATIENCE = 4.0  # seconds for all silent hosts together: offline, six data sets must not wait six times


@dataclass(frozen=True)
class Provenance:
    """Origin of a data set or of weights: "CIFAR-10", "official files". `real` is False for a stand-in."""

    name: str
    source: str
    real: bool = True

    @property
    def tag(self) -> str:
        """What a figure's title appends: nothing for real data, a plain word for a stand-in."""
        return "" if self.real else f" · stand-in for {self.name}"

    def __str__(self) -> str:
        return f"{self.name}: {self.source}"


def with_notice(name: str, source: str, folder: Path) -> Provenance:
    """Provenance of the files in `folder`. What its NOTICE.txt says, if there is one, is part of it."""
    notice = folder / "NOTICE.txt"
    if notice.is_file():
        source += "; " + " ".join(notice.read_text(encoding="utf-8").split())
    return Provenance(name, source)


class Sourced(Protocol):
    """A data set that knows where it came from."""

    @property
    def provenance(self) -> Provenance: ...


T = TypeVar("T", bound=Sourced)


class NoRealData(RuntimeError):
    """The real data cannot be had, and a stand-in does not exist or is not allowed."""


class DamagedFile(Exception):
    """A file of a data set is missing, truncated or not what it should be."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}")


def obtain(
    name: str,
    folder: str,
    *,
    read: Callable[[Path], T],
    download: Callable[[Path], object],
    url: str,
    stand_in: Callable[[], T] | None = None,
) -> T:
    """Get a data set from the first source that has it, and print which that was.

    Args:
        name: what people call it, "CIFAR-10".
        folder: its folder (or its only file) below the data root; what `download` creates.
        read: `read(root / folder)` checks the files and loads them. It raises `DamagedFile` for one that
            is missing or wrong; that file is named, and the data set fetched again.
        download: `download(root)` runs the official loader in a folder of its own; only what `read` then
            accepts is moved to the data root, in one step.
        url: what the loader fetches, or part of it: its host is asked whether there is a network.
        stand_in: makes what serves offline, if anything does. It satisfies `PDL_REQUIRE_REAL` if its
            provenance is real: weights that were trained on real data.

    Raises:
        NoRealData: neither files nor network, and no stand-in or `PDL_REQUIRE_REAL=1`. Says what to do.
    """
    place, problem, data = data_root() / folder, None, None
    try:
        data = read(place) if place.exists() else None
    except DamagedFile as damage:
        print(f"{name}: {damage}")
    if data is None and not (problem := network_problem(url)):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(place.parent / f".{place.name}.lock"):
                data = _fetch(name, place, read, download, url)
            problem = f"the download of {url} failed {ATTEMPTS} times"
        except OSError as error:
            problem = f"{place.parent} cannot be written to ({error})"
    if data is not None:
        print(data.provenance)
        return data
    data = stand_in() if stand_in else None
    if data is None or (not data.provenance.real and flag("PDL_REQUIRE_REAL")):
        unset = " or unset PDL_REQUIRE_REAL to accept the stand-in," if data else ""
        raise NoRealData(
            f"{name}: no real data, because {problem}. Connect to the network, with PDL_OFFLINE unset, "
            f"or put the official files into {place},{unset} and run this again."
        )
    print(f"{data.provenance}, because {problem}")
    return data


def _fetch(
    name: str, place: Path, read: Callable[[Path], T], download: Callable[[Path], object], url: str
) -> T | None:
    """Download into a folder beside `place` and check it there, so that `place` is whole or absent."""
    if place.exists():  # another process may have been faster
        with contextlib.suppress(DamagedFile):
            return read(place)
    staging = place.with_name(f".{place.name}.partial")
    for attempt in range(1, ATTEMPTS + 1):
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir()
        try:
            with careful_downloads():
                download(staging)
            data = read(staging / place.name)
            shutil.rmtree(place, ignore_errors=True)  # damaged; if it is a file, the next line replaces it
            (staging / place.name).replace(place)
            return data
        except Exception as error:  # loaders raise all kinds of things for half a file
            files = sorted((path.stat().st_mtime_ns, path.name) for path in staging.rglob("*") if path.is_file())
            last = f" ({files[-1][1]})" if files else ""
            print(f"{name}: attempt {attempt} of {ATTEMPTS} at {url}{last} failed and was removed: {error}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if attempt < ATTEMPTS:
            time.sleep(PAUSE)
    return None


def verify_md5(folder: Path, expected: Mapping[str, str]) -> None:
    """Check that `folder` has every file that `expected` names, with that MD5.

    Raises:
        DamagedFile: at the first that is missing or differs.
    """
    for name, md5 in expected.items():
        if not (folder / name).is_file():
            raise DamagedFile(folder / name, "is missing")
        if not check_md5(folder / name, md5):
            raise DamagedFile(folder / name, "is truncated or corrupt (its MD5 differs)")


@contextlib.contextmanager
def careful_downloads() -> Iterator[None]:
    """Inside, a download that stalls raises instead of hanging, and tar files cannot write outside their
    folder: loaders have no parameter for the one, and old ones do not see to the other."""
    timeout, extraction = socket.getdefaulttimeout(), getattr(tarfile.TarFile, "extraction_filter", None)
    socket.setdefaulttimeout(STALL)
    if hasattr(tarfile, "data_filter"):
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)
        tarfile.TarFile.extraction_filter = staticmethod(extraction) if extraction else None


_tried: dict[tuple[str, int], float | None] = {}  # (host, port) → seconds it was silent, None if it answered


def _answers(host: str, port: int) -> bool:
    """Does the host accept a connection? Each is tried once."""
    if (host, port) not in _tried:
        limit = max(0.0, min(PATIENCE / 2, PATIENCE - sum(filter(None, _tried.values()))))
        connected = threading.Event()

        def connect() -> None:
            # Half the limit, so that an address family that leads nowhere leaves time for the other.
            with contextlib.suppress(OSError), socket.create_connection((host, port), limit / 2):
                connected.set()

        # In a thread, because looking up a name takes no time-out and may hang for half a minute.
        started = time.monotonic()
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(limit)
        _tried[host, port] = None if connected.is_set() else time.monotonic() - started
    return _tried[host, port] is None


def network_problem(url: str) -> str | None:
    """Why `url` cannot be fetched, in words that follow 'because', or None if its host, or the proxy that the
    environment names, answers. A process that was offline stays so: restart the kernel to look again."""
    if flag("PDL_OFFLINE"):
        return "PDL_OFFLINE is set"
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or {"http": 80, "https": 443}[target.scheme]
    if not _answers(target.hostname, port):
        return f"{target.hostname} does not answer (no network?)"
    return None
