"""Real data first, never silently something else.

`obtain` is the one place that decides where a data set comes from: verified files under the data root,
else the official source through the official loader, else an offline stand-in. It prints what it used.
The environment has the last word:

    PDL_DATA=folder       the data root (default: `data/` of the checkout)
    PDL_OFFLINE=1         leave the network alone
    PDL_REQUIRE_REAL=1    a stand-in is an error
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock
from torchvision.datasets.utils import check_md5

from pdl_utils.datasets.network import careful_downloads, network_problem
from pdl_utils.settings import data_root, flag

ATTEMPTS = 3
PAUSE = 1.0  # seconds between two attempts


@dataclass(frozen=True)
class Provenance:
    """Origin of a data set or of weights.

    Attributes:
        name: what it is, "CIFAR-10".
        source: where it came from, "official files" or "stand-in: crops of sample photographs".
        real: False for a stand-in.
    """

    name: str
    source: str
    real: bool = True

    @property
    def tag(self) -> str:
        """What a figure's title appends: nothing for real data, a plain word for a stand-in."""
        return "" if self.real else f" · stand-in for {self.name}"

    def __str__(self) -> str:
        return f"{self.name}: {self.source}"


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
        self.path = path


def obtain(
    name: str,
    folder: str,
    *,
    read: Callable[[Path], T],
    download: Callable[[Path], object],
    url: str,
    stand_in: Callable[[], T] | None = None,
    root: Path | None = None,
) -> T:
    """Get a data set from the first source that has it, and print which that was.

    Args:
        name: what people call it, "CIFAR-10".
        folder: where its files live, directly below the data root (or its only file); what `download`
            creates.
        read: `read(root / folder)` checks the files and loads them. It raises `DamagedFile` for one that
            is missing or wrong; that file is named and removed, and the data set fetched again.
        download: `download(root)` runs the official loader, which creates `root / folder`. It works in
            a folder of its own; only what `read` then accepts is moved to the data root, in one step.
        url: what the loader fetches, or part of it: its host is asked whether there is a network.
        stand_in: makes what serves offline; None if there is nothing. Weights that were trained on real
            data say so in their provenance and satisfy `PDL_REQUIRE_REAL` too.
        root: the data root, if not `data_root()`.

    Raises:
        NoRealData: neither files nor network, and no stand-in or `PDL_REQUIRE_REAL=1`. Says what to do.
    """
    place = (root or data_root()) / folder
    reason = ""
    try:
        data = _read_or_fetch(name, place, read, download, url)
    except _Unavailable as error:
        data, reason = stand_in() if stand_in else None, f", because {error}"
        if data is None or (not data.provenance.real and flag("PDL_REQUIRE_REAL")):
            unset = " or unset PDL_REQUIRE_REAL to accept the stand-in," if data else ""
            raise NoRealData(
                f"{name}: no real data, because {error}. Connect to the network, with PDL_OFFLINE unset, "
                f"or put the official files into {place},{unset} and run this again."
            ) from None
    print(f"{data.provenance}{reason}")
    return data


class _Unavailable(Exception):
    """Why the real data cannot be had, to follow 'because'."""


def _read_or_fetch(
    name: str, place: Path, read: Callable[[Path], T], download: Callable[[Path], object], url: str
) -> T:
    if place.exists():
        try:
            return read(place)
        except DamagedFile as damage:
            print(f"{name}: {damage}{_remove(damage.path)}")
    if problem := network_problem(url):
        raise _Unavailable(problem)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            if place.exists():  # another process may have been faster
                with contextlib.suppress(DamagedFile):
                    return read(place)
            return _fetch(name, place, read, download, url)
    except OSError as error:
        raise _Unavailable(f"{place.parent} cannot be written to ({error})") from error


def _fetch(name: str, place: Path, read: Callable[[Path], T], download: Callable[[Path], object], url: str) -> T:
    """Download into a folder beside `place` and check it there, so that `place` is whole or absent."""
    staging = place.with_name(f".{place.name}.partial")
    for attempt in range(1, ATTEMPTS + 1):
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir()
        try:
            with careful_downloads():
                download(staging)
            data = read(staging / place.name)
            shutil.rmtree(place, ignore_errors=True)
            (staging / place.name).replace(place)
            return data
        except Exception as error:  # loaders raise all kinds of things for half a file
            print(f"{name}: attempt {attempt} of {ATTEMPTS} at {url}{_last_file(staging)} failed: {error}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if attempt < ATTEMPTS:
            time.sleep(PAUSE)
    raise _Unavailable(f"the download of {url} failed {ATTEMPTS} times")


def _last_file(folder: Path) -> str:
    """The file that a loader wrote last, which the caller removes, in words."""
    files = sorted((path.stat().st_mtime_ns, path.name) for path in folder.rglob("*") if path.is_file())
    return f" ({files[-1][1]}, removed)" if files else ""


def _remove(path: Path) -> str:
    """Remove a damaged file, if it is one; the words that say what became of it."""
    if not path.is_file():
        return ""
    try:
        path.unlink()
    except OSError:
        return ", but cannot be removed"
    return " and was removed"


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
