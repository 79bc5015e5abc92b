"""Figures of graphs and of what attention looks at. edge_index (2, E) and alpha are as the layers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import degree

from pdl_utils.plots import COLORS, HEAT, MARKERS, STYLES

LIKENESS = "cividis"  # how alike two nodes are, 0..1


def small_graph(
    axis: Axes, edge_index: Tensor, place: Mapping[int, tuple[float, float]], *, title: str,
    weight: Tensor | None = None, into: int = 0,
) -> None:  # fmt: skip
    """A graph of a few nodes, named by their numbers and drawn at their places. With `weight` (E,) in 0..1 the
    edges into one node are arrows as wide as their weight, and its edge to itself a circle of that width."""
    for index, (source, target) in enumerate(edge_index.T.tolist()):
        (x, y), (to_x, to_y) = place[source], place[target]
        if weight is None:
            axis.plot([x, to_x], [y, to_y], color="0.6", linewidth=1.5, zorder=1)
        elif target == into and source == target:
            ring(axis, (x, y), 0.24, float(weight[index]), f"{weight[index]:.2f}")
        elif target == into:
            look = {"arrowstyle": "-|>", "color": COLORS[0], "shrinkA": 12, "shrinkB": 14}
            look["linewidth"] = 1 + 8 * float(weight[index])
            axis.annotate("", (to_x, to_y), (x, y), arrowprops=look, zorder=1)
            aside = 0.2 / np.hypot(to_x - x, to_y - y)  # to the left of the arrow, seen along it
            spot = (x + to_x) / 2 - aside * (to_y - y), (y + to_y) / 2 + aside * (to_x - x)
            axis.text(*spot, f"{weight[index]:.2f}", ha="center", va="center")
    for node, (x, y) in place.items():
        axis.scatter(x, y, s=330, color="white", edgecolors="black", zorder=3)
        axis.text(x, y, str(node), ha="center", va="center", zorder=4)
    axis.set(aspect="equal", title=title)
    axis.margins(0.18)
    axis.set_axis_off()


def ring(axis: Axes, around: tuple[float, float], radius: float, weight: float, text: str = "") -> None:
    """A node's edge to itself: a circle above it, as wide as its weight in 0..1."""
    x, y = around
    look = {"fill": False, "linewidth": 0.3 + 9 * weight, "color": COLORS[0]}
    axis.add_patch(mpl.patches.Circle((x, y + radius), radius, **look))
    axis.text(x, y + 2.3 * radius, text, ha="center", va="bottom")


def node_of_degree(edge_index: Tensor, wanted: int) -> int:
    """The node whose number of incoming edges comes closest to `wanted`; the first of equals."""
    return int((degree(edge_index[1]) - wanted).abs().argmin())


def draw_neighbourhood(
    axis: Axes, edge_index: Tensor, centre: int, likeness: Tensor, *, title: str, alpha: Tensor | None = None
) -> None:
    """A node in the middle, its neighbours in a circle around it, and in grey the edges among these.

    `likeness` (E,) in 0..1, such as `jaccard`, colours a neighbour and orders the circle; `alpha` (E,) is the
    width of the edges into the centre, on one scale for all figures, and of the circle that is its edge to itself.
    """
    into = (edge_index[1] == centre).nonzero().squeeze(1).tolist()
    edge = {int(edge_index[0, e]): e for e in into}  # neighbour → an edge from it
    around = sorted(edge.keys() - {centre}, key=lambda node: -float(likeness[edge[node]]))
    angle = np.linspace(0, 2 * np.pi, len(around), endpoint=False)
    place = dict(zip(around, np.stack([np.cos(angle), np.sin(angle)], axis=1), strict=True))
    among = torch.isin(edge_index, torch.tensor(around, device=edge_index.device)).all(0)
    for a, b in edge_index[:, among].T.tolist():
        if a < b:
            axis.plot(*np.stack([place[a], place[b]]).T, color="0.88", linewidth=0.7, zorder=1)
    for node, (x, y) in place.items():
        width = 1.0 if alpha is None else 0.3 + 9 * float(alpha[edge[node]])
        axis.plot([0, x], [0, y], color=COLORS[0], linewidth=width, alpha=0.8, zorder=2)
        color = mpl.colormaps[LIKENESS](float(likeness[edge[node]]))
        axis.scatter(x, y, color=[color], s=46, edgecolors="white", zorder=3)
    if alpha is not None and centre in edge:
        ring(axis, (0, 0), 0.2, float(alpha[edge[centre]]))
    axis.scatter(0, 0, color="black", marker="*", s=170, edgecolors="white", zorder=4)
    axis.set(title=title, aspect="equal")
    axis.set_axis_off()


def likeness_bar(figure: Figure, axes: Sequence[Axes], label: str) -> None:
    """The colours of `draw_neighbourhood`, beside `axes`."""
    colors = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), LIKENESS)
    figure.colorbar(colors, ax=list(axes), shrink=0.8, label=label)


