"""Figures of graphs: what must be in them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes

from pdl_utils.graphs import plots as graph_plots
from pdl_utils.graphs.edges import SortedEdges
from pdl_utils.graphs.layers import GraphNet

STAR = torch.tensor([[1, 2, 3, 1], [0, 0, 0, 2]])  # 1, 2 and 3 around 0; 1 and 2 know each other; 4 is alone


@pytest.fixture
def axis() -> Axes:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def texts(axis: Axes) -> str:
    return "\n".join(text.get_text() for text in axis.texts)


def test_node_of_degree():
    graph = SortedEdges.from_edges(STAR, 5)
    assert graph_plots.node_of_degree(graph, 40) == 0
    assert graph_plots.node_of_degree(graph, 2) == 2


def test_neighbourhood_shows_weights_and_groups(axis):
    graph = SortedEdges.from_edges(STAR, 5)
    weight = torch.where(graph.source == 3, 1.0, 0.5)
    graph_plots.draw_neighbourhood(axis, graph, 0, title="", groups=torch.tensor([7, 7, 8, 8, 8]), weight=weight)
    among, *spokes = axis.lines
    assert among.get_color() == "0.88"
    widths = sorted(line.get_linewidth() for line in spokes)
    assert widths[0] == widths[1] < widths[2]
    colors = [tuple(dots.get_facecolor()[0]) for dots in axis.collections]
    assert [colors.count(color) for color in dict.fromkeys(colors)] == [1, 2, 1]  # own, others, the centre


@pytest.mark.parametrize("self_loops", [True, False])
def test_neighbourhood_of_a_lonely_node(axis, self_loops):
    graph_plots.draw_neighbourhood(axis, SortedEdges.from_edges(STAR, 5, self_loops=self_loops), 4, title="alone")
    assert not axis.lines


@pytest.mark.parametrize("conv", ["mlp", "gcn", "gat"])
def test_architecture_counts_parameters(axis, conv):
    net = GraphNet(50, 121, conv, hidden=8, heads=2, depth=2)
    graph_plots.draw_architecture(axis, net, title=conv)
    for layer in net.layers:
        assert f"{sum(p.numel() for p in layer.parameters()):,} parameters" in texts(axis)
    assert texts(axis).count("ELU") == 1


def test_labels_that_never_vary_are_left_out(axis):
    labels = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])
    graph_plots.label_cooccurrence(axis, labels, title="")
    picture = axis.images[0].get_array()
    assert picture.shape == (2, 2)
    assert picture.min() < 0


def test_histograms_leave_out_what_is_not_finite(axis):
    graph_plots.histograms(axis, {"a": torch.tensor([0.1, torch.nan, 0.3])}, bins=[0, 0.2, 1], xlabel="", title="")
    assert axis.get_legend().get_texts()[0].get_text() == "a, mean 0.20"
