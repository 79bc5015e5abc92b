"""Is the map right? Measures that can say no.

Boxes: Zhang et al. 2016 (pointing game, arXiv:1608.00507) and Wang et al. 2020 (energy in the box,
arXiv:1910.01279). Pixels: Petsiuk et al. 2018 (insertion and deletion, arXiv:1806.07421). Weights:
Adebayo et al. 2018 (cascading randomisation, arXiv:1810.03292).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from pdl_utils.grad_cam.hooks import evaluating, find_layer, record_activations

Interval = tuple[float, float, float]  # mean, and the two ends of its 95% interval


def match_classes(names: Sequence[str | None], class_of: Callable[[str], int | None]) -> tuple[Tensor, Tensor]:
    """The classes of a network that belong to the labels of a data set.

    Args:
        names: what each of N images shows, None where that is not known; of synonyms, "goldfish, Carassius
            auratus", the first counts.
        class_of: name → class, or None where the network has no such class: `PretrainedNetwork.class_of`.

    Returns:
        classes, int64 (N,), -1 where there is none; known, boolean (N,).
    """
    found = {name: class_of(name.split(",")[0]) for name in set(names) if name}
    numbers = [-1 if found.get(name) is None else found[name] for name in names]
    classes = torch.tensor(numbers, dtype=torch.int64)
    return classes, classes >= 0


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boolean (N, h, w), True inside boxes (N, 4) of x0, y0, x1, y1 in pixels, both ends inside."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(1)
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    rows, columns = (y >= y0) & (y <= y1), (x >= x0) & (x <= x1)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def pointing_game(maps: Tensor, boxes: Tensor) -> Tensor:
    """Does the map's highest pixel lie in the box?

    Args:
        maps: (N, h, w), at the resolution that the boxes are given in.
        boxes: integers (N, 4), x0, y0, x1, y1 in pixels, both ends inside.

    Returns:
        Boolean (N,). A map without any positive value points nowhere: a miss.
    """
    inside = box_masks(boxes, maps.shape[-2:]).flatten(1)
    peak = maps.flatten(1).max(1)
    return inside.gather(1, peak.indices.unsqueeze(1)).squeeze(1) & (peak.values > 0)


def energy_in_box(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of the map's sum that lies in the box, (N,) in 0..1; 0 for a map of zeros.

    Takes what `pointing_game` takes; negative values count as 0.
    """
    positive = maps.clamp(min=0)
    inside = (positive * box_masks(boxes, maps.shape[-2:])).sum((1, 2))
    return inside / positive.sum((1, 2)).clamp(min=torch.finfo(positive.dtype).tiny)


def mean_interval(values: Tensor) -> Interval:
    """Mean of (N,) with its 95% percentile bootstrap interval over the N, from 2,000 draws: (mean, low, high)."""
    sample = values.double().cpu().numpy()
    rows = np.random.default_rng(0).integers(len(sample), size=(2000, len(sample)))
    low, high = np.quantile(sample[rows].mean(1), (0.025, 0.975))
    return float(sample.mean()), float(low), float(high)


def score_boxes(maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, tuple[Interval, Interval]]:
    """Pointing game and energy of several kinds of maps on the same images, beside two baselines.

    Args:
        maps: name → (N, h, w).
        boxes: integers (N, 4), as `pointing_game` takes them.

    Returns:
        Name → (pointing, energy), each a mean over images with its 95% interval. "anywhere" points at a random
        pixel or spreads its sum evenly: both give the share of the image that the box covers. "centre point" is
        the pixel in the middle.
    """
    size = next(iter(maps.values())).shape[-2:]
    area = mean_interval(box_masks(boxes, size).float().mean((1, 2)))
    centre = torch.zeros(len(boxes), *size, device=boxes.device)
    centre[:, size[0] // 2, size[1] // 2] = 1
    scores = {"anywhere": (area, area)}
    for name, m in {"centre point": centre, **maps}.items():
        scores[name] = mean_interval(pointing_game(m, boxes)), mean_interval(energy_in_box(m, boxes))
    return scores


def receptive_fields(
    model: nn.Module, images: Tensor, layers: Sequence[str], share: float = 0.9
) -> dict[str, float]:
    """Side in pixels of what a unit in the middle of a layer sees (Luo et al. 2016, arXiv:1701.04128).

    The gradient of that unit, summed over channels, with respect to images (N, C, H, W) says which pixels
    matter; the side is that of the span, across columns, which holds `share` of its absolute values.
    """
    sides = {}
    with evaluating(model), record_activations(model, layers) as seen:
        pixels = images.detach().clone().requires_grad_()
        model(pixels)
        for layer in layers:
            rows, columns = seen[layer].shape[-2:]
            unit = seen[layer][:, :, rows // 2, columns // 2].sum()
            (gradient,) = torch.autograd.grad(unit, pixels, retain_graph=True)
            mass = gradient.abs().sum((0, 1, 2)).cumsum(0)
            ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], device=mass.device) * mass[-1]
            first, last = torch.searchsorted(mass, ends).tolist()
            sides[layer] = float(last - first + 1)
    return sides


