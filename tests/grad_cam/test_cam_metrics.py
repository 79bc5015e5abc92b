"""Measures of maps against values worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils import grad_cam as cams
from pdl_utils.grad_cam import checks, metrics


def point(y: int, x: int, size: int = 8) -> torch.Tensor:
    one = torch.zeros(size, size)
    one[y, x] = 1
    return one


BOX = torch.tensor([[2, 3, 5, 6]])  # columns 2..5, rows 3..6


def test_both_ends_of_a_box_are_inside():
    mask = cams.box_masks(BOX, (8, 8))[0]
    assert mask.sum() == 4 * 4
    assert mask[3:7, 2:6].all()
    assert cams.box_masks(torch.tensor([[0, 0, 7, 4]]), (5, 8)).all()


def test_pointing_game_at_the_corners():
    inside, outside = [(3, 2), (6, 5), (3, 5), (6, 2)], [(2, 2), (7, 5), (3, 1), (6, 6)]
    peaks = torch.stack([point(y, x) for y, x in inside + outside])
    assert cams.pointing_game(peaks, BOX.expand(8, 4)).tolist() == [1] * 4 + [0] * 4


def test_the_highest_cell_points_at_its_centre():
    """Cells of 16 pixels: that of row 0, column 3 has its centre at (56, 8). Enlarged, the highest value
    would be a plateau from there to the border, whose first pixel decided."""
    cells = point(0, 3, size=4)[None]
    for box, hit in (([50, 2, 60, 10], 1), ([57, 2, 63, 10], 0), ([50, 9, 60, 20], 0), ([55, 7, 55, 7], 1)):
        assert cams.pointing_game(cells, torch.tensor([box]), (64, 64)).item() == hit


def test_cells_that_are_equally_high_count_by_their_share():
    equal = (point(3, 2) + point(6, 5) * (1 + 1e-7) + point(0, 0) + 0.9 * point(7, 7))[None]
    torch.testing.assert_close(cams.pointing_game(equal, BOX), torch.tensor([2 / 3]))
    torch.testing.assert_close(cams.pointing_game(torch.ones(1, 8, 8), BOX), torch.tensor([16 / 64]))
    centre = cams.pointing_game(torch.ones(2, 1, 1), torch.tensor([[2, 2, 4, 4], [0, 0, 2, 7]]), (8, 8))
    assert centre.tolist() == [1, 0]  # a map of one cell is the baseline that always points at the middle


def test_a_map_of_zeros_points_nowhere():
    everywhere = torch.tensor([[0, 0, 7, 7]])
    assert cams.pointing_game(torch.zeros(1, 8, 8), everywhere).tolist() == [0]
    assert cams.energy_in_box(torch.zeros(1, 8, 8), everywhere).tolist() == [0]


def test_a_map_that_is_not_finite_is_an_error_and_not_a_miss():
    maps = torch.rand(2, 8, 8)
    maps[1, 0, 0] = torch.nan
    boxes, other = BOX.expand(2, 4), torch.rand(2, 8, 8)
    images = torch.rand(2, 3, 8, 8)
    measures = [lambda: cams.pointing_game(maps, boxes), lambda: cams.energy_in_box(maps, boxes),
                lambda: cams.rank_correlation(other, maps), lambda: cams.hottest_overlap(other, maps),
                lambda: cams.mean_interval(maps.flatten()),
                lambda: cams.insertion_deletion(PixelSum(), images, maps, torch.tensor([0, 0]))]  # fmt: skip
    for measure in measures:
        with pytest.raises(ValueError, match="a value is NaN or infinite"):
            measure()


def test_energy_is_a_share_of_the_positive_part():
    heat = point(3, 2) * 3 + point(0, 0) - 5 * point(7, 7)
    assert cams.energy_in_box(heat.unsqueeze(0), BOX).tolist() == [0.75]
    assert cams.energy_in_box(torch.ones(1, 8, 8), BOX).tolist() == [16 / 64]


def test_the_interval_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high = cams.mean_interval(values)
    assert mean == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    share, low, high = cams.mean_interval(torch.tensor([True] * 80 + [False] * 20))
    assert share == pytest.approx(0.8)
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)  # 0.8 ± 1.96·sqrt(0.8·0.2/100)
    assert cams.mean_interval(torch.ones(3)) == (1, 1, 1)
    one, *ends = cams.mean_interval(torch.tensor([0.5]))
    assert (one, np.isnan(ends).tolist()) == (0.5, [True, True])  # one photograph has no spread


class PixelSum(nn.Module):
    """Two classes; the score of class 0 is the sum of the image's left half."""

    def forward(self, x):
        left = x[..., :4].sum((1, 2, 3))
        return torch.stack([left, torch.zeros_like(left)], 1)


def test_a_receptive_field_is_as_wide_as_the_kernels_reach():
    model = nn.Sequential(nn.Conv2d(3, 2, 5, padding=2, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False))
    for layer in model:
        nn.init.ones_(layer.weight)
    images = torch.randn(2, 3, 21, 21)
    assert cams.receptive_fields(model, images, ["1", "0"], share=1 - 1e-6) == {"1": 7, "0": 5}
    assert cams.receptive_fields(model, images, ["1"], share=0.5)["1"] < 7
    assert images.grad is None


