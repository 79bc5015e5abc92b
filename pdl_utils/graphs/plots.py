"""Figures of graphs, of the networks that run on them, and of what attention looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from pdl_utils.graphs.edges import SortedEdges
from pdl_utils.graphs.layers import AttentionConv, Edgeless, GraphNet
from pdl_utils.plots import COLORS, HEAT, SIGNED


def node_of_degree(graph: SortedEdges, wanted: int) -> int:
    """The node whose number of edges comes closest to `wanted`; the first of equals."""
    return int((graph.degree - wanted).abs().argmin())


def draw_neighbourhood(
    axis: Axes,
    graph: SortedEdges,
    centre: int,
    *,
    title: str,
    groups: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """A node in the middle, its neighbours in a circle around it, and in grey the edges among these.

    Args:
        groups: int (N,); neighbours of the centre's own group come first in the circle, in a colour of
            their own.
        weight: (E,) of the edges into the centre; their width is in proportion; all thin without it.
    """
    into = range(int(graph.rowptr[centre]), int(graph.rowptr[centre + 1]))
    width = {int(graph.source[edge]): 1.0 if weight is None else float(weight[edge]) for edge in into}
    width.pop(centre, None)
    same = {node: groups is None or bool(groups[node] == groups[centre]) for node in width}
    ring = sorted(width, key=lambda node: not same[node])
    angle = np.linspace(0, 2 * np.pi, len(ring), endpoint=False)
    place = dict(zip(ring, np.stack([np.cos(angle), np.sin(angle)], axis=1), strict=True))
    for a, b in {tuple(sorted(edge)) for edge in graph.edge_index.t().tolist()}:
        if a in place and b in place and a != b:
            axis.plot(*np.stack([place[a], place[b]]).T, color="0.88", linewidth=0.7, zorder=1)
    for node, spot in place.items():
        thickness = 1.0 if weight is None else 0.3 + 3.5 * width[node] / max(width.values())
        axis.plot([0, spot[0]], [0, spot[1]], color="black", linewidth=thickness, alpha=0.75, zorder=2)
        color, marker = (COLORS[0], "o") if same[node] else (COLORS[1], "s")
        axis.scatter(*spot, color=color, marker=marker, s=48, edgecolors="white", zorder=3)
    axis.scatter(0, 0, color="black", marker="*", s=210, edgecolors="white", zorder=4)
    axis.set(title=title, aspect="equal")
    axis.set_axis_off()


def neighbourhood_legend() -> list[Line2D]:
    """Handles for a legend beside `draw_neighbourhood`."""
    entries = {"the node": ("black", "*"), "its own group": (COLORS[0], "o"), "another group": (COLORS[1], "s")}
    return [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for label, (color, marker) in entries.items()
    ]


def label_cooccurrence(axis: Axes, labels: Tensor, *, title: str) -> None:
    """Correlation between labels over the nodes, labels that go together side by side: (N, L) of 0 and 1."""
    varies = labels[:, labels.std(0) > 0]
    correlation = np.corrcoef(varies.cpu().numpy().T)
    order = leaves_list(linkage(correlation, "average", optimal_ordering=True))
    picture = axis.imshow(correlation[np.ix_(order, order)], cmap=SIGNED, vmin=-1, vmax=1)
    axis.figure.colorbar(picture, ax=axis, shrink=0.8, label="correlation")
    axis.set(title=title, xlabel="label", ylabel="label")
    axis.grid(visible=False)


def draw_architecture(axis: Axes, net: GraphNet, *, title: str) -> None:
    """The layers of a network as boxes from left to right, read from the network itself."""
    boxes = [f"input\n{net.in_channels} features"]
    for layer in net.layers:
        if isinstance(layer, AttentionConv):
            how = "side by side" if layer.concat else "averaged"
            text = f"{layer.heads} heads × {layer.out_channels}\n{how}"
        else:
            text = f"{(layer if isinstance(layer, Edgeless) else layer.lin).out_features} features"
        count = sum(parameter.numel() for parameter in layer.parameters())
        boxes.append(f"{type(layer).__name__}\n{text}\n{count:,} parameters")
    width, gap = 1.0, 0.32
    for index, text in enumerate(boxes):
        left = index * (width + gap)
        axis.add_patch(FancyBboxPatch((left, 0), width, 0.55, boxstyle="round,pad=0.03", fc="white", ec=COLORS[0]))
        axis.text(left + width / 2, 0.275, text, ha="center", va="center", fontsize=8)
        if index:
            arrow = {"arrowstyle": "->", "color": "black"}
            axis.annotate("", (left - 0.04, 0.275), (left - gap + 0.04, 0.275), arrowprops=arrow)
            if getattr(net.layers[index - 1], "res", None) is not None:
                bow = {"arrowstyle": "->", "color": COLORS[1], "connectionstyle": "arc3,rad=-0.35"}
                start, end = (left - gap + 0.03, 0.58), (left + width - 0.05, 0.6)
                axis.annotate("", end, start, arrowprops=bow)
        if 0 < index < len(boxes) - 1:
            axis.text(left + width + gap / 2, 0.34, "ELU", ha="center", fontsize=7)
    axis.set(xlim=(-0.1, len(boxes) * (width + gap) - gap + 0.1), ylim=(-0.1, 0.95), title=title)
    axis.set_axis_off()


def attention_matrix(axis: Axes, matrix: Tensor, *, title: str) -> None:
    """Attention as a picture, (targets, sources) in 0..1: a row is one target's softmax."""
    picture = axis.imshow(matrix.detach().cpu().numpy(), cmap=HEAT, vmin=0, vmax=1)
    axis.figure.colorbar(picture, ax=axis, shrink=0.75, label="attention")
    axis.set(title=title, xlabel="source (key)", ylabel="target (query)")
    axis.grid(visible=False)


def histograms(
    axis: Axes, values: Mapping[str, Sequence[float] | Tensor], *, bins: np.ndarray, xlabel: str, title: str
) -> None:
    """Outlines of several distributions, each as shares of its own total, with the mean in the legend."""
    for (name, sample), color in zip(values.items(), COLORS, strict=False):
        sample = np.asarray(sample, dtype=float)
        sample = sample[np.isfinite(sample)]
        weights = np.full(len(sample), 1 / max(1, len(sample)))
        label = f"{name}, mean {sample.mean():.2f}"
        axis.hist(sample, bins, weights=weights, histtype="step", linewidth=1.5, color=color, label=label)
    axis.set(xlabel=xlabel, ylabel="share", title=title)
    axis.legend(fontsize=7)
