"""What would give a wrong map without a sign is refused here, with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor, nn

from pdl_utils.resnet import find_class

Classes = int | str | Sequence[int] | Sequence[str] | Tensor | None
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def finite(values: Tensor, what: str) -> Tensor:
    """`values`; ValueError where one is NaN or infinite."""
    if not values.isfinite().all():
        raise ValueError(f"{what}: a value is NaN or infinite; look at the images and weights behind it")
    return values


def float_batch(images: Tensor) -> Tensor:
    """A copy of images (N, C, H, W) without history; ValueError where they are no batch of floats."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images must be a batch of floats (N, C, H, W), preprocessed for the network, not {_kind(images)}; "
            "one image is a batch as image[None]"
        )
    return images.detach().clone()


def class_scores(model: nn.Module, images: Tensor) -> Tensor:
    """The model's scores (N, C); ValueError where it gives something else."""
    scores = model(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
        raise ValueError(
            f"the model must return one tensor (N, classes), not {_kind(scores)}; wrap it in a module whose "
            "forward picks that tensor, as in `return self.model(images)['logits']`"
        )
    values = finite(scores.detach(), "the model's scores")
    if values.shape[1] > 1 and bool((values >= 0).all() & ((values.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("the model ends in a softmax; a map explains the score before it: leave it out")
    return scores


def choose_classes(logits: Tensor, classes: Classes, top_k: int = 1, categories: Sequence[str] = ()) -> Tensor:
    """The classes to explain as int64 (N, K); ValueError for what are no classes of the network."""
    n, count = logits.shape
    if classes is None:
        if not 1 <= top_k <= count:
            raise ValueError(f"top_k={top_k}, but the network has {count} classes")
        return logits.topk(top_k).indices
    if not isinstance(classes, Tensor) and np.asarray(classes).dtype.kind == "U":
        named = np.asarray(classes)
        numbers = [find_class(str(name), categories) for name in named.flat]
        if None in numbers:
            name = str(named.flat[numbers.index(None)])
            similar = ", ".join(get_close_matches(name, categories)) or "its number"
            raise ValueError(f"no class, or more than one, has the name {name!r}; try {similar}")
        classes = np.reshape(numbers, named.shape)
    chosen = torch.as_tensor(classes, device=logits.device)
    chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
    chosen = chosen.unsqueeze(1) if chosen.ndim == 1 else chosen
    if chosen.ndim != 2 or len(chosen) != n or not chosen.shape[1] or chosen.dtype not in INTEGERS:
        raise ValueError(
            f"classes are {classes}; for {n} images give one integer, ({n},) or ({n}, K) of them; "
            "of one-hot rows take .argmax(1)"
        )
    if ((chosen < 0) | (chosen >= count)).any():
        raise ValueError(f"the model has classes 0 to {count - 1}, and no class {chosen.unique().tolist()}")
    if chosen.shape[1] == count > 2 and (chosen <= 1).all():
        raise ValueError("one-hot rows would be read as the classes 0 and 1; take .argmax(1)")
    return chosen.long()


def feature_maps(seen: dict[str, Tensor], name: str, size: tuple[int, int], channels_last: bool | None) -> Tensor:
    """What was recorded of a layer; ValueError where it cannot be feature maps of images of this size."""
    if name not in seen:
        raise ValueError(f"layer {name!r} takes no part in the forward pass")
    shape = tuple(seen[name].shape)
    height, width = shape[1:3] if channels_last else shape[-2:]
    if len(shape) != 4 or height == width == 1:
        raise ValueError(
            f"layer {name!r} gives shape {shape}; a map needs (N, C, h, w) with more than one cell: choose an "
            "earlier layer, or larger images"
        )
    # Feature maps have the proportions of the images; convolutions without padding may take two cells of a side.
    wide = size[0] * (width - 2) > size[1] * (height + 2)
    high = size[1] * (height - 2) > size[0] * (width + 2)
    if (wide or high) and channels_last is not False:
        order = "(N, h, w, C)" if channels_last else "(N, C, h, w)"
        raise ValueError(
            f"layer {name!r} gives shape {shape}, which cannot be {order} of images of {size[0]}×{size[1]}; "
            "channels_last=True reads (N, h, w, C), channels_last=False takes it as (N, C, h, w) all the same"
        )
    return seen[name]


def _kind(thing: object) -> str:
    kind = type(thing).__name__
    return f"{kind} {tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else f"a {kind}"
