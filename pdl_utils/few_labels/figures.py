"""The figures of notebook 3."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.utils import make_grid

from pdl_utils.plots import COLORS, STYLES, curves, to_pixels


def images_in_rows(rows: Mapping[str, Tensor], title: str, width: float) -> Figure:
    """uint8 images (N, 3, H, W) beside each other, a row each name; the figure is `width` inches wide."""
    strips = [make_grid(images, nrow=len(images), padding=2, pad_value=255) for images in rows.values()]
    height = width * strips[0].shape[1] / strips[0].shape[2]
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, len(rows) * height + 0.3), squeeze=False)
    for axis, name, strip in zip(axes.flat, rows, strips, strict=True):
        axis.imshow(to_pixels(strip))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def levels(draw: Callable, values: Mapping[str, float]) -> None:
    """Values to compare with, each a named line: `draw` is `axis.axvline` or `axis.axhline`."""
    for (name, value), style in zip(values.items(), STYLES[1:], strict=False):
        draw(value, color="black", linestyle=style, linewidth=1, label=name)


def dots(runs: Mapping[str, Sequence[float]], title: str, xlabel: str, references: Mapping[str, float]) -> Figure:
    """A row a name: a small dot for each label set, a large one for their mean, with its number."""
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.27 * len(runs)))
    for row, values in enumerate(runs.values()):
        axis.plot(values, [row] * len(values), "o", color=COLORS[0], alpha=0.25, markersize=5, markeredgewidth=0)
        axis.plot(np.mean(values), row, "D", color=COLORS[5], markersize=5)
        axis.annotate(f"{np.mean(values):.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center")
    levels(axis.axvline, references)
    axis.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel=xlabel, title=title)
    axis.set_ylim(len(runs) - 0.5, -0.5)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return figure


def lines(
    x: Sequence[float], series: Mapping[str, Sequence], title: str, xlabel: str, ylabel: str,
    references: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Curves over a logarithmic x, each one line (X,) or several (runs, X), and horizontal lines."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    curves(axis, x, series, xlabel=xlabel, ylabel=ylabel, title=title)
    levels(axis.axhline, references or {})
    axis.set(xscale="log", xticks=x, xticklabels=x)
    axis.minorticks_off()
    axis.get_legend().remove()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def over_epochs(panels: Mapping[str, Mapping[str, Sequence[float] | float]]) -> Figure:
    """Curves over epochs, a panel each name; a single number is a horizontal line."""
    figure, axes = plt.subplots(1, len(panels), figsize=(8.2, 3), squeeze=False)
    for axis, (ylabel, series) in zip(axes.flat, panels.items(), strict=True):
        drawn = {name: values for name, values in series.items() if np.ndim(values)}
        epochs = range(1, 1 + max(map(len, drawn.values())))
        curves(axis, epochs, drawn, xlabel="epoch", ylabel=ylabel, title="")
        levels(axis.axhline, {name: value for name, value in series.items() if name not in drawn})
        axis.get_legend().remove()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def two_matrices(matrices: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Similarities (2N, 2N) of N images' first and then second views; the partners' cells are framed."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(8, 3.9), squeeze=False)
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=True):
        picture = axis.imshow(matrix.detach().cpu(), cmap="PuOr_r", vmin=-1, vmax=1)
        for i in range(len(names)):
            j = (i + len(names) // 2) % len(names)
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title)
        axis.grid(visible=False)
    figure.colorbar(picture, ax=axes, label="cosine", shrink=0.8)
    return figure


def simclr_drawing(image: Tensor, views: Sequence[Tensor]) -> Figure:
    """An image (C, H, W), its two views, and their way through f and g to the loss."""
    figure, axis = plt.subplots(figsize=(8, 2.3))
    axis.set(xlim=(0, 16), ylim=(0, 4.2), aspect="equal")
    axis.set_axis_off()
    tall = image.shape[1] / image.shape[2]
    axis.imshow(to_pixels(image), extent=(0.2, 2.0, 2.1 - 0.9 * tall, 2.1 + 0.9 * tall))
    box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "black"}
    for view, y in zip(views, (3.2, 1.0), strict=True):
        axis.imshow(to_pixels(view), extent=(3.4, 5.0, y - 0.8 * tall, y + 0.8 * tall))
        for x, text in ((6.9, "f\nencoder"), (8.9, "h\nfeatures"), (10.9, "g\nhead"), (12.7, "z")):
            axis.text(x, y, text, ha="center", va="center", bbox=box if text[0] in "fg" else None)
        for left, right in ((5.2, 6.1), (7.7, 8.2), (9.6, 10.2), (11.6, 12.4)):
            axis.annotate("", (right, y), (left, y), arrowprops={"arrowstyle": "->"})
        axis.annotate("", (3.3, y), (2.1, 2.1), arrowprops={"arrowstyle": "->"})
    axis.annotate("", (12.7, 2.8), (12.7, 1.4), arrowprops={"arrowstyle": "<->"})
    axis.text(13.0, 2.1, "the loss pulls\nthem together", va="center")
    axis.text(8.9, 2.1, "kept: h", ha="center", va="center", color=COLORS[2], weight="bold")
    axis.text(10.9, 2.1, "dropped: g", ha="center", va="center", color=COLORS[5], weight="bold")
    return figure


def low_rank_drawing(out: int, into: int, rank: int) -> Figure:
    """W (out, into) and the product of B (out, rank) and A (rank, into), drawn to scale."""
    figure, axis = plt.subplots(figsize=(7.5, 2.9))
    places = {"W": (0, 0, into, out), "B": (into + 500, 0, rank, out), "A": (into + 950, out - rank, into, rank)}
    for color, (name, (x, y, width, height)) in zip(COLORS, places.items(), strict=False):
        axis.add_patch(Rectangle((x, y), width, height, color=color))
        above = f"{name}\n{height} · {width} = {height * width:,}"
        axis.annotate(above, (x + width / 2, out), (0, 4), textcoords="offset points", ha="center")
    for x, sign in ((into + 200, "+"), (into + 800, "·")):
        axis.text(x, 0.85 * out, sign, ha="center", va="center", fontsize=18)
    axis.set(xlim=(-20, 2 * into + 1000), ylim=(-20, 1.25 * out), aspect="equal")
    axis.set_axis_off()
    return figure
