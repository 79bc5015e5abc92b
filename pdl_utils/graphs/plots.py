"""Figures of graphs and of what attention looks at. edge_index (2, E) and alpha are as the layers give them."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import degree

from pdl_utils.plots import COLORS, HEAT, MARKERS, STYLES

LIKENESS = {"cmap": "cividis", "norm": mpl.colors.Normalize(0, 1)}  # how alike two nodes are


def small_graph(
    axis: Axes, edge_index: Tensor, place: Mapping[int, tuple[float, float]], *, title: str,
    weight: Tensor | None = None, into: int = 0,
) -> None:  # fmt: skip
    """A graph of a few nodes, named by their numbers and drawn at their places. With `weight` (E,) in 0..1 the
    edges into one node are arrows as wide as their weight, and its edge to itself a circle of that width."""
    spots = np.array([place[node] for node in range(len(place))], dtype=float)
    if weight is None:
        draw_edges(axis, spots, edge_index, "0.6", 1.5)
    else:
        here, end = edge_index[1] == into, spots[into]
        for start, width in zip(spots[edge_index[0, here].cpu()], weight[here].tolist(), strict=True):
            along = end - start
            if not along.any():
                ring(axis, start, 0.24, width)
                aside = np.array([0, 0.6])
            else:
                look = {"arrowstyle": "-|>", "linewidth": 1 + 8 * width, "shrinkA": 12, "shrinkB": 14}
                axis.annotate("", end, start, arrowprops=look | {"color": COLORS[0]}, zorder=1)
                aside = 0.2 * np.array([-along[1], along[0]]) / np.linalg.norm(along)  # to the arrow's left
            axis.text(*(start + along / 2 + aside), f"{width:.2f}", ha="center", va="center")
    axis.scatter(*spots.T, s=330, color="white", edgecolors="black", zorder=3)
    for node, spot in enumerate(spots):
        axis.text(*spot, str(node), ha="center", va="center", zorder=4)
    axis.margins(0.18)
    axis.set(aspect="equal", title=title)
    axis.set_axis_off()


def ring(axis: Axes, place: Sequence[float], radius: float, weight: float) -> None:
    """A node's edge to itself: a circle above it, as wide as its weight in 0..1."""
    around = place[0], place[1] + radius
    axis.add_patch(mpl.patches.Circle(around, radius, fill=False, linewidth=0.3 + 9 * weight, color=COLORS[0]))


