"""What would give a wrong map without a sign is refused here, with what to do."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pdl_utils.resnet import find_class

Classes = int | str | Sequence[int] | Sequence[str] | Tensor | None


def finite(values: Tensor, what: str) -> Tensor:
    """`values`; ValueError where one is NaN or infinite."""
    if not values.isfinite().all():
        raise ValueError(f"{what}: a value is NaN or infinite; look at the images and weights behind it")
    return values


def float_batch(images: Tensor) -> Tensor:
    """A copy of images (N, C, H, W) without history; ValueError where they are no batch of floats."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images) or not images.is_floating_point():
        wanted = "images must be floats (N, C, H, W), preprocessed for the network"
        raise ValueError(f"{wanted}, not {_kind(images)}; one image is a batch as image[None]")
    return images.detach().clone()


def class_scores(model: nn.Module, images: Tensor) -> Tensor:
    """The model's scores (N, C); ValueError where it gives something else."""
    scores = model(images)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
        remedy = "wrap it in a module whose forward picks that, as in `return self.model(images)['logits']`"
        raise ValueError(f"the model must return one tensor (N, classes), not {_kind(scores)}; {remedy}")
    values = finite(scores.detach(), "the model's scores")
    if values.shape[1] > 1 and (values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-3).all():
        raise ValueError("the model ends in a softmax; a map explains the score before it: leave it out")
    return scores


def choose_classes(logits: Tensor, classes: Classes, top_k: int = 1, categories: Sequence[str] = ()) -> Tensor:
    """The classes to explain as int64 (N, K); ValueError for what are no classes of the network."""
    n, count = logits.shape
    if classes is None:
        if not 1 <= top_k <= count:
            raise ValueError(f"top_k={top_k}, but the network has {count} classes")
        return logits.topk(top_k).indices
    chosen = classes if isinstance(classes, Tensor) else np.asarray(classes)
    if isinstance(chosen, np.ndarray) and chosen.dtype.kind == "U":
        chosen = np.reshape([find_class(str(name), categories) for name in chosen.flat], chosen.shape)
    chosen = torch.as_tensor(chosen, device=logits.device)
    chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
    integers = not chosen.is_floating_point() and chosen.dtype != torch.bool
    fits = integers and chosen.ndim <= 2 and len(chosen) == n and chosen.numel() > 0
    if fits:
        chosen = chosen.reshape(n, -1).long()
        one_hot = chosen.shape[1] == count > 2 and (chosen <= 1).all()
        fits = not one_hot and ((chosen >= 0) & (chosen < count)).all()
    if not fits:
        raise ValueError(
            f"classes are {classes}; for {n} images give one number from 0 to {count - 1}, or the name of one "
            f"of the model's `categories`, or ({n},) or ({n}, K) of these; of one-hot rows take .argmax(1)"
        )
    return chosen


def feature_maps(seen: Tensor | None, name: str, size: Sequence[int], channels_last: bool | None) -> Tensor:
    """What was recorded of a layer; ValueError where it cannot be feature maps of images of this size."""
    if seen is None:
        raise ValueError(f"layer {name!r} takes no part in the forward pass")
    cells = seen.shape[1:3] if channels_last else seen.shape[2:]
    fits = seen.ndim == 4 and cells.numel() > 1
    if fits and channels_last is not False:  # convolutions without padding may take two cells of a side
        fits = abs(size[0] * cells[1] - size[1] * cells[0]) <= 2 * sum(size)
    if not fits:
        raise ValueError(
            f"layer {name!r} gives {tuple(seen.shape)}, which cannot be "
            f"{'(N, h, w, C)' if channels_last else '(N, C, h, w)'} of images of {size[0]}×{size[1]} in more than "
            "one cell: choose an earlier layer; or channels_last=True for (N, h, w, C), False for any proportions"
        )
    return seen


def _kind(thing: object) -> str:
    kind = type(thing).__name__
    return f"{kind} {tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else f"a {kind}"
