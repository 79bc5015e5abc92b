"""Where data, weights and numbers come from, in words that reach every table and figure."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import torchvision

from pdl_utils.settings import Profile

RUN_TABLE = "| run | with |"  # head of the table that `describe_run` makes


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
