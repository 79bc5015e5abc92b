"""Files of weights: safetensors with their facts inside. Those that ship have a SHA-256 beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pdl_utils.settings import REPOSITORY, save_atomically

CHECKPOINTS = REPOSITORY / "data" / "checkpoints"
DIGESTS = "SHA256SUMS"  # in the same folder; a line is a digest and a file's name
SCALE = ".row_scale"  # ends the name of what the rows of an 8-bit tensor are multiplied by


class CorruptCheckpoint(RuntimeError):
    """A file of weights is not what its digest says, or cannot be read."""


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_lines(folder: Path) -> list[str]:
    """The lines of a folder's SHA256SUMS, if there is one."""
    return (folder / DIGESTS).read_text().splitlines() if (folder / DIGESTS).exists() else []


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights, and `facts` as JSON values; enter the file in its folder's SHA256SUMS. A matrix or kernel
    becomes 8-bit numbers with one scale for each output (row); the rest stays."""
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
        stored[name] = weight.clone(memory_format=torch.contiguous_format)  # layers may share one
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    content = save(stored, metadata)  # its own way to write hides a full disk behind another error
    save_atomically(lambda partial: partial.write_bytes(content), path)
    others = [line for line in digest_lines(path.parent) if not line.endswith(f"  {path.name}")]
    text = "\n".join([*others, f"{sha256(path)}  {path.name}", ""])
    save_atomically(lambda partial: partial.write_text(text, newline="\n"), path.parent / DIGESTS)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in float32, and the facts, of a file of this format; nothing is ever unpickled."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as safetensors with JSON metadata ({error})") from error
    weights = {name: weight for name, weight in stored.items() if not name.endswith(SCALE)}
    for name, weight in weights.items():
        if name + SCALE in stored:
            weights[name] = (weight.flatten(1) * stored[name + SCALE][:, None]).view(weight.shape)
        elif weight.is_floating_point():
            weights[name] = weight.float()
    return weights, facts


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_weights` of a file that is what its folder's SHA256SUMS says."""
    if not path.exists() or f"{sha256(path)}  {path.name}" not in digest_lines(path.parent):
        remedy = f"`git checkout -- {path.name}` in {path.parent} brings it back"
        raise CorruptCheckpoint(f"{path.name} is missing, or not the file that {DIGESTS} lists; {remedy}")
    return read_weights(path)
