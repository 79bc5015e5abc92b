"""One look for all figures, and pictures that show what they should."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from pdl_utils import plots

GREY = torch.full((3, 4, 4), 200, dtype=torch.uint8)


def test_overlay_shows_grey_where_there_is_no_evidence_and_color_where_there_is():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    picture = plots.overlay(GREY, heat)
    assert picture.shape == (4, 4, 3)
    np.testing.assert_allclose(picture[3, 3], 200 / 255, rtol=1e-5)
    assert np.ptp(picture[0, 0]) > 0.1
    signed = plots.overlay(GREY, heat - torch.eye(4).flip(0), signed=True)
    assert signed[0, 0, 0] > signed[0, 0, 2]  # for: orange
    assert signed[3, 0, 2] > signed[3, 0, 0]  # against: purple


def test_colours_of_a_map_depend_on_what_it_is_and_not_on_its_values():
    positive, mixed = torch.ones(4, 4), torch.ones(4, 4)
    mixed[3, 3] = -0.01
    same = [plots.overlay(GREY, heat, signed=True)[0, 0] for heat in (positive, mixed)]
    np.testing.assert_allclose(*same)
    for wrong in (mixed, 2 * positive, torch.full((4, 4), torch.nan), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"heat must be \(4, 4\) in 0\.\.1"):
            plots.overlay(GREY, wrong)


def test_a_gradient_of_zero_is_grey():
    np.testing.assert_allclose(plots.gradient_picture(torch.zeros(3, 4, 4)), 0.5)
    assert plots.gradient_picture(torch.randn(3, 8, 8)).shape == (8, 8, 3)


def test_grids_can_be_read_and_are_not_too_wide():
    plots.use_style()
    titles = ["a very long title of one picture", "b", "c\nd"]
    figure = plots.image_grid([np.zeros((4, 4, 3))] * 3, titles, columns=2, title="t", row_labels=["r"])
    assert len(figure.axes) == 4
    wide = plots.image_grid([np.zeros((4, 4))] * 6, ["n"] * 6, columns=6, title="long " * 60, row_labels=["r"])
    for drawn in (figure, wide):
        assert drawn.get_tightbbox().width <= plots.WIDEST + 0.1
        assert all(text.get_fontsize() >= 9 for text in drawn.findobj(Text) if text.get_text())
    plt.close("all")


def test_curves_and_bars_draw_and_epochs_are_whole():
    plots.use_style()
    _, (left, right) = plt.subplots(1, 2)
    series = {"one": [1, 2], "three runs": [[1, 2], [2, 3], [3, 4]]}
    plots.curves(left, [1, 2], series, xlabel="x", ylabel="y", title="")
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["one", "three runs"]
    assert all(float(tick).is_integer() for tick in left.get_xticks())
    plots.comparison(right, {"a": (0.5, 0.4, 0.6)}, xlabel="share", title="t", references={"paper": 0.7})
    assert [t.get_text() for t in right.get_yticklabels()] == ["a"]
    plt.close("all")
