"""Where data, weights and numbers come from, in words that reach every table and figure."""

from __future__ import annotations

import platform

import torch
import torchvision

from pdl_utils.datasets.sources import Provenance
from pdl_utils.settings import Profile

RUN_TABLE = "| run | with |"  # head of the table that `describe_run` makes


def device_name(device: torch.device) -> str:
    """'NVIDIA H100 80GB HBM3', or 'CPU, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def describe_run(profile: Profile, device: torch.device, *origins: Provenance) -> str:
    """A Markdown table of what a notebook was run with: profile, device, versions, data, weights."""
    rows = [
        ("profile", str(profile)),
        ("device", device_name(device)),
        ("versions", f"Python {platform.python_version()}, torch {torch.__version__}, "
                     f"torchvision {torchvision.__version__}"),
        *((origin.name, origin.source) for origin in origins),
    ]  # fmt: skip
    return "\n".join([RUN_TABLE, "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
