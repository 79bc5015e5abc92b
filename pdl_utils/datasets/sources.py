"""Where data come from: files under the data root, else the official source, else a stand-in. What was used is
printed. PDL_DATA is the data root; PDL_OFFLINE=1 and PDL_REQUIRE_REAL=1 have the last word."""

import os
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from filelock import FileLock
from torchvision.datasets.utils import check_integrity, download_url

from pdl_utils.settings import data_root, flag

SILENCE = 10.0  # seconds without a byte after which a download has failed
_no_answer: list[str] = []  # what could not be reached: a process that was offline does not wait again


@dataclass(frozen=True)
class Provenance:
    """Origin of a data set or of weights. `real` is False for a stand-in."""

    name: str
    source: str
    real: bool = True

    @property
    def tag(self) -> str:
        """What a figure's title appends."""
        return "" if self.real else f" · stand-in for {self.name}"

    def __str__(self) -> str:
        return f"{self.name}: {self.source}"


def with_notice(name: str, source: str, folder: Path) -> Provenance:
    """Provenance of the files in `folder`, with what its NOTICE.txt says."""
    notice = folder / "NOTICE.txt"
    said = "; " + " ".join(notice.read_text("utf-8-sig", "replace").split()) if notice.is_file() else ""
    return Provenance(name, source + said)


def tell(origin: object) -> None:
    """Print where something comes from, in lines that JupyterLab does not break inside of words."""
    print(fill(str(origin), 96))


class NoRealData(RuntimeError):
    """The real data cannot be had, and a stand-in does not exist or is not allowed."""


class DamagedFile(RuntimeError):
    """A file of a data set is missing, truncated or not what it should be."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a DamagedFile that names `path`."""
    try:
        yield
    except (PermissionError, MemoryError):  # no damage
        raise
    except Exception as error:  # readers raise all kinds of things for half a file
        raise DamagedFile(f"{path} is missing or damaged ({error})") from error


def verify_md5(folder: Path, expected: Mapping[str, str]) -> None:
    """DamagedFile: the first file in `folder` that is missing or whose MD5 is not the expected one."""
    for name, md5 in expected.items():
        if not check_integrity(folder / name, md5):
            raise DamagedFile(f"{folder / name} is missing or damaged (its MD5 differs)")


def download_tar(url: str, folder: Path, md5: str) -> None:
    """Download and unpack, but only into `folder`, by the filter that is Python's default from 3.14 on."""
    download_url(url, folder, md5=md5)
    with tarfile.open(folder / Path(url).name) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # None: before 3.10.12 and 3.11.4
        tar.extractall(folder)


def obtain(
    name: str, folder: str, *, read: Callable[[Path], Any], download: Callable[[Path], object],
    stand_in: Callable[[], Any] | None = None,
) -> Any:  # fmt: skip
    """A data set or a network (it has a `provenance`) from the first source that has it. `read` checks and loads
    `folder` (or one file) under the data root, which is never changed or removed; `download` runs the official
    loader in an empty folder and leaves `folder` in it; `stand_in` serves offline."""
    place, problem = data_root() / folder, None
    if not place.exists():
        problem = "PDL_OFFLINE is set" if flag("PDL_OFFLINE") else _fetch(place, read, download)
    if problem is None:
        try:
            data = read(place)
        except DamagedFile as damage:
            raise DamagedFile(f"{damage}. Replace it, or remove {place} to download all of it again.") from damage
    else:
        data = stand_in() if stand_in else None
        if data is None or (flag("PDL_REQUIRE_REAL") and not data.provenance.real):
            accept = ", or unset PDL_REQUIRE_REAL" if data else ""
            raise NoRealData(
                f"{name}: no real data, because {problem}. Connect to the network, with PDL_OFFLINE unset, or put "
                f"the official files into {place}{accept}, and run this again."
            )
    tell(f"{data.provenance}, because {problem}" if problem else data.provenance)
    return data


def _fetch(place: Path, read: Callable[[Path], object], download: Callable[[Path], object]) -> str | None:
    """Download beside `place`, and move what `read` accepts to `place` in one step. None, or why that failed."""
    if _no_answer:
        return f"there was no network when {_no_answer[0]} was asked for; restart the kernel to ask again"
    staging, timeout = place.with_name(f".{place.name}.partial"), socket.getdefaulttimeout()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if place.exists():  # another process was faster
                return None
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
            socket.setdefaulttimeout(SILENCE)  # loaders have no parameter for it
            try:
                staging.mkdir()
                download(staging)
                read(staging / place.name)
                (staging / place.name).rename(place)
                return None
            finally:
                socket.setdefaulttimeout(timeout)
                shutil.rmtree(staging, ignore_errors=True)
    except Exception as error:  # loaders raise all kinds of things
        if isinstance(getattr(error, "reason", None), socket.gaierror | TimeoutError):  # nobody was reached
            _no_answer.append(place.name)
        if isinstance(error, OSError) and not (place.parent.is_dir() and os.access(place.parent, os.W_OK)):
            return f"{place.parent} cannot be written to ({error.strerror}); set PDL_DATA to a folder that can"
        return f"the download failed ({error})"
