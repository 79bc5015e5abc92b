"""One look for all figures: colour-blind safe, readable in grey, labelled."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Okabe & Ito 2008, in an order whose lightness alternates; marker and line style differ as well.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
STYLES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
HEAT = "inferno"  # one-sided maps: lightness grows with the value
SIGNED = "PuOr_r"  # two-sided maps: white is zero
WIDEST = 8.5  # inches; JupyterLab shrinks what is wider


def use_style() -> None:
    """Set matplotlib's defaults for every figure of the collection."""
    mpl.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.prop_cycle": mpl.cycler(color=COLORS),
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    )


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W), or grey (1, H, W), uint8 or float in 0..1 → (H, W, 3) float in 0..1. ValueError: another kind."""
    pixels = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    if not ((pixels > -0.01) & (pixels < 1.01)).all():
        raise ValueError(f"an image is uint8, or float in 0..1, not in {pixels.min():.3g}..{pixels.max():.3g}")
    return pixels.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()


def overlay(image: Tensor, heat: Tensor, signed: bool = False) -> np.ndarray:
    """A map (H, W) laid over its image (3, H, W), uint8 or float in 0..1: the stronger the evidence, the more of
    the colour and the less of the greyed image is seen. `heat` is in 0..1, or if `signed` in -1..1, drawn in two
    colours, for and against. ValueError: it is not. Returns (H, W, 3) in 0..1."""
    value = heat.detach().cpu().float().numpy()
    if value.shape != tuple(image.shape[-2:]) or not np.all((value >= -1.001 * signed) & (value <= 1.001)):
        raise ValueError(
            f"heat must be {tuple(image.shape[-2:])} in {'-1' if signed else '0'}..1, not {value.shape} in "
            f"{value.min():.3g}..{value.max():.3g}; ClassMaps.heatmaps gives such; signed maps need signed=True"
        )
    color = mpl.colormaps[SIGNED if signed else HEAT](value / 2 + 0.5 if signed else value)[..., :3]
    grey = to_pixels(image).mean(2, keepdims=True)
    weight = 0.65 * np.sqrt(np.abs(value))[..., None]
    return (1 - weight) * grey + weight * color


def gradient_picture(gradient: Tensor) -> np.ndarray:
    """A gradient with respect to an image (3, H, W) as (H, W, 3) in 0..1: grey where it is zero, and full
    contrast at the 99.5th percentile of its absolute values."""
    values = gradient.detach().cpu().float()
    peak = values.abs().flatten().quantile(0.995).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / (2 * peak) + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], *, columns: int, cell: float = 1.9) -> Figure:
    """Pictures (H, W, 3) or (H, W) in rows of `columns`, each under its own title: six a row can be read. `cell`:
    their width in inches; less where a row would be too wide. Titles are broken into lines that fit."""
    rows, cell = -(-len(images) // columns), min(cell, (WIDEST - 0.3) / columns)
    titles = [in_lines(text, cell) for text in titles]
    longest = max((text.count("\n") + 1 for text in titles), default=0)
    high = cell * max(picture.shape[0] / picture.shape[1] for picture in images) + 0.17 * longest
    figure, axes = plt.subplots(rows, columns, figsize=(cell * columns, high * rows + 0.4), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (picture, text) in zip(axes.flat, zip(images, titles, strict=True), strict=False):
        axis.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
        axis.set_title(text, loc="center")
    return figure


def in_lines(text: str, inches: float) -> str:
    """Text of 9 points, broken at spaces into lines that are at most so wide."""
    return "\n".join(textwrap.fill(line, max(8, int(14 * inches))) for line in text.split("\n"))


def curves(
    axis: Axes, x: Sequence[float], series: Mapping[str, Sequence[float] | Sequence[Sequence[float]]], *,
    xlabel: str, ylabel: str, title: str,
) -> None:  # fmt: skip
    """Lines over a common x, named in a legend. A series may be one line (X,) or several (runs, X): then
    their mean, with the band of one sample standard deviation. Whole x, as of epochs, get whole ticks."""
    for i, (name, values) in enumerate(series.items()):
        runs = np.atleast_2d(np.asarray(values, dtype=float))
        mean = runs.mean(0)
        marker = MARKERS[i % 8] if len(x) <= 12 else None
        (line,) = axis.plot(x, mean, STYLES[i % 8], marker=marker, markersize=4, label=name)
        if len(runs) > 1:
            spread = runs.std(0, ddof=1)
            axis.fill_between(x, mean - spread, mean + spread, alpha=0.2, color=line.get_color(), linewidth=0)
    if all(float(value).is_integer() for value in x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()


def comparison(axis: Axes, values: Mapping[str, tuple[float, float, float]], *, xlabel: str, title: str) -> None:
    """Horizontal bars of (value, low end, high end of its interval), one a name, first on top."""
    for i, (value, low, high) in enumerate(values.values()):
        axis.barh(i, value, color=COLORS[0], alpha=0.75, height=0.65)
        axis.plot([low, high], [i, i], color="black", linewidth=1.5)
        end = np.fmax(value, high)  # of one value there is no interval
        number = axis.annotate(f"{value:.3f}", (end, i), xytext=(5, 0), textcoords="offset points")
        number.set(va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the lines
    axis.set_yticks(range(len(values)), values)
    axis.invert_yaxis()
    axis.margins(x=0.25)  # for the numbers beside the bars, which start at 0
    axis.grid(visible=False, axis="y")
    axis.set(xlabel=xlabel, title=title)
