"""What would give a wrong map without a sign is refused here, with what to do."""

from collections.abc import Mapping, Sequence

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


def plain_maps(maps: Tensor) -> Tensor:
    """Maps (N, h, w) as finite float32; ValueError where they are something else."""
    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, h, w), one an image, not {_kind(maps)}; of (N, K, h, w) take [:, k]")
    return finite(maps, "maps").float()


def boxes_in(size: Sequence[int], boxes: Tensor) -> Tensor:
    """`boxes`; ValueError where one is not x0, y0, x1, y1 in pixels of an image of this height and width."""
    (height, width), (x0, y0, x1, y1) = size, boxes.unbind(1)
    if not ((x0 >= 0) & (x0 <= x1) & (x1 <= width) & (y0 >= 0) & (y0 <= y1) & (y1 <= height)).all():
        raise ValueError(f"boxes must be x0, y0, x1, y1 in pixels of {height}×{width}, not {boxes[:4].tolist()}")
    return boxes


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
    softmax = values.shape[1] > 1 and (values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-3).all()
    if softmax or type(scores.grad_fn).__name__.startswith("SigmoidBackward"):
        raise ValueError("the model ends in a softmax or sigmoid; leave it out: maps explain the score before it")
    return scores


def probabilities(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax of logits (N, C) at classes (N, K): (N, K); ValueError for a network with one logit."""
    if logits.shape[1] == 1:
        raise ValueError("the softmax of one logit is always 1; of a yes-or-no network take logits.sigmoid()")
    return logits.softmax(1).gather(1, classes)


def choose_classes(logits: Tensor, classes: Classes, top_k: int = 1, categories: Sequence[str] = ()) -> Tensor:
    """The classes to explain as int64 (N, K); ValueError for what are no classes of the network."""
    n, count = logits.shape
    if classes is None:
        if not 1 <= top_k <= count:
            raise ValueError(f"top_k={top_k}, but the network has {count} classes")
        return logits.topk(top_k).indices
    chosen = classes if isinstance(classes, Tensor) else np.array(classes)
    if isinstance(chosen, np.ndarray) and chosen.dtype.kind in "UO":
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


def feature_maps(
    seen: Mapping[str, Tensor | None], model: nn.Module, shape: Sequence[int], channels_last: bool | None = None
) -> dict[str, Tensor]:
    """What was recorded of layers; ValueError where it need not be feature maps of images of this shape."""
    for name, found in seen.items():
        if found is None:
            raise ValueError(f"layer {name!r} takes no part in the forward pass")
        fits = found.ndim == 4 and len(found) == shape[0]
        if fits:
            first, last = in_proportion(found.shape[2:], shape[-2:]), in_proportion(found.shape[1:3], shape[-2:])
            mixed = last and any(type(m) is nn.LayerNorm for m in model.modules())  # Swin: which of both is it?
            fits = {None: first and not mixed, True: last, False: found.shape[2:].numel() > 1}[channels_last]
        if not fits:
            kind = f"{'(N, h, w, C)' if channels_last else '(N, C, h, w)'} of images {tuple(shape)}"
            raise ValueError(
                f"layer {name!r} gives {tuple(found.shape)}; it need not be {kind} in more than one cell: choose "
                "an earlier layer; or channels_last=True for (N, h, w, C), or False for any proportions"
            )
    return dict(seen)


def in_proportion(cells: Sequence[int], size: Sequence[int]) -> bool:
    """Are these more cells than one, in the proportions of an image? Without padding a side may lack two cells."""
    (rows, columns), (height, width) = cells, size
    return rows * columns > 1 and abs(height * columns - width * rows) <= 2 * (height + width)


def _kind(thing: object) -> str:
    kind = type(thing).__name__
    return f"{kind} {tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else f"a {kind}"
