"""Figures of graphs, of the networks that run on them, and of what attention looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from pdl_utils.graphs.layers import GraphNet, SortedEdges
from pdl_utils.plots import COLORS, HEAT, MARKERS, SIGNED, STYLES

LIKENESS = "cividis"  # how alike two nodes are, 0..1


def graphs_overview(sizes: Mapping[str, Sequence[int]], degrees: Tensor, labels: Tensor, *, title: str) -> Figure:
    """Four panels: nodes a graph in each split, neighbours a node, share of nodes that have each label, and the
    correlation between labels, those that go together side by side.

    Args:
        sizes: split → nodes of each of its graphs.
        degrees: int (N,), without self-loops.
        labels: (N, L) of 0 and 1; those that never vary have no correlation and are left out.
    """
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.9), width_ratios=[1, 1, 1, 1.25])
    axes[0].hist(list(sizes.values()), bins=10, stacked=True, label=list(sizes), color=COLORS[: len(sizes)])
    axes[0].set(xlabel="nodes", ylabel="graphs", title="sizes")
    axes[0].legend()
    axes[1].hist(degrees.cpu().numpy(), bins=40, color=COLORS[0])
    axes[1].set(xlabel="neighbours", ylabel="nodes", yscale="log", title="degrees")
    axes[2].plot(labels.mean(0).sort(descending=True).values.cpu().numpy(), color=COLORS[0])
    axes[2].set(xlabel="label, the commonest first", ylabel="share of nodes", ylim=(0, 1), title="label frequency")
    correlation = np.corrcoef(labels[:, labels.std(0) > 0].cpu().numpy().T)
    order = leaves_list(linkage(correlation, "average", optimal_ordering=True))
    picture = axes[3].imshow(correlation[np.ix_(order, order)], cmap=SIGNED, vmin=-1, vmax=1)
    figure.colorbar(picture, ax=axes[3], shrink=0.8, label="correlation")
    axes[3].set(title="which labels go together", xlabel="label", ylabel="label")
    axes[3].grid(visible=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def node_of_degree(graph: SortedEdges, wanted: int) -> int:
    """The node whose number of edges comes closest to `wanted`; the first of equals."""
    return int((graph.degree - wanted).abs().argmin())


def draw_neighbourhood(
    axis: Axes, graph: SortedEdges, centre: int, likeness: Tensor, *, title: str, weight: Tensor | None = None
) -> None:
    """A node in the middle, its neighbours in a circle around it, and in grey the edges among these.

    Args:
        likeness: (E,) in 0..1, such as `shared_labels`: the colour of a neighbour, and its place in the circle.
        weight: (E,), such as attention: the width of the edges into the centre; all thin without it.
    """
    into = range(int(graph.rowptr[centre]), int(graph.rowptr[centre + 1]))
    edge = {int(graph.source[e]): e for e in into if int(graph.source[e]) != centre}  # neighbour → an edge from it
    ring = sorted(edge, key=lambda node: -float(likeness[edge[node]]))
    angle = np.linspace(0, 2 * np.pi, len(ring), endpoint=False)
    place = dict(zip(ring, np.stack([np.cos(angle), np.sin(angle)], axis=1), strict=True))
    around = torch.tensor(ring, device=graph.source.device)
    among = torch.isin(graph.source, around) & torch.isin(graph.target, around)
    for a, b in {tuple(sorted(pair)) for pair in graph.edge_index[:, among].t().tolist()}:
        if a != b:
            axis.plot(*np.stack([place[a], place[b]]).T, color="0.88", linewidth=0.7, zorder=1)
    thickest = 1.0 if weight is None else max((float(weight[e]) for e in edge.values()), default=1.0)
    for node, spot in place.items():
        thickness = 1.0 if weight is None else 0.3 + 4.5 * float(weight[edge[node]]) / thickest
        axis.plot([0, spot[0]], [0, spot[1]], color="black", linewidth=thickness, alpha=0.75, zorder=2)
        color = mpl.colormaps[LIKENESS](float(likeness[edge[node]]))
        axis.scatter(*spot, color=[color], s=52, edgecolors="white", zorder=3)
    axis.scatter(0, 0, color="black", marker="*", s=210, edgecolors="white", zorder=4)
    axis.set(title=title, aspect="equal")
    axis.set_axis_off()


def likeness_bar(figure: Figure, axes: Sequence[Axes], label: str) -> None:
    """The colours of `draw_neighbourhood`, beside `axes`."""
    colors = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), LIKENESS)
    figure.colorbar(colors, ax=list(axes), shrink=0.8, label=label)


def draw_architecture(axis: Axes, net: GraphNet, *, title: str) -> None:
    """The layers of an attention network as boxes from left to right, read from the network itself."""
    boxes = [f"input\n{net.in_channels} features"]
    for layer in net.layers:
        how = "side by side" if layer.concat else "averaged"
        count = sum(parameter.numel() for parameter in layer.parameters())
        kind, heads = type(layer).__name__, f"{layer.heads} heads × {layer.out_channels}"
        boxes.append(f"{kind}\n{heads}\n{how}\n{count:,} parameters")
    width, gap = 1.0, 0.32
    arrow = {"arrowstyle": "->", "color": "black"}
    skip = {"arrowstyle": "->", "color": COLORS[1], "connectionstyle": "arc3,rad=-0.35"}
    for index, text in enumerate(boxes):
        left = index * (width + gap)
        axis.add_patch(FancyBboxPatch((left, 0), width, 0.55, boxstyle="round,pad=0.03", fc="white", ec=COLORS[0]))
        axis.text(left + width / 2, 0.275, text, ha="center", va="center", fontsize=8)
        if index:
            axis.annotate("", (left - 0.04, 0.275), (left - gap + 0.04, 0.275), arrowprops=arrow)
            if net.layers[index - 1].res is not None:
                axis.annotate("", (left + width - 0.05, 0.6), (left - gap + 0.03, 0.58), arrowprops=skip)
        if 0 < index < len(boxes) - 1:
            axis.text(left + width + gap / 2, 0.34, "ELU", ha="center", fontsize=7)
    axis.set(xlim=(-0.1, len(boxes) * (width + gap) - gap + 0.1), ylim=(-0.1, 0.95), title=title)
    axis.set_axis_off()


def seed_points(
    axis: Axes, values: Mapping[str, Sequence[float]], *, xlabel: str, title: str,
    references: Mapping[str, float] | None = None, papers: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """One row a name, first on top: a small mark for every seed, a large one for their mean, and a line of one
    sample standard deviation to both sides; `references` are vertical lines with a name, `papers` what a paper
    reports for a row."""
    for row, seeds in enumerate(values.values()):
        mean = float(np.mean(seeds))
        text = f"{mean:.4f}"
        if len(seeds) > 1:
            spread = float(np.std(seeds, ddof=1))
            axis.plot([mean - spread, mean + spread], [row, row], color="black", linewidth=1.5, zorder=2)
            axis.scatter(seeds, [row + 0.22] * len(seeds), s=12, color=COLORS[1], marker="|", zorder=3)
            text += f" ± {spread:.4f}"
        axis.scatter(mean, row, s=42, color=COLORS[0], zorder=4)
        at = {"xytext": (0, 7), "textcoords": "offset points", "fontsize": 7.5, "ha": "center"}
        over_the_lines = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(text, (mean, row), bbox=over_the_lines, **at)
    for name, value in (references or {}).items():
        axis.axvline(value, color="black", linestyle=STYLES[1], linewidth=1, label=name)
    if papers:
        rows = [list(values).index(name) for name in papers]
        look = {"marker": "D", "s": 34, "facecolors": "none", "edgecolors": COLORS[5], "label": "as papers report"}
        axis.scatter(list(papers.values()), rows, **look)
    axis.set_yticks(range(len(values)), list(values))
    axis.margins(x=0.16)  # room for the numbers
    axis.set(xlabel=xlabel, title=title, ylim=(len(values) - 0.4, -0.7))
    if references or papers:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=7.5, ncols=2)


def head_points(
    axis: Axes, scores: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str, title: str, reference: float
) -> None:
    """One mark a head, above the number of its layer: network → layers → a score a head; a dashed line at
    `reference`."""
    axis.axhline(reference, color="black", linestyle=STYLES[1], linewidth=1)
    for index, (name, layers) in enumerate(scores.items()):
        shift = 0.24 * (index - (len(scores) - 1) / 2)  # networks side by side
        x = [layer + shift for layer, heads in enumerate(layers, 1) for _ in heads]
        look = {"color": COLORS[index], "marker": MARKERS[index], "s": 26, "alpha": 0.85}
        axis.scatter(x, list(chain.from_iterable(layers)), label=name, **look)
    depth = max(len(layers) for layers in scores.values())
    axis.set_xticks(range(1, depth + 1), [f"layer {layer}" for layer in range(1, depth + 1)])
    axis.set(ylabel=ylabel, title=title, xlim=(0.5, depth + 0.5))


def attention_matrix(axis: Axes, matrix: Tensor, *, title: str) -> None:
    """Attention as a picture, (targets, sources) in 0..1: a row is one target's softmax."""
    picture = axis.imshow(matrix.detach().cpu().numpy(), cmap=HEAT, vmin=0, vmax=1)
    axis.figure.colorbar(picture, ax=axis, shrink=0.75, label="attention")
    axis.set(title=title, xlabel="source (key)", ylabel="target (query)")
    axis.grid(visible=False)


def two_sides(axis: Axes, scores: Mapping[str, np.ndarray], *, xlabel: str, ylabel: str, title: str) -> None:
    """One mark a head: its score on one kind of targets against its score on the other, both in 0..1; on the
    falling diagonal a gain here is a loss there. `scores`: network → (heads, 2)."""
    for index, (name, each) in enumerate(scores.items()):
        label = f"{name}, {len(each)} heads"
        axis.scatter(*np.asarray(each).T, color=COLORS[index], marker=MARKERS[index], label=label)
    axis.plot([0, 1], [1, 0], color="black", linestyle=STYLES[1], linewidth=1, label="one gains, one loses")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()
