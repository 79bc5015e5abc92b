"""Figures of graphs, of the networks that run on them, and of what attention looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from pdl_utils.graph import Graph
from pdl_utils.graph_attention import AttentionConv, Edgeless, GraphNet
from pdl_utils.plots import COLORS, HEAT, SIGNED


def node_of_degree(graph: Graph, wanted: int) -> int:
    """The node whose number of edges comes closest to `wanted`; the first of equals."""
    return int((graph.degree - wanted).abs().argmin())


def draw_neighbourhood(
    axis: Axes,
    graph: Graph,
    centre: int,
    *,
    title: str,
    groups: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """A node, everything with an edge to it, and the edges among these.

    Args:
        groups: int (N,); nodes of the centre's group are drawn in one colour, all others in another.
        weight: (E,) of the edges into the centre; their width is in proportion. Uniform without it.
    """
    into = slice(int(graph.rowptr[centre]), int(graph.rowptr[centre + 1]))
    around = [int(node) for node in graph.source[into] if int(node) != centre]
    share = torch.ones(graph.num_nodes)
    if weight is not None:
        share[graph.source[into]] = (weight[into] / weight[into].max()).float().cpu()
    kept = set(around)
    among = nx.Graph((a, b) for a, b in graph.edge_index.t().tolist() if a in kept and b in kept and a != b)
    among.add_nodes_from(around)
    layout = nx.spring_layout(among, seed=0, k=2.5 / max(1, len(around)) ** 0.5)
    layout[centre] = np.zeros(2)
    nx.draw_networkx_edges(among, layout, ax=axis, edge_color="0.85", width=0.6)
    for node in around:
        ends = np.stack([layout[node], layout[centre]])
        axis.plot(*ends.T, color="black", linewidth=0.3 + 3.2 * float(share[node]), alpha=0.75, zorder=2)
    same = [groups is None or bool(groups[node] == groups[centre]) for node in around]
    for mine, color, marker in ((True, COLORS[0], "o"), (False, COLORS[1], "s")):
        places = np.array([layout[node] for node, is_mine in zip(around, same, strict=True) if is_mine == mine])
        if len(places):
            axis.scatter(*places.T, color=color, marker=marker, s=42, edgecolors="white", zorder=3)
    axis.scatter(0, 0, color="black", marker="*", s=190, edgecolors="white", zorder=4)
    axis.set_title(title)
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
    axis.set(xlim=(-0.1, len(boxes) * (width + gap)), ylim=(-0.1, 0.95), title=title)
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
