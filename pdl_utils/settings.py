"""How large an experiment is, where it runs, in which precision, from which seed, and where files lie."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# The checkout that this package is installed from (`pip install -e .`): data/ and figures/ live there.
REPOSITORY = Path(__file__).resolve().parent.parent


def variable(name: str) -> str:
    """The environment variable `name`, without the quotes that Jupyter's %env keeps; "" where it is not set."""
    return os.environ.get(name, "").strip(" \t\r\n\"'")


def get_profile(name: str | None = None) -> tuple[str, str]:
    """`fast` (a laptop's CPU, minutes) or `full` (a GPU, or patience), and why: as `name` says, or `PDL_PROFILE`,
    or `full` where a GPU is found. ValueError: it is neither `fast` nor `full`."""
    asked = variable("PDL_PROFILE")
    chosen = (name or asked).strip().lower()
    if chosen in ("fast", "full"):
        return chosen, "chosen here" if name else f"PDL_PROFILE={asked}"
    if chosen:
        raise ValueError(f"profile {chosen!r}: set it, or PDL_PROFILE, to 'fast' or 'full', or leave both out")
    if torch.cuda.is_available():
        return "full", "a GPU was found; PDL_PROFILE=fast makes it short"
    return "fast", "no GPU was found; PDL_PROFILE=full runs the whole experiment"


def pick_device() -> torch.device:
    """The device experiments run on: `PDL_DEVICE` if set, else CUDA where found, else the CPU.
    ValueError: `PDL_DEVICE` names no torch device, or one that is not on this machine."""
    name = variable("PDL_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"PDL_DEVICE={name!r} is no device of this machine; try 'cpu' ({error})") from error


def device_name(device: torch.device) -> str:
    """'NVIDIA H100 80GB HBM3', or 'CPU, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{device.type.upper()}, {count} thread{'s' if count > 1 else ''}"


def has_bfloat16(device: torch.device) -> bool:
    """Has the device instructions for bfloat16? Without them it is emulated, and several times slower than
    float32. For training only: what is reported is computed in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # from NVIDIA's Ampere on
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False  # also where ATEN_CPU_CAPABILITY asks torch for less than there is
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries we call draw from the global state)
    torch.manual_seed(seed)


def flag(name: str, default: str = "0") -> bool:
    """Is the environment variable `name` on? 0, false, no and off are not; empty or unset means `default`."""
    return (variable(name).lower() or default) not in ("0", "false", "no", "off")


def progress_wanted() -> bool:
    """Show progress bars, unless `PDL_PROGRESS` is switched off?"""
    return flag("PDL_PROGRESS", default="1")


def data_root() -> Path:
    """The folder of data and kept trainings: `PDL_DATA`, from the checkout if it is relative; else its `data/`."""
    return REPOSITORY / Path(variable("PDL_DATA") or "data").expanduser()


def save_atomically(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step: nobody ever meets half a
    file, and a failed write leaves nothing behind. OSError: `path` cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or the new name may reach the disk before the content
        partial.chmod(0o644)  # some writers make files that only their owner may read
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        remedy = "is the disk full, or the folder read-only? PDL_DATA and PDL_FIGURES name other folders"
        raise OSError(f"{path} cannot be written; {remedy} ({error})") from error
    finally:
        if partial.exists():
            partial.unlink()
