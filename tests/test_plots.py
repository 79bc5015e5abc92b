"""One look for all figures, and pictures that show what they should."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from pdl_utils import plots

GREY = torch.full((3, 4, 4), 200, dtype=torch.uint8)


def test_an_overlay_is_grey_without_evidence_and_its_colours_depend_on_what_it_is():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    picture = plots.overlay(GREY, heat)
    np.testing.assert_allclose(picture[3, 3], 200 / 255, rtol=1e-5)
    assert np.ptp(picture[0, 0]) > 0.1
    against = heat - torch.eye(4).flip(0)
    positive, mixed = (plots.overlay(GREY, each, signed=True) for each in (heat, against))
    np.testing.assert_allclose(positive[0, 0], mixed[0, 0])  # whatever the other values
    assert mixed[0, 0, 0] > mixed[0, 0, 2]  # for: orange
    assert mixed[3, 0, 2] > mixed[3, 0, 0]  # against: purple
    for wrong in (against, 2 * heat, heat / 0, torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"heat must be \(4, 4\) in 0\.\.1"):
            plots.overlay(GREY, wrong)
    for wrong in (GREY.float(), GREY - 201.0):  # floats in 0..255; standardised
        with pytest.raises(ValueError, match=r"an image is uint8, or float in 0\.\.1, not in"):
            plots.overlay(wrong, heat)


def test_figures_are_drawn_and_can_be_read():
    plots.use_style()
    np.testing.assert_allclose(plots.gradient_picture(torch.zeros(3, 4, 4)), 0.5)
    pictures, titles = [np.zeros((4, 4, 3))] * 6, ["a very long title of one picture"] * 6
    grid = plots.image_grid(pictures, titles, columns=6)
    assert grid.get_tightbbox().width <= plots.WIDEST + 0.1
    with pytest.raises(ValueError, match="shorter"):  # titles would stand under the wrong pictures
        plots.image_grid(pictures, titles[1:], columns=6)
    assert all(text.get_fontsize() >= 9 for text in grid.findobj(Text) if text.get_text())
    _, (left, right) = plt.subplots(1, 2)
    series = {"one": [1, 2], "three runs": [[1, 2], [2, 3], [3, 4]]}
    plots.curves(left, [1, 2], series, xlabel="x", ylabel="y", title="")
    np.testing.assert_allclose(left.lines[1].get_ydata(), [2, 3])  # the mean
    assert all(float(tick).is_integer() for tick in left.get_xticks())
    plots.comparison(right, {"a": (0.5, 0.4, 0.6)}, xlabel="share", title="t")
    assert [text.get_text() for text in right.get_yticklabels()] == ["a"]
    left.figure.canvas.draw()
    plt.close("all")
