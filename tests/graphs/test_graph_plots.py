"""Figures of graphs: all are drawn, and hold the numbers given."""

import matplotlib.pyplot as plt
import pytest
import torch

from pdl_utils.datasets.synthetic_graphs import SMALL, ppi_stand_in
from pdl_utils.graphs import UniformConv, plots


@pytest.fixture
def axes():
    figure, axes = plt.subplots(1, 4)
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def test_graphs_show_attention_as_width_and_as_a_number(axes):
    star = torch.tensor([[1, 2, 3, 1, 2], [0, 0, 0, 2, 1]])  # 1, 2, 3 around 0; 1 and 2 know each other; 4 alone
    _, (star, _) = UniformConv(1, 1)(torch.zeros(5, 1), star, return_attention_weights=True)
    alpha, likeness = star[0] / 5, torch.where(star[0] == 2, 0.9, 0.2)  # 0 to 0.6 into node 0
    place = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1), 4: (2, 0)}
    plots.small_graph(axes[0], star, place, title="", weight=alpha)
    with pytest.raises(IndexError):  # of other edges
        plots.small_graph(axes[0], star, place, title="", weight=alpha.repeat(2))
    for way in (star, star.flip(0)):  # whichever direction an edge has, it is drawn, once
        plots.small_graph(axes[3], way[:, way[0] != way[1]][:, :3], place, title="")
        assert len(axes[3].lines) == 3
        axes[3].clear()
    shown = [text.get_text() for text in axes[0].texts if text.get_text()]
    assert sorted(shown) == sorted(["0.00", "0.20", "0.40", "0.60", *"01234"])
    plots.draw_neighbourhood(axes[1], star, 0, likeness, title="", alpha=alpha)
    _, *spokes = axes[1].lines  # the first is among the neighbours; the one that is most alike comes first
    assert [line.get_linewidth() for line in spokes] == pytest.approx([0.3 + 9 * a for a in (0.4, 0.2, 0.6)])
    plots.draw_neighbourhood(axes[2], star, 4, likeness, title="alone")
    plots.likeness_bar(axes[1].figure, axes[1:3], "jaccard")
    plots.draw_complexes(axes[3], ppi_stand_in(SMALL)["test"][0], pairs=2)
    assert {line.get_color() for line in axes[3].lines} == {plots.COLORS[0], plots.COLORS[1]}


def test_points_show_the_numbers_given(axes):
    plots.seed_points(axes[0], {"GAT": [0.90, 0.94, 0.98], "alone": [0.5]}, xlabel="F1", title="")
    assert [text.get_text() for text in axes[0].texts] == ["0.9400 ± 0.0400", "0.5000"]  # sample deviation
    plots.attention_matrix(axes[1], torch.eye(3), title="")
    plots.two_sides(axes[2], {"GAT": [[0.2, 0.9]]}, title="")
    assert axes[2].collections[-1].get_offsets().tolist() == [[0.2, 0.9]]
    plots.head_points(axes[3], {"GAT": [[0.1, 0.2], [0.3]]}, ylabel="", title="", reference=0)
    marks = [dots.get_offsets().tolist() for dots in axes[3].collections[-2:]]
    assert marks == [[[1, 0.1], [1, 0.2]], [[2, 0.3]]]
