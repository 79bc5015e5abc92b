"""Residual networks (He et al. 2015): torchvision's own classes, and where their weights come from."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import ResNet


@torch.no_grad()
def grow_depth(small: ResNet, large: ResNet) -> None:
    """Give `large` the function of `small`, a shallower network of the same widths (Net2DeeperNet,
    Chen et al. 2015, arXiv:1511.05641).

    Blocks that both have are copied; every further block of `large` becomes the identity, since its
    last batch norm is scaled to 0 and its input, out of a ReLU, is not negative. Training goes on from
    there instead of from nothing.

    Raises:
        ValueError: `small` has a parameter that `large` lacks, or of another shape.
    """
    ours, theirs = large.state_dict(), small.state_dict()
    misfits = [name for name, w in theirs.items() if name not in ours or ours[name].shape != w.shape]
    if misfits:
        raise ValueError(f"cannot grow: {misfits[0]} and {len(misfits) - 1} more do not fit the larger network")
    large.load_state_dict({**ours, **theirs})
    zero_last_norm(large, keep=set(theirs))


@torch.no_grad()
def zero_last_norm(model: ResNet, keep: set[str] = frozenset()) -> None:
    """Scale the last batch norm of every residual block to 0, but for parameters named in `keep`, so
    that a block starts as the identity (Goyal et al. 2017, sec. 5.1)."""
    for name, module in model.named_modules():
        for last in ("bn3", "bn2"):
            if hasattr(module, "conv1") and hasattr(module, last) and hasattr(module, "downsample"):
                if f"{name}.{last}.weight" not in keep:
                    nn.init.zeros_(getattr(module, last).weight)
                break
