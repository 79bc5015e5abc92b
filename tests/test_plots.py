"""One look for all figures, and pictures that show what they should."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from pdl_utils import plots


def test_overlay_shows_grey_where_there_is_no_evidence_and_color_where_there_is():
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    picture = plots.overlay(image, heat)
    assert picture.shape == (4, 4, 3)
    np.testing.assert_allclose(picture[3, 3], 200 / 255, rtol=1e-5)
    assert np.ptp(picture[0, 0]) > 0.1
    signed = plots.overlay(image, heat - torch.eye(4).flip(0))
    assert signed[0, 0, 0] > signed[0, 0, 2]  # for: orange
    assert signed[3, 0, 2] > signed[3, 0, 0]  # against: purple


def test_a_gradient_of_zero_is_grey():
    np.testing.assert_allclose(plots.gradient_picture(torch.zeros(3, 4, 4)), 0.5)
    assert plots.gradient_picture(torch.randn(3, 8, 8)).shape == (8, 8, 3)


def test_grids_curves_and_bars_draw():
    plots.use_style()
    figure = plots.image_grid([np.zeros((4, 4, 3))] * 3, ["a", "b", "c"], columns=2, title="t", row_labels=["r"])
    assert len(figure.axes) == 4
    figure, (left, right) = plt.subplots(1, 2)
    plots.curves(
        left, [1, 2], {"one": [1, 2], "three runs": [[1, 2], [2, 3], [3, 4]]}, xlabel="x", ylabel="y", title=""
    )
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["one", "three runs"]
    plots.comparison(right, {"a": (0.5, 0.4, 0.6)}, xlabel="share", title="t", references={"paper": 0.7})
    assert [t.get_text() for t in right.get_yticklabels()] == ["a"]
    plt.close("all")
