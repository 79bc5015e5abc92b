"""Weights that ship with the project: fp16 safetensors, metadata inside, SHA-256 beside."""

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
    """A weight file is not what its committed digest says, or cannot be read."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write floating-point weights as float16 (others as they are) and `metadata` as JSON values, and
    enter the file in its folder's SHA256SUMS (the format of `sha256sum`). Both files are written before
    either is put in place; killed between those two steps, `load_weights` says that they do not match."""
    half = {
        name: (w.half() if w.is_floating_point() else w).detach().cpu().contiguous() for name, w in weights.items()
    }
    text = {key: json.dumps(value) for key, value in metadata.items()}

    def write(file: Path, sums: Path) -> None:
        save_file(half, file, text)
        digests = {**read_digests(path.parent), path.name: sha256(file)}
        sums.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{DIGESTS}.lock"):  # two processes may save at once
        save_atomically(
            lambda sums: save_atomically(lambda partial: write(partial, sums), path), path.parent / DIGESTS
        )


def read_digests(folder: Path) -> dict[str, str]:
    """File name → SHA-256 from a folder's SHA256SUMS; empty where there is none."""
    file = folder / DIGESTS
    if not file.exists():
        return {}
    return {name: digest for digest, name in (line.split() for line in file.read_text().splitlines())}


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `save_weights`; nothing is ever unpickled.

    Returns:
        The weights, floating-point ones as float32, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpoint: the file differs from its entry in SHA256SUMS, has none, or is malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; `git checkout` of {path.parent.name}/ brings it back")
    remedy = f"restore it with `git checkout -- {path.name}` in {path.parent}"
    listed, found = read_digests(path.parent).get(path.name), sha256(path)
    if listed is None:
        raise CorruptCheckpoint(f"{path.name} is not listed in {path.parent / DIGESTS}; {remedy}")
    if found != listed:
        raise CorruptCheckpoint(f"{path.name} has SHA-256 {found[:12]}…, expected {listed[:12]}…; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read ({error}); {remedy}") from error
    as_float = {name: w.float() if w.dtype == torch.float16 else w for name, w in weights.items()}
    return as_float, metadata
