"""Files of weights: safetensors with their facts inside. Those that ship have a SHA-256 beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdl_utils.settings import REPOSITORY, save_atomically

CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
DIGESTS = "SHA256SUMS"
SCALE = ".row_scale"  # ends the name of what the rows of an 8-bit tensor are multiplied by


class CorruptCheckpoint(RuntimeError):
    """A file of weights is not what its digest says, or cannot be read."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights, and `facts` as JSON values; enter the file in its folder's SHA256SUMS. A matrix or kernel
    becomes 8-bit numbers with one scale for each output (row), other floats float16; the rest stays.
    ValueError: a weight is NaN or infinite."""
    stored = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu()
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; {path} was not written")
        if weight.is_floating_point() and weight.ndim > 1:
            rows = weight.float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (outputs,)
            stored[name + SCALE] = scale
            weight = (rows / scale[:, None]).round().to(torch.int8).view(weight.shape)
        stored[name] = (weight.half() if weight.is_floating_point() else weight).contiguous()
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    save_atomically(lambda partial: save_file(stored, partial, metadata), path)
    digests = {**read_digests(path.parent), path.name: sha256(path)}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    save_atomically(lambda partial: partial.write_text(text, newline="\n"), path.parent / DIGESTS)


def read_digests(folder: Path) -> dict[str, str]:
    """File name → SHA-256 from a folder's SHA256SUMS; empty where there is none."""
    file = folder / DIGESTS
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: digest for digest, name in map(str.split, lines)}


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in float32, and the facts, of a file of this format; nothing is ever unpickled.
    CorruptCheckpoint: the file is malformed, or a value of its metadata is not JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as safetensors with JSON metadata ({error})") from error
    weights = {}
    for name, weight in stored.items():
        if name + SCALE in stored:
            weight = (weight.flatten(1) * stored[name + SCALE][:, None]).view(weight.shape)
        if not name.endswith(SCALE):
            weights[name] = weight.float() if weight.dtype == torch.float16 else weight
    return weights, facts


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_weights` of a file whose digest stands in its folder's SHA256SUMS.
    FileNotFoundError: there is none. CorruptCheckpoint: it differs from its entry, or is malformed."""
    remedy = f"`git checkout -- {path.name}` in {path.parent} brings it back"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; {remedy}")
    listed, found = read_digests(path.parent).get(path.name, "none"), sha256(path)
    if found != listed:
        raise CorruptCheckpoint(f"{path.name} has SHA-256 {found[:12]}…, {DIGESTS} says {listed[:12]}; {remedy}")
    return read_weights(path)