@dataclass
class PixelCurves:
    """`insertion` and `deletion`: (N, steps + 1), the class's probability while pixels come and go,
    most important first; `share`: (steps + 1,), the share of pixels changed, 0 to 1."""

    share: Tensor
    insertion: Tensor
    deletion: Tensor

    def areas(self) -> tuple[Tensor, Tensor]:
        """Areas under both curves, (N,) each in 0..1: insertion should be large, deletion small."""
        return torch.trapezoid(self.insertion, self.share), torch.trapezoid(self.deletion, self.share)


def insertion_deletion(
    model: nn.Module, images: Tensor, maps: Tensor, classes: Tensor, *, steps: int = 28, blur: float = 10.0
) -> PixelCurves:
    """Insertion: start from a blurred image and bring its pixels back, most important first. Deletion:
    start from the image and set its pixels to 0, the mean colour of normalised images.

    Args:
        model: images (N, C, H, W) → scores (N, classes); evaluated in eval mode.
        images: normalised float images (N, C, H, W).
        maps: importance of pixels (N, H, W).
        classes: int64 (N,), whose probability is followed.
        steps: in how many equal steps the pixels are changed.
        blur: standard deviation in pixels of the Gaussian blur from which insertion starts.
    """
    n, _, height, width = images.shape
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1).view(n, 1, height, width)  # 0 for the most important pixel
    blurred = gaussian_blur(images, 2 * round(3 * blur) + 1, blur)
    share = torch.linspace(0, 1, steps + 1, device=images.device)
    insertion, deletion = [], []
    with evaluating(model), torch.no_grad():
        for part in share:
            changed = rank < torch.round(part * height * width)
            inserted, deleted = torch.where(changed, images, blurred), images.masked_fill(changed, 0)
            scores = model(torch.cat([inserted, deleted])).softmax(1)
            followed = scores.gather(1, classes.repeat(2).unsqueeze(1)).view(2, n)
            insertion.append(followed[0])
            deletion.append(followed[1])
    return PixelCurves(share, torch.stack(insertion, 1), torch.stack(deletion, 1))


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation between maps (N, h, w) and others (N, h, w), one a pair, (N,) in
    -1..1; 0 where either map is constant and ranks nothing."""
    pairs = zip(maps.flatten(1).cpu().numpy(), others.flatten(1).cpu().numpy(), strict=True)
    return torch.tensor([spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in pairs])


def cascading_randomization(model: nn.Module, layers: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (layer, copy of the model) with the weights of ever more layers drawn anew, in the order
    given: from the classifier down. The model itself stays as it is (Adebayo et al. 2018, sec. 3).

    Every layer's modules are re-drawn by their own `reset_parameters`, as at the start of training.
    """
    randomised = copy.deepcopy(model)
    for position, name in enumerate(layers):
        with torch.random.fork_rng():
            torch.manual_seed(position)
            for module in find_layer(randomised, name).modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        yield name, randomised


def randomization_check(
    model: nn.Module, explain: Callable[[nn.Module], Tensor], layers: Sequence[str]
) -> dict[str, Tensor]:
    """Rank correlation between the maps of the model and those after randomising its layers from the top.

    Args:
        model: the trained network; left as it is.
        explain: gives the maps (N, h, w) of a network.
        layers: what to randomise, one after the other, from the classifier down.

    Returns:
        Layer → (N,) in -1..1. A map that depends on what the network learnt falls towards 0.
    """
    trained = explain(model)
    randomised = cascading_randomization(model, layers)
    return {name: rank_correlation(trained, explain(network)) for name, network in randomised}
