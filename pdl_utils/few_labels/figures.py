"""The figures of notebook 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torchvision.utils import make_grid

from pdl_utils.plots import COLORS, MARKERS, comparison, curves, to_pixels


def images_in_rows(rows: Mapping[str, Tensor], title: str, width: float = 8) -> Figure:
    """uint8 images (N, 3, H, W) beside each other, a row each name; the figure is `width` inches wide."""
    strips = [make_grid(images, nrow=len(images), padding=2, pad_value=255) for images in rows.values()]
    height = width * strips[0].shape[1] / strips[0].shape[2]
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, len(rows) * height + 0.3), squeeze=False)
    for axis, name, strip in zip(axes.flat, rows, strips, strict=True):
        axis.imshow(to_pixels(strip))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def accuracy_bars(
    runs: Mapping[str, Sequence[float]], title: str, *, xlabel: str, references: Mapping[str, float]
) -> Figure:
    """A bar for the mean of each method's runs, with their range."""
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.33 * len(runs)))
    spread = {name: (float(np.mean(values)), min(values), max(values)) for name, values in runs.items()}
    comparison(axis, spread, xlabel=xlabel, title=title, references=references)
    return figure


def lines(
    x: Sequence[float], series: Mapping[str, Sequence], title: str, *, xlabel: str, ylabel: str,
    references: Mapping[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Curves over a logarithmic x, each one line (X,) or several (runs, X), and horizontal lines."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    curves(axis, x, series, xlabel=xlabel, ylabel=ylabel, title=title)
    for (name, value), style in zip((references or {}).items(), ("--", ":"), strict=False):
        axis.axhline(value, color="black", linestyle=style, linewidth=1, label=name)
    axis.set(xscale="log", xticks=x, xticklabels=x)
    axis.minorticks_off()
    axis.legend()
    return figure


def two_curves(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Two curves over epochs, each in its own axes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6))
    for axis, series, text in zip(axes, (first, second), (title, ""), strict=True):
        ((name, values),) = series.items()
        curves(axis, range(1, len(values) + 1), series, xlabel="epoch", ylabel=name, title=text)
        axis.get_legend().remove()
    return figure


def confusion(probabilities: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> tuple[Figure, Tensor]:
    """Which class is taken for which, as shares of the true class (a row each); the figure, and those shares."""
    guesses, every = probabilities.argmax(1), range(len(classes))
    matrix = confusion_matrix(labels, guesses, labels=every, normalize="true")
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(matrix.shape):
        color = "white" if matrix[i, j] > 0.55 else "black"
        axis.text(j, i, f"{matrix[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(every, classes, rotation=45, ha="right")
    axis.set_yticks(every, classes)
    axis.set(xlabel="guess", ylabel="truth", title=title)
    axis.grid(visible=False)
    figure.colorbar(picture, label="share of the class")
    return figure, torch.from_numpy(matrix)


def tsne_maps(features: Mapping[str, Tensor], labels: Tensor, classes: Sequence[str], tag: str) -> Figure:
    """t-SNE of several sets of features (N, D) of the same images, coloured by class."""
    colors = [*COLORS, "#999999", "#882255"]
    figure, axes = plt.subplots(1, len(features), figsize=(5 * len(features), 4.2))
    for axis, (name, values) in zip(axes, features.items(), strict=True):
        places = TSNE(random_state=0, init="pca").fit_transform(values.cpu().numpy())
        for c, text in enumerate(classes):
            mine = places[labels.numpy() == c]
            axis.scatter(*mine.T, s=9, color=colors[c], marker=f"{MARKERS}<>"[c], label=text, lw=0)
        axis.set(xticks=[], yticks=[], title=f"{name}{tag}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2)
    return figure


def update_ranks(shares: Mapping[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """For each layer the cumulative share of the squared singular values of its update, and of a random matrix."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for color, style, (name, (update, noise)) in zip(COLORS, ("-", "--", "-."), shares.items(), strict=False):
        ranks = range(1, len(update) + 1)
        axis.plot(ranks, update, color=color, linestyle=style, label=name)
        axis.plot(ranks, noise, color=color, linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="rank", ylabel="share of ‖ΔW‖²", title=title)
    axis.legend(title="dotted: random matrices")
    return figure
