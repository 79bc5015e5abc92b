"""Figures of graphs: what must be in them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from pdl_utils.datasets.synthetic_graphs import SMALL, ppi_stand_in
from pdl_utils.graphs import UniformConv, plots


@pytest.fixture
def axis() -> Axes:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


@pytest.fixture
def star() -> torch.Tensor:
    """1, 2 and 3 around 0; 1 and 2 know each other; 4 is alone; with self-loops."""
    edges = torch.tensor([[1, 2, 3, 1, 2], [0, 0, 0, 2, 1]])
    return UniformConv(1, 1)(torch.zeros(5, 1), edges, return_attention_weights=True)[1][0]


def texts(axis: Axes) -> str:
    return "\n".join(text.get_text() for text in axis.texts)


def test_small_graph_shows_nodes_and_the_weights_into_one(axis, star):
    place = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1), 4: (2, 0)}
    weight = torch.linspace(0.1, 0.9, star.shape[1])
    plots.small_graph(axis, star, place, title="", weight=weight)
    expected = [f"{w:.2f}" for w, target in zip(weight, star[1], strict=True) if target == 0]
    shown = texts(axis).split()
    assert sorted(shown) == sorted([*expected, *"01234"])
    assert len(axis.patches) == 1  # the circle: its edge to itself


def test_neighbourhood_shows_attention_as_width_and_likeness_as_colour(axis, star):
    alpha = torch.where(star[0] == 3, 0.6, 0.2)
    likeness = torch.where(star[0] == 2, 0.9, 0.2)
    plots.draw_neighbourhood(axis, star, 0, likeness, title="", alpha=alpha)
    among, *spokes = axis.lines
    assert among.get_color() == "0.88"
    widths = sorted(line.get_linewidth() for line in spokes)
    assert widths == pytest.approx([0.3 + 9 * 0.2, 0.3 + 9 * 0.2, 0.3 + 9 * 0.6])  # the same in every figure
    assert axis.patches[0].get_linewidth() == pytest.approx(0.3 + 9 * 0.2)  # the edge to itself
    colors = [tuple(dots.get_facecolor()[0]) for dots in axis.collections]
    # The neighbour that is most alike comes first, the centre last.
    assert [colors.count(color) for color in dict.fromkeys(colors)] == [1, 2, 1]


@pytest.mark.parametrize("weighted", [True, False])
def test_neighbourhood_of_a_lonely_node(axis, star, weighted):
    each = torch.ones(star.shape[1])
    plots.draw_neighbourhood(axis, star, 4, each, title="alone", alpha=each if weighted else None)
    assert not axis.lines
    assert len(axis.patches) == weighted


def test_complexes_are_drawn_beside_their_decoys(axis):
    graph = ppi_stand_in(SMALL)["test"][0]
    plots.draw_complexes(axis, graph, pairs=2)
    side = np.array([dots.get_offsets()[0, 0] > 1.5 for dots in axis.collections])
    green = np.array([tuple(dots.get_facecolor()[0]) for dots in axis.collections])
    assert len({tuple(color) for color in green[side]}) == len({tuple(color) for color in green[~side]}) == 1
    assert {line.get_color() for line in axis.lines} == {plots.COLORS[0], plots.COLORS[1]}


def test_seed_points_show_mean_and_sample_deviation(axis):
    plots.seed_points(axis, {"GAT": [0.90, 0.94, 0.98], "alone": [0.5]}, xlabel="F1", title="")
    assert texts(axis) == "0.940 ± 0.040\n0.500"
    spread = next(line for line in axis.lines if list(line.get_ydata()) == [0, 0])
    np.testing.assert_allclose(spread.get_xdata(), [0.90, 0.98])  # ddof=1: sqrt((0.04² + 0.04²) / 2)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["GAT", "alone"]


def test_marks_and_pictures_show_the_numbers_given(axis):
    plots.attention_matrix(axis, torch.eye(3), title="")
    np.testing.assert_array_equal(axis.images[0].get_array(), np.eye(3))
    plots.two_sides(axis, {"GAT": [[0.2, 0.9]]}, title="")
    assert axis.collections[-1].get_offsets().tolist() == [[0.2, 0.9]]
    plots.head_points(axis, {"GAT": [[0.1, 0.2], [0.3]]}, ylabel="", title="", reference=0)
    marks = [dots.get_offsets().tolist() for dots in axis.collections[-2:]]
    assert marks == [[[1, 0.1], [1, 0.2]], [[2, 0.3]]]
