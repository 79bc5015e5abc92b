"""Is the map right? Boxes: Zhang et al. 2016 (pointing game, arXiv:1608.00507), Wang et al. 2020 (energy in the
box, arXiv:1910.01279). Pixels: Petsiuk et al. 2018 (insertion and deletion, arXiv:1806.07421). Weights: Adebayo et
al. 2018 (cascading randomisation, arXiv:1810.03292)."""

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.stats import bootstrap, spearmanr
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from pdl_utils.grad_cam import checks
from pdl_utils.grad_cam.hooks import evaluating, find_layer, record_activations
from pdl_utils.grad_cam.maps import enlarge


def box_masks(boxes: Tensor, size: Sequence[int], cells: Sequence[int] | None = None) -> Tensor:
    """Boolean (N, h, w): which of the cells (h, w) that an image of `size` is divided into, its pixels if None,
    have their centre inside the box? Boxes: integers (N, 4), x0, y0, x1, y1 in pixels, both ends inside."""
    x0, y0, x1, y1 = checks.boxes_in(size, boxes).unsqueeze(-1).unbind(1)  # pixel i reaches from i to i + 1
    sides = zip(cells or size, size, strict=True)
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) / n * side for n, side in sides)
    rows, columns = (y >= y0) & (y <= y1 + 1), (x >= x0) & (x <= x1 + 1)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def pointing_game(maps: Tensor, boxes: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Does the centre of the map's highest cell lie in the box? (N,): 1 or 0; where several cells are equally high
    (up to rounding), the share of them that do; 0 for a map without a positive value. Maps (N, h, w) are best at
    the layer's own resolution: enlarged, the outermost cells become plateaus. Boxes as for `box_masks`; `size` is
    that of their image, the maps' own if None."""
    peak = checks.plain_maps(maps).amax((1, 2), keepdim=True)
    highest = (maps >= peak * (1 - 1e-5)) & (peak > 0)
    hits = highest & box_masks(boxes, size or maps.shape[-2:], maps.shape[-2:])
    return hits.sum((1, 2)) / highest.sum((1, 2)).clamp(min=1)


def energy_in_box(maps: Tensor, boxes: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Share of the map's positive sum that lies in the box, (N,); 0 for a map of zeros. Takes what `pointing_game`
    takes, and enlarges the maps to `size`."""
    positive = enlarge(checks.plain_maps(maps).unsqueeze(1), size or maps.shape[-2:]).squeeze(1).clamp(min=0)
    inside = (positive * box_masks(boxes, positive.shape[-2:])).sum((1, 2))
    return inside / positive.sum((1, 2)).clamp(min=torch.finfo(positive.dtype).tiny)


def mean_interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of (N,) and both ends of its 95% percentile bootstrap interval; of one value no ends, NaN."""
    sample = checks.finite(values.double().cpu(), "values").numpy()
    if len(sample) < 2:
        return float(sample.mean()), float("nan"), float("nan")
    drawn = bootstrap((sample,), np.mean, n_resamples=2000, method="percentile", random_state=0)
    return float(sample.mean()), *map(float, drawn.confidence_interval)


def in_words(values: Tensor, form: str = ".2f") -> str:
    """`mean_interval` as a text, "0.52 (0.48 to 0.56)"; `form` is that of a number."""
    mean, *ends = (format(number, form) for number in mean_interval(values))
    return f"{mean} ({' to '.join(ends)})" if len(values) > 1 else f"{mean} (one value)"


def receptive_fields(model: nn.Module, images: Tensor, layers: Sequence[str]) -> dict[str, float]:
    """Side in pixels of what a unit in the middle of a layer sees (Luo et al. 2016, arXiv:1701.04128): the columns
    that hold 90% of the gradient of that unit, summed over channels, with respect to images (N, C, H, W)."""
    sides = {}
    with evaluating(model), record_activations(model, layers) as seen:
        pixels = checks.float_batch(images).requires_grad_()
        model(pixels)
        for layer, cells in checks.feature_maps(seen, model, pixels.shape).items():
            unit = cells[:, :, cells.shape[2] // 2, cells.shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(unit, pixels, retain_graph=True)
            mass = checks.finite(gradient, f"the gradient of {layer!r}").abs().sum((0, 1, 2)).cumsum(0)
            ends = torch.tensor([0.05, 0.95], device=mass.device) * mass[-1]
            first, last = torch.searchsorted(mass, ends).tolist()
            sides[layer] = float(last - first + 1)
    return sides


def insertion_deletion(
    model: nn.Module, images: Tensor, maps: Tensor, classes: Tensor, *, steps: int = 28, blur: float = 10.0
) -> dict[str, Tensor]:
    """The probability of `classes` (N,) while pixels of normalised images (N, C, H, W) come back into a blurred
    image ("insertion"; `blur` is its standard deviation in pixels) or are set to the mean colour, 0 ("deletion"):
    (N, steps + 1) each. Most important first by `maps` (N, H, W), and in random order where they are equal."""
    n, _, height, width = images.shape
    lot = torch.randperm(height * width, generator=torch.Generator().manual_seed(0)).to(images.device)
    maps = enlarge(checks.plain_maps(maps).unsqueeze(1), (height, width)).to(images.device)
    shuffled = maps.flatten(1)[:, lot]
    order = lot[shuffled.argsort(dim=1, descending=True, stable=True)]
    rank = order.argsort(dim=1).view(n, 1, height, width)  # 0 for the most important pixel
    blurred = gaussian_blur(images, 2 * min(round(3 * blur), height - 1, width - 1) + 1, blur)
    followed = []
    with evaluating(model), torch.no_grad():
        for step in range(steps + 1):
            changed = rank < round(step / steps * height * width)
            both = torch.cat([torch.where(changed, images, blurred), images.masked_fill(changed, 0)])
            scores = checks.class_scores(model, both)
            chosen = checks.choose_classes(scores, classes.repeat(2))
            followed.append(checks.probabilities(scores, chosen).view(2, n))
    return dict(zip(("insertion", "deletion"), torch.stack(followed, 2), strict=True))


def area(curves: Tensor) -> Tensor:
    """Area under curves (N, steps + 1) over 0..1, (N,): large for a good insertion, small for a good deletion."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1))


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's rank correlation between maps (N, h, w) and others (N, h, w), one a pair, (N,) in -1..1; 0 where
    either map is constant and ranks nothing."""
    first, second = (checks.plain_maps(m).flatten(1).cpu().numpy() for m in (maps, others))
    pairs = zip(first, second, strict=True)
    return torch.tensor([spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in pairs])


def hottest_overlap(maps: Tensor, others: Tensor) -> Tensor:
    """Do two maps (N, h, w) mark the same place? Of the pixels in the hottest fifth of either, the part that is in
    both, (N,). Two maps of independent random numbers give 0.11."""
    both, cells = torch.stack([checks.plain_maps(maps), checks.plain_maps(others)]).flatten(2), maps[0].numel()
    marked = both >= both.kthvalue(cells - round(cells / 5) + 1, keepdim=True).values  # (2, N, cells)
    marked &= both > both.amin(2, keepdim=True)  # of a map of zeros but for a few cells, only these
    return marked.all(0).sum(1) / marked.any(0).sum(1).clamp(min=1)


def cascading_randomization(
    model: nn.Module, layers: Sequence[str], seed: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (layer, copy of the model) with the weights of ever more layers, in the order given, drawn anew by
    their modules' own `reset_parameters`. The model and the caller's random numbers stay as they are."""
    randomised = copy.deepcopy(model)
    for position, name in enumerate(layers):
        layer = find_layer(randomised, name)
        drawn = [m for m in layer.modules() if hasattr(m, "reset_parameters")]
        if not drawn:
            raise ValueError(f"layer {name!r} has no weights that can be drawn anew")
        before = [(p, p.detach().clone()) for p in layer.parameters()]
        with torch.random.fork_rng():
            torch.manual_seed(1000 * seed + position)
            for module in drawn:
                module.reset_parameters()
            for weight, old in before:  # attention, weight norm and pruning have some that nothing resets
                if torch.equal(weight, old):
                    nn.init.normal_(weight, old.mean().item(), old.std(correction=0).item())
        yield name, copy.deepcopy(randomised)


def randomization_check(
    model: nn.Module, explain: Callable[[nn.Module], Tensor], layers: Sequence[str], draws: int = 1
) -> Tensor:
    """Rank correlation between the maps (N, h, w) that `explain` gives of the model and of its randomised copies:
    (draws, layers, N). Maps of what the network has learnt fall to what unrelated maps have."""
    trained, rows = explain(model), []
    for draw in range(draws):
        copies = cascading_randomization(model, layers, seed=draw)
        rows += [rank_correlation(trained, explain(randomised)) for _, randomised in copies]
    return torch.stack(rows).view(draws, len(layers), -1)
