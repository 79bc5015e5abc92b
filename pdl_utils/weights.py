"""Files of weights: float16 safetensors with their facts inside. Those that ship have a SHA-256 beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdl_utils.settings import REPOSITORY, save_atomically

CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
DIGESTS = "SHA256SUMS"


class CorruptCheckpoint(RuntimeError):
    """A file of weights is not what its digest says, or cannot be read."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write floating-point weights as float16 (others as they are) and `facts` as JSON values, and enter the
    file in its folder's SHA256SUMS (the format of `sha256sum`). Both files are written before either is put in
    place; killed between those two steps, `load_weights` says that they do not match."""
    half = {
        name: (w.half() if w.is_floating_point() else w).detach().cpu().contiguous() for name, w in weights.items()
    }

    def write(file: Path, sums: Path) -> None:
        save_file(half, file, {key: json.dumps(value) for key, value in facts.items()})
        digests = {**read_digests(path.parent), path.name: sha256(file)}
        sums.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())), newline="\n")

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{DIGESTS}.lock"):  # two processes may save at once
        save_atomically(
            lambda sums: save_atomically(lambda partial: write(partial, sums), path), path.parent / DIGESTS
        )


def read_digests(folder: Path) -> dict[str, str]:
    """File name → SHA-256 from a folder's SHA256SUMS; empty where there is none."""
    file = folder / DIGESTS
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: digest for digest, name in map(str.split, lines)}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of this format; nothing is ever unpickled.

    Returns:
        The weights, float16 ones as float32, and the facts.

    Raises:
        CorruptCheckpoint: the file is malformed, or a value of its metadata is not JSON.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as safetensors with JSON metadata ({error})") from error
    return {name: w.float() if w.dtype == torch.float16 else w for name, w in weights.items()}, facts


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_weights` of a file whose digest stands in its folder's SHA256SUMS.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpoint: the file differs from its entry in SHA256SUMS, has none, or is malformed.
    """
    remedy = f"`git checkout -- {path.name}` in {path.parent} brings it back"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; {remedy}")
    listed, found = read_digests(path.parent).get(path.name, "none"), sha256(path)
    if found != listed:
        raise CorruptCheckpoint(f"{path.name} has SHA-256 {found[:12]}…, {DIGESTS} says {listed[:12]}; {remedy}")
    return read_weights(path)
