"""How large an experiment is, where it runs, in which precision, from which seed, and where files lie."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

# The checkout that this package is installed from (`pip install -e .`): data/ and figures/ live there.
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Profile:
    """`fast` (a laptop's CPU, minutes) or `full` (a GPU, or patience), and why it was chosen.

    The code of an experiment is the same in both; only sizes and the floors of its claims differ:

    >>> epochs = profile.choose(fast=3, full=60)
    """

    name: str
    reason: str

    def choose(self, *, fast: T, full: T) -> T:
        """The value that belongs to this profile."""
        return full if self.name == "full" else fast

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def get_profile() -> Profile:
    """The profile from `PDL_PROFILE`; unset, `full` where a GPU is found and `fast` otherwise.

    Raises:
        ValueError: `PDL_PROFILE` is neither `fast` nor `full`.
    """
    name = os.environ.get("PDL_PROFILE", "").strip().lower()
    if name in ("fast", "full"):
        return Profile(name, f"PDL_PROFILE={name}")
    if name:
        raise ValueError(f"PDL_PROFILE={name!r}: set it to 'fast' or 'full', or unset it")
    if torch.cuda.is_available():
        return Profile("full", "a GPU was found; PDL_PROFILE=fast makes it short")
    return Profile("fast", "no GPU was found; PDL_PROFILE=full runs the whole experiment")


def pick_device() -> torch.device:
    """The device experiments run on: `PDL_DEVICE` if set, else CUDA where found, else the CPU.

    Raises:
        ValueError: `PDL_DEVICE` is not the name of a torch device.
    """
    name = os.environ.get("PDL_DEVICE", "").strip()
    if name:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"PDL_DEVICE={name!r} is not a torch device; try 'cpu' or 'cuda'") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """'NVIDIA H100 80GB HBM3', or 'CPU, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"


@cache
def bfloat16_is_faster(device: torch.device) -> bool:
    """Does a training step of a small convolution take less time in bfloat16 autocast than in float32?

    A processor without bfloat16 instructions emulates them, and is several times slower with them. Measured
    once a process for each device, in a fraction of a second. For training only: what is reported is
    computed in float32.
    """
    float32 = _step_seconds(device, autocast=False)
    return _step_seconds(device, autocast=True, patience=10 * float32) < 0.9 * float32


def _step_seconds(device: torch.device, *, autocast: bool, patience: float = 1.0) -> float:
    """Shortest time of up to six forward and backward passes of a 3×3 convolution, after one to warm up; none
    is repeated after one that took longer than `patience` seconds."""
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    images = torch.ones(8, 64, 16, 16, device=device)
    seconds: list[float] = []
    while len(seconds) < 7 and (len(seconds) < 2 or seconds[-1] < patience):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = convolution(images).float().sum()
        loss.backward()
        convolution.weight.grad[0, 0, 0, 0].item()  # a GPU has finished when a number of it is read
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries we call draw from the global state)
    torch.manual_seed(seed)


def flag(name: str) -> bool:
    """Is the environment variable `name` switched on? Unset, empty, 0, false, no and off are not."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def progress_wanted() -> bool:
    """Show progress bars, unless `PDL_PROGRESS=0`?"""
    return os.environ.get("PDL_PROGRESS", "1") != "0"


def data_root() -> Path:
    """`PDL_DATA` if set; else `data/` of the checkout that this package is installed from, whatever the
    current folder is; else (a package copied into site-packages) a folder in the user's cache."""
    if named := os.environ.get("PDL_DATA", "").strip():
        return Path(named).expanduser().absolute()
    checked_out = (REPOSITORY / "pyproject.toml").exists()
    return REPOSITORY / "data" if checked_out else Path.home() / ".cache" / "pdl-utils"


def save_atomically(write: Callable[[Path], None], path: Path) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step, so that no
    reader and no later run ever meets half a file, not even after a power cut; a failed write leaves
    nothing behind.

    Raises:
        OSError: there is no space, or `path` may not be written; also in place of a RuntimeError of `write`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or the new name may reach the disk before the content
        partial.chmod(0o644)  # some writers make files that only their owner may read
        partial.replace(path)
    except RuntimeError as error:  # torch's, which names neither the file nor the cause
        raise OSError(f"{path} cannot be written; is the disk full? ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    """Write `text` as UTF-8, whole or not at all; raises what `save_atomically` does."""
    save_atomically(lambda partial: partial.write_text(text, encoding="utf-8"), path)