def circle(count: int, x: float = 0, y: float = 0) -> np.ndarray:
    """Places (count, 2) in a circle of radius 1 around (x, y), counter-clockwise from its right."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + np.cos(angle), y + np.sin(angle)], axis=1)


def draw_edges(axis: Axes, place: np.ndarray, edge_index: Tensor, color: str, width: float) -> None:
    """Edges among the nodes that have a place, (N, 2) with NaN for the others; one line for both directions."""
    pairs = np.sort(edge_index.cpu(), axis=0)
    shown = (pairs[0] < pairs[1]) & np.isfinite(place[pairs]).all(axis=(0, 2))
    ends = place[np.unique(pairs[:, shown], axis=1)]  # (2, E, 2)
    axis.plot(*ends.transpose(2, 0, 1), color=color, linewidth=width, zorder=1)


def node_of_degree(edge_index: Tensor, wanted: int) -> int:
    """The node whose number of incoming edges comes closest to `wanted`; the first of equals."""
    return int((degree(edge_index[1]) - wanted).abs().argmin())


def draw_neighbourhood(
    axis: Axes, edge_index: Tensor, centre: int, likeness: Tensor, *, title: str, alpha: Tensor | None = None
) -> None:
    """A node in the middle, its neighbours in a circle around it, and in grey the edges among these. `likeness`
    (E,) in 0..1, such as `jaccard`, colours a neighbour and orders the circle; `alpha` (E,) is the width of the
    edges into the centre, on one scale for all figures, and of the circle that is its edge to itself."""
    into = (edge_index[1] == centre) & (edge_index[0] != centre)
    into = into.nonzero().squeeze(1)[likeness[into].argsort(descending=True, stable=True)]
    place, around = np.full((int(edge_index.max()) + 1, 2), np.nan), edge_index[0, into].cpu()
    place[around] = circle(len(into))
    draw_edges(axis, place, edge_index, "0.88", 0.7)
    for edge, (x, y) in zip(into, place[around], strict=True):
        width = 1 if alpha is None else 0.3 + 9 * float(alpha[edge])
        axis.plot([0, x], [0, y], color=COLORS[0], linewidth=width, alpha=0.8, zorder=2)
    axis.scatter(*place[around].T, c=likeness[into].cpu(), **LIKENESS, s=46, edgecolors="white", zorder=3)
    loop = (edge_index == centre).all(0)
    if alpha is not None and loop.any():
        ring(axis, (0, 0), 0.2, float(alpha[loop][0]))
    axis.scatter(0, 0, color="black", marker="*", s=170, edgecolors="white", zorder=4)
    axis.set(title=title, aspect="equal")
    axis.set_axis_off()


def likeness_bar(figure: Figure, axes: Sequence[Axes], label: str) -> None:
    """The colours of `draw_neighbourhood`, beside `axes`."""
    figure.colorbar(mpl.cm.ScalarMappable(**LIKENESS), ax=list(axes), shrink=0.8, label=label)


def draw_complexes(axis: Axes, graph: Data, pairs: int = 2) -> None:
    """Complexes of a synthetic graph, each beside its decoy, one compartment left and the other right: edges
    within a complex blue, those between a complex and its decoy orange."""
    place, ends = np.full((graph.num_nodes, 2), np.nan), graph.complex[graph.edge_index]
    for row in range(pairs):
        decoy = int(ends[1, (ends[0] == 2 * row) & ~graph.functional][0])
        for column, number in enumerate((2 * row, decoy)):
            members = (graph.complex == number).cpu()
            place[members] = circle(int(members.sum()), 3 * column, -2.5 * row)
    draw_edges(axis, place, graph.edge_index[:, ~graph.functional], COLORS[1], 0.5)
    draw_edges(axis, place, graph.edge_index[:, graph.functional], COLORS[0], 0.8)
    colors = np.where(graph.x[:, 0].cpu() > 0, COLORS[2], COLORS[5])
    axis.scatter(*place.T, s=26, c=colors, edgecolors="white", zorder=2)
    axis.set(aspect="equal", title="complexes and their decoys")
    axis.set_axis_off()


def seed_points(axis: Axes, values: Mapping[str, Sequence[float]], *, xlabel: str, title: str) -> None:
    """One row a name, first on top: a small mark for every seed, a large one for their mean, and a line of one
    sample standard deviation to both sides."""
    for row, seeds in enumerate(values.values()):
        mean, spread = float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        axis.errorbar(mean, row, xerr=spread, fmt="o", color=COLORS[0], ecolor="black")
        axis.scatter(seeds, [row + 0.24] * len(seeds), s=14, color=COLORS[1], marker="|", zorder=3)
        text = f"{mean:.4f}" + (f" ± {spread:.4f}" if len(seeds) > 1 else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axis.annotate(text, (mean, row), (0, 6), textcoords="offset points", ha="center", bbox=box)
    axis.set_yticks(range(len(values)), list(values))
    axis.margins(x=0.35)  # room for the numbers
    axis.set(xlabel=xlabel, title=title, ylim=(len(values) - 0.5, -0.8))


def head_points(
    axis: Axes, scores: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str, title: str, reference: float
) -> None:
    """One mark a head, above its layer: network → layers → a score a head. A dashed line at `reference`."""
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
        look = {"color": COLORS[index], "marker": MARKERS[index], "s": 26, "alpha": 0.8}
        axis.scatter(*np.asarray(each).T, label=f"{name}, {len(each)} heads", **look)
    axis.plot([0, 1], [1, 0], color="black", linestyle=STYLES[1], linewidth=1, label="one gains, one loses")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title=title)
    axis.set(xlabel="ROC-AUC, targets in one compartment", ylabel="ROC-AUC, in the other")
    axis.legend()