def draw_complexes(axis: Axes, graph: Data, pairs: int = 2) -> None:
    """Complexes of a synthetic graph, each beside its decoy, one compartment left and the other right: edges
    within a complex blue, those between a complex and its decoy orange."""
    place, ends = {}, graph.complex[graph.edge_index]  # the complexes at both ends of each edge
    for row in range(pairs):
        decoy = int(ends[1, (ends[0] == 2 * row) & ~graph.functional][0])
        for column, number in enumerate((2 * row, decoy)):
            members = (graph.complex == number).nonzero().squeeze(1).tolist()
            angle = np.linspace(0, 2 * np.pi, len(members), endpoint=False)
            spots = np.stack([3 * column + np.cos(angle), np.sin(angle) - 2.5 * row], axis=1)
            place |= dict(zip(members, spots, strict=True))
    for (a, b), functional in zip(graph.edge_index.T.tolist(), graph.functional.tolist(), strict=True):
        if a < b and a in place and b in place:
            color, width = (COLORS[0], 0.8) if functional else (COLORS[1], 0.5)
            axis.plot(*np.stack([place[a], place[b]]).T, color=color, linewidth=width, zorder=1)
    for node, spot in place.items():
        color = COLORS[2] if graph.x[node, 0] > 0 else COLORS[5]
        axis.scatter(*spot, s=26, color=color, edgecolors="white", zorder=2)
    axis.set(aspect="equal", title="complexes and their decoys")
    axis.set_axis_off()


def seed_points(axis: Axes, values: Mapping[str, Sequence[float]], *, xlabel: str, title: str) -> None:
    """One row a name, first on top: a small mark for every seed, a large one for their mean, and a line of one
    sample standard deviation to both sides."""
    for row, seeds in enumerate(values.values()):
        mean, spread = float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        axis.plot([mean - spread, mean + spread], [row, row], color="black", linewidth=1.5, zorder=2)
        axis.scatter(seeds, [row + 0.24] * len(seeds), s=14, color=COLORS[1], marker="|", zorder=3)
        axis.scatter(mean, row, s=36, color=COLORS[0], zorder=4)
        text = f"{mean:.4f}" + (f" ± {spread:.4f}" if len(seeds) > 1 else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axis.annotate(text, (mean, row), (0, 6), textcoords="offset points", ha="center", bbox=box)
    axis.set_yticks(range(len(values)), list(values))
    axis.margins(x=0.35)  # room for the numbers
    axis.set(xlabel=xlabel, title=title, ylim=(len(values) - 0.5, -0.8))


def head_points(
    axis: Axes, scores: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str, title: str, reference: float
) -> None:
    """One mark a head, above the number of its layer: network → layers → a score a head; a dashed line at
    `reference`."""
    axis.axhline(reference, color="black", linestyle=STYLES[1], linewidth=1)
    for index, (name, layers) in enumerate(scores.items()):
        shift = 0.24 * (index - (len(scores) - 1) / 2)  # networks side by side
        for layer, heads in enumerate(layers, 1):
            look = {"color": COLORS[index], "marker": MARKERS[index], "s": 26, "alpha": 0.85}
            axis.scatter([layer + shift] * len(heads), heads, label=name if layer == 1 else None, **look)
    depth = max(len(layers) for layers in scores.values())
    axis.set_xticks(range(1, depth + 1), [f"layer {layer}" for layer in range(1, depth + 1)])
    axis.set(ylabel=ylabel, title=title, xlim=(0.5, depth + 0.5))


def attention_matrix(axis: Axes, matrix: Tensor, *, title: str) -> None:
    """Attention as a picture, (targets, sources) in 0..1: a row is one target's softmax."""
    picture = axis.imshow(matrix.detach().cpu().numpy(), cmap=HEAT, vmin=0, vmax=1)
    axis.figure.colorbar(picture, ax=axis, shrink=0.75, label="attention")
    axis.set(title=title, xlabel="source (key)", ylabel="target (query)")
    axis.grid(visible=False)


def two_sides(axis: Axes, scores: Mapping[str, Sequence[Sequence[float]]], *, title: str) -> None:
    """One mark a head: its ROC-AUC for targets in one compartment against that in the other; on the falling
    diagonal a gain here is a loss there. `scores`: network → (heads, 2)."""
    for index, (name, each) in enumerate(scores.items()):
        label = f"{name}, {len(each)} heads"
        axis.scatter(*np.asarray(each).T, color=COLORS[index], marker=MARKERS[index], s=26, alpha=0.8, label=label)
    axis.plot([0, 1], [1, 0], color="black", linestyle=STYLES[1], linewidth=1, label="one gains, one loses")
    labels = {"xlabel": "ROC-AUC, targets in one compartment", "ylabel": "ROC-AUC, in the other"}
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=title, **labels)
    axis.legend()