def test_insertion_and_deletion_follow_the_order_of_the_map():
    image, label = torch.full((1, 3, 8, 8), 0.1), torch.tensor([0])
    good = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2)
    right, wrong = (
        cams.insertion_deletion(PixelSum(), image, m, label, steps=8, blur=0.5) for m in (good, 1 - good)
    )
    full, none = torch.sigmoid(torch.tensor(9.6)), 0.5
    # Half of the pixels, the left ones, are gone after half of the steps, and with them the evidence.
    torch.testing.assert_close(right["deletion"][0, [0, 4, 8]], torch.tensor([full, none, none]))
    torch.testing.assert_close(wrong["deletion"][0, [0, 4, 8]], torch.tensor([full, full, none]))
    torch.testing.assert_close(right["insertion"][0, 8], full)
    assert cams.area(right["deletion"]) < cams.area(wrong["deletion"])
    torch.testing.assert_close(cams.area(torch.tensor([[0.0, 1.0, 1.0]])), torch.tensor([0.75]))


def test_equally_important_pixels_go_in_random_order():
    image, label = torch.full((1, 3, 8, 8), 0.1), torch.tensor([0])
    flat = cams.insertion_deletion(PixelSum(), image, torch.zeros(1, 8, 8), label, steps=2, blur=0.5)
    left_gone = 1 - torch.logit(flat["deletion"][0, 1]) / 9.6  # of the left half, after half of all pixels
    assert 0.3 < left_gone < 0.7
    assert left_gone != 0.5  # row by row it would be exactly half


def test_insertion_starts_from_a_blurred_image_and_ends_with_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model.train()
    image, label = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    curves = cams.insertion_deletion(model, image, torch.rand(2, 16, 16), label, steps=4, blur=2.0)
    whole = model(image).softmax(1)[torch.arange(2), label].detach()
    torch.testing.assert_close(curves["insertion"][:, -1], whole)
    torch.testing.assert_close(curves["deletion"][:, 0], whole)
    assert not torch.allclose(curves["insertion"][:, 0], whole)
    assert model.training


def test_rank_correlation():
    a = torch.arange(16.0).view(1, 4, 4)
    assert cams.rank_correlation(a, a**3).tolist() == [1.0]
    assert cams.rank_correlation(a, -a).tolist() == [-1.0]
    assert cams.rank_correlation(a, torch.zeros(1, 4, 4)).tolist() == [0.0]
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 40, 40)))
    assert abs(cams.rank_correlation(noise, noise.flip(1)).item()) < 0.1


def test_overlap_of_the_hottest_fifth():
    a = torch.arange(100.0).view(1, 10, 10)
    assert cams.hottest_overlap(a, a * 2).tolist() == [1.0]
    assert cams.hottest_overlap(a, -a).tolist() == [0.0]
    assert cams.hottest_overlap(a, a.roll(1, 1)).item() == pytest.approx(10 / 30)  # one row of two in both
    noise = torch.rand(40, 50, 50, generator=torch.Generator().manual_seed(0))
    assert cams.hottest_overlap(noise[:20], noise[20:]).mean().item() == pytest.approx(0.11, abs=0.01)


def test_randomisation_goes_down_from_the_top_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    changed = {}
    for layer, randomised in cams.cascading_randomization(model, ["3", "0"]):
        changed[layer] = [n for n, v in randomised.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == {"3": ["3.weight", "3.bias"], "0": ["0.weight", "0.bias", "3.weight", "3.bias"]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.rand(1), expected_draw)  # the caller's random numbers are not disturbed
    draws = [next(cams.cascading_randomization(model, ["3"], seed))[1][3].weight for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="layer '2' has no weights"):
        next(cams.cascading_randomization(model, ["2"]))


def test_a_map_of_the_network_forgets_under_randomisation_and_a_map_of_the_image_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
    image = torch.randn(2, 3, 12, 12)
    network = cams.randomization_check(model, lambda net: net(image)[:, 0].detach(), ["1", "0"], draws=3)
    assert network.shape == (3, 2, 2)
    assert (network[:, 1].abs() < 0.6).all()
    assert not torch.equal(network[0], network[1])
    assert (cams.randomization_check(model, lambda _: image[:, 0], ["1"]) == 1).all()


def test_measures_run_on_a_fake_gpu(monkeypatch):
    for module in (checks, metrics):  # a fake tensor has no values to look at
        monkeypatch.setattr(module, "finite", lambda values, what: values)
    monkeypatch.setattr(metrics, "class_scores", lambda model, images: model(images))
    monkeypatch.setattr(metrics, "choose_classes", lambda logits, classes: classes.unsqueeze(1))
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        maps, boxes, images = torch.rand(2, 16, 16), torch.zeros(2, 4, dtype=torch.long), torch.randn(2, 3, 16, 16)
        assert cams.pointing_game(maps, boxes).device.type == cams.energy_in_box(maps, boxes).device.type == "cuda"
        assert cams.hottest_overlap(maps, maps).device.type == "cuda"
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        curves = cams.insertion_deletion(model, images, maps, torch.tensor([0, 2]), steps=2, blur=1.0)
        assert {cams.area(curve).device.type for curve in curves.values()} == {"cuda"}
