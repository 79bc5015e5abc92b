"""Is the map right? Measures that can say no.

Boxes: Zhang et al. 2016 (pointing game, arXiv:1608.00507) and Wang et al. 2020 (energy in the box,
arXiv:1910.01279). Pixels: Petsiuk et al. 2018 (insertion and deletion, arXiv:1806.07421). Weights:
Adebayo et al. 2018 (cascading randomisation, arXiv:1810.03292).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, spearmanr
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from pdl_utils.grad_cam.hooks import evaluating, find_layers, record_activations


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


def share_interval(hits: Tensor) -> tuple[float, float, float]:
    """Share of True in a boolean (N,) with its 95% Wilson score interval: (share, low, high)."""
    found = binomtest(int(hits.sum()), len(hits))
    interval = found.proportion_ci(method="wilson")
    return float(found.statistic), float(interval.low), float(interval.high)


def mean_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of (N,) with its 95% percentile bootstrap interval over the N, from 2,000 draws: (mean, low, high)."""
    sample = values.double().cpu().numpy()
    rows = np.random.default_rng(0).integers(len(sample), size=(2000, len(sample)))
    low, high = np.quantile(sample[rows].mean(1), (0.025, 0.975))
    return float(sample.mean()), float(low), float(high)


def receptive_field(model: nn.Module, images: Tensor, layer: str, share: float = 0.9) -> float:
    """Side in pixels of what a unit in the middle of a layer sees (Luo et al. 2016, arXiv:1701.04128).

    The gradient of that unit, summed over channels, with respect to the image says which pixels matter;
    the side is that of the span, across columns, which holds `share` of its absolute values, averaged
    over images (N, C, H, W).
    """
    with torch.enable_grad(), evaluating(model), record_activations(model, layer) as seen:
        pixels = images.detach().clone().requires_grad_()
        model(pixels)
        rows, columns = seen[layer].shape[-2:]
        (gradient,) = torch.autograd.grad(seen[layer][:, :, rows // 2, columns // 2].sum(), pixels)
    mass = gradient.abs().sum((0, 1, 2)).cumsum(0)
    ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], device=mass.device) * mass[-1]
    first, last = torch.searchsorted(mass, ends).tolist()
    return float(last - first + 1)


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


@torch.no_grad()
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
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(height * width, device=maps.device).expand(n, -1)
    )
    rank = rank.view(n, 1, height, width)
    blurred = gaussian_blur(images, 2 * round(3 * blur) + 1, blur)
    share = torch.linspace(0, 1, steps + 1, device=images.device)
    curves: dict[str, list[Tensor]] = {"insertion": [], "deletion": []}
    with evaluating(model):
        for part in share:
            changed = rank < torch.round(part * height * width)
            for name, start, end in (
                ("insertion", blurred, images),
                ("deletion", images, torch.zeros_like(images)),
            ):
                scores = model(torch.where(changed, end, start)).float().softmax(1)
                curves[name].append(scores.gather(1, classes.unsqueeze(1)).squeeze(1))
    return PixelCurves(share, torch.stack(curves["insertion"], 1), torch.stack(curves["deletion"], 1))


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
    for position, (name, layer) in enumerate(find_layers(randomised, layers).items()):
        with torch.random.fork_rng():
            torch.manual_seed(position)
            for module in layer.modules():
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
    return {
        name: rank_correlation(trained, explain(randomised))
        for name, randomised in cascading_randomization(model, layers)
    }
