"""Figures of graphs: what must be in them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from pdl_utils.graphs import GraphNet, SortedEdges, plots

STAR = torch.tensor([[1, 2, 3, 1], [0, 0, 0, 2]])  # 1, 2 and 3 around 0; 1 and 2 know each other; 4 is alone


@pytest.fixture
def axis() -> Axes:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def texts(axis: Axes) -> str:
    return "\n".join(text.get_text() for text in axis.texts)


def test_neighbourhood_shows_weight_as_width_and_likeness_as_colour(axis):
    graph = SortedEdges.from_edges(STAR, 5)
    weight = torch.where(graph.source == 3, 1.0, 0.5)
    likeness = torch.where(graph.source == 2, 0.9, 0.2)
    plots.draw_neighbourhood(axis, graph, 0, likeness, title="", weight=weight)
    among, *spokes = axis.lines
    assert among.get_color() == "0.88"
    widths = sorted(line.get_linewidth() for line in spokes)
    assert widths[0] == widths[1] < widths[2]
    colors = [tuple(dots.get_facecolor()[0]) for dots in axis.collections]
    # The neighbour that is most alike comes first, the centre last.
    assert [colors.count(color) for color in dict.fromkeys(colors)] == [1, 2, 1]


@pytest.mark.parametrize(("self_loops", "weighted"), [(True, True), (False, False), (False, True)])
def test_neighbourhood_of_a_lonely_node(axis, self_loops, weighted):
    graph = SortedEdges.from_edges(STAR, 5, self_loops=self_loops)
    each = torch.ones(len(graph.source))
    plots.draw_neighbourhood(axis, graph, 4, each, title="alone", weight=each if weighted else None)
    assert not axis.lines


def test_architecture_counts_parameters(axis):
    net = GraphNet(50, 121, "gat", hidden=8, heads=2, depth=2)
    plots.draw_architecture(axis, net, title="")
    for layer in net.layers:
        assert f"{sum(p.numel() for p in layer.parameters()):,} parameters" in texts(axis)
    assert texts(axis).count("ELU") == 1


def test_overview_counts_nodes_and_leaves_out_labels_that_never_vary():
    labels = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])
    degrees = torch.tensor([3, 1, 4, 1])
    figure = plots.graphs_overview({"train": [10, 20], "test": [15]}, degrees, labels, title="The graphs")
    _, counts, _, correlation = figure.axes[:4]
    assert sum(patch.get_height() for patch in counts.patches) == 4
    picture = correlation.images[0].get_array()
    assert picture.shape == (2, 2)
    assert picture.min() < 0
    plt.close(figure)


def test_seed_points_show_mean_and_sample_deviation(axis):
    seeds = [0.90, 0.94, 0.98]
    values = {"GAT": seeds, "alone": [0.5]}
    plots.seed_points(axis, values, xlabel="F1", title="", references={"guess": 0.4}, papers={"alone": 0.6})
    assert texts(axis) == "0.9400 ± 0.0400\n0.5000"
    spread = next(line for line in axis.lines if list(line.get_ydata()) == [0, 0])
    np.testing.assert_allclose(spread.get_xdata(), [0.90, 0.98])  # ddof=1: sqrt((0.04² + 0.04²) / 2)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["GAT", "alone"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["guess", "as papers report"]
    assert axis.collections[-1].get_offsets().tolist() == [[0.6, 1]]


def test_marks_and_pictures_show_the_numbers_given(axis):
    plots.attention_matrix(axis, torch.eye(3), title="")
    np.testing.assert_array_equal(axis.images[0].get_array(), np.eye(3))
    plots.two_sides(axis, {"GAT": np.array([[0.2, 0.9]])}, xlabel="", ylabel="", title="")
    assert axis.collections[-1].get_offsets().tolist() == [[0.2, 0.9]]
    plots.head_points(axis, {"GAT": [[0.1, 0.2], [0.3]]}, ylabel="", title="", reference=0)
    np.testing.assert_allclose(axis.collections[-1].get_offsets(), [[1, 0.1], [1, 0.2], [2, 0.3]])
