"""Measures of maps against values worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils import grad_cam as cams
from pdl_utils.grad_cam import checks

BOX = torch.tensor([[2, 3, 5, 6]])  # columns 2..5, rows 3..6


def point(y: int, x: int, size: int = 8) -> torch.Tensor:
    one = torch.zeros(size, size)
    one[y, x] = 1
    return one


class PixelSum(nn.Module):
    """Two classes; the score of class 0 is the sum of the image's left half."""

    def forward(self, x):
        left = x[..., :4].sum((1, 2, 3))
        return torch.stack([left, torch.zeros_like(left)], 1)


# Boxes


def test_the_highest_cell_points_at_its_centre():
    """Cells are 16 pixels wide and 8 high: that of row 0, column 3 has its centre at (56, 4). Enlarged, the
    highest value would be a plateau from there to the border, whose first pixel decided."""
    boxes = torch.tensor([[50, 2, 60, 10], [57, 2, 63, 10], [50, 5, 60, 20], [55, 3, 55, 3]])
    hits = cams.pointing_game(point(0, 3, size=4).expand(4, 4, 4), boxes, (32, 64))
    assert hits.tolist() == [1, 0, 0, 1]


def test_cells_that_are_equally_high_count_by_their_share():
    equal = (point(3, 2) + point(6, 5) * (1 + 1e-7) + point(0, 0) + 0.9 * point(7, 7))[None]
    torch.testing.assert_close(cams.pointing_game(equal, BOX), torch.tensor([2 / 3]))
    one_cell = cams.pointing_game(torch.ones(2, 1, 1), torch.tensor([[2, 2, 4, 4], [0, 0, 2, 7]]), (8, 8))
    assert one_cell.tolist() == [1, 0]  # the baseline that always points at the middle


def test_energy_is_a_share_of_the_positive_part_and_zeros_have_none():
    heat = point(3, 2) * 3 + point(0, 0) - 5 * point(7, 7)
    assert cams.energy_in_box(torch.stack([heat, 0 * heat]), BOX.expand(2, 4)).tolist() == [0.75, 0]
    assert cams.pointing_game(0 * heat[None], torch.tensor([[0, 0, 7, 7]])).tolist() == [0]


def test_what_is_not_finite_is_an_error_and_not_a_miss():
    maps, other, boxes = torch.rand(2, 8, 8), torch.rand(2, 8, 8), BOX.expand(2, 4)
    maps[1, 0, 0] = torch.nan
    measures = [
        lambda: cams.pointing_game(maps, boxes),
        lambda: cams.energy_in_box(maps, boxes),
        lambda: cams.rank_correlation(other, maps),
        lambda: cams.hottest_overlap(other, maps),
        lambda: cams.mean_interval(maps.flatten()),
        lambda: cams.insertion_deletion(PixelSum(), torch.rand(2, 3, 8, 8), maps, torch.tensor([0, 0])),
        lambda: cams.receptive_fields(nn.Sequential(nn.Sigmoid()), maps[:, None], ["0"]),
    ]
    for measure in measures:
        with pytest.raises(ValueError, match="a value is NaN or infinite"):
            measure()


def test_maps_and_boxes_of_another_kind_are_refused():
    maps, boxes, images = torch.rand(2, 8, 8), BOX.expand(2, 4), torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"one an image, not Tensor \(2, 1, 8, 8\)"):
        cams.pointing_game(maps[:, None], boxes)
    for wrong in (boxes * 16, torch.tensor([[5, 5, 2, 2]])):  # of a larger image; width and height for corners
        with pytest.raises(ValueError, match="in pixels of 8×8"):
            cams.energy_in_box(maps, wrong)
    with pytest.raises(ValueError, match="one logit is always 1"):
        cams.insertion_deletion(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), images, maps, torch.tensor([0, 0]))
    half = (20 * maps).half()  # in half precision their sum would overflow
    torch.testing.assert_close(cams.energy_in_box(half, boxes), cams.energy_in_box(half.float(), boxes))


# Numbers of maps


def test_the_interval_of_a_mean():
    share, low, high = cams.mean_interval(torch.tensor([True] * 80 + [False] * 20))
    assert share == pytest.approx(0.8)
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)  # 0.8 ± 1.96·sqrt(0.8·0.2/100)
    assert cams.mean_interval(torch.tensor([0.5])) == pytest.approx((0.5, np.nan, np.nan), nan_ok=True)
    assert cams.in_words(torch.ones(3)) == "1.00 (1.00 to 1.00)"
    assert cams.in_words(torch.ones(1)) == "1.00 (one value)"


def test_rank_correlation_and_overlap_of_the_hottest_fifth():
    a = torch.arange(100.0).view(1, 10, 10)
    ranked = cams.rank_correlation(a.expand(3, 10, 10), torch.cat([a**3, -a, 0 * a]))
    assert ranked.tolist() == pytest.approx([1, -1, 0])
    found = cams.hottest_overlap(a.expand(3, 10, 10), torch.cat([a * 2, -a, a.roll(1, 1)]))
    torch.testing.assert_close(found, torch.tensor([1, 0, 10 / 30]))  # the last has one row of two in both
    apart = torch.stack([point(0, 0), point(7, 7)])
    assert cams.hottest_overlap(apart, apart.flip(0)).tolist() == [0, 0]  # zeros are not among the hottest


def test_a_receptive_field_is_as_wide_as_the_kernels_reach_without_their_faint_edges():
    model = nn.Sequential(nn.Conv2d(3, 2, 5, padding=2, bias=False), nn.Conv2d(2, 2, 5, padding=2, bias=False))
    for layer in model:
        nn.init.ones_(layer.weight)
    nn.init.constant_(model[1].weight[..., [0, -1]], 0.01)  # columns that hold 0.3% each
    assert cams.receptive_fields(model, torch.randn(2, 3, 21, 21), ["1", "0"]) == {"1": 7, "0": 5}


# Pixels and weights


def test_insertion_and_deletion_follow_the_order_of_the_map():
    image, label = torch.full((1, 3, 8, 8), 0.1), torch.tensor([0])
    good = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2)

    def probabilities(maps, steps=8):
        return cams.insertion_deletion(PixelSum(), image, maps, label, steps=steps, blur=0.5)["deletion"][0]

    full, none = torch.sigmoid(torch.tensor(9.6)), 0.5
    # Half of the pixels, the left ones, are gone after half of the steps, and with them the evidence.
    torch.testing.assert_close(probabilities(good)[[0, 4, 8]], torch.tensor([full, none, none]))
    torch.testing.assert_close(probabilities(1 - good)[[0, 4, 8]], torch.tensor([full, full, none]))
    torch.testing.assert_close(cams.area(torch.tensor([[0.0, 1.0, 1.0]])), torch.tensor([0.75]))
    left_gone = 1 - torch.logit(probabilities(0 * good, 2)[1]) / 9.6  # of the left half, after half of all pixels
    assert 0.3 < left_gone < 0.7
    assert left_gone != 0.5  # equal pixels go in random order; row by row it would be exactly half


def test_insertion_starts_from_a_blurred_image_and_ends_with_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    image, label = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    curves = cams.insertion_deletion(model, image, torch.rand(2, 16, 16), label, steps=4, blur=2.0)
    whole = model(image).softmax(1)[torch.arange(2), label].detach()
    torch.testing.assert_close(curves["insertion"][:, -1], whole)
    torch.testing.assert_close(curves["deletion"][:, 0], whole)
    assert not torch.allclose(curves["insertion"][:, 0], whole)


def test_randomisation_goes_down_from_the_top_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, changed = torch.get_rng_state(), {}
    for layer, randomised in dict(cams.cascading_randomization(model, ["3", "0"])).items():
        changed[layer] = [n for n, v in randomised.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == {"3": ["3.weight", "3.bias"], "0": ["0.weight", "0.bias", "3.weight", "3.bias"]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are not disturbed
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(4, 1)})  # `reset_parameters` leaves half of its weights
    _, randomised = next(cams.cascading_randomization(attention, ["a"]))
    assert not torch.equal(randomised["a"].in_proj_weight, attention["a"].in_proj_weight)
    with pytest.raises(ValueError, match="layer '2' has no weights"):
        next(cams.cascading_randomization(model, ["2"]))


def test_a_map_of_the_network_forgets_under_randomisation_and_a_map_of_the_image_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
    image = torch.randn(2, 3, 12, 12)

    def explain(net):
        return net(image)[:, 0].detach()

    network = cams.randomization_check(model, explain, ["1", "0"], draws=3)
    assert network.shape == (3, 2, 2)
    assert (network[:, 1].abs() < 0.6).all()
    assert not torch.equal(network[0], network[1])
    assert torch.equal(network[:2], cams.randomization_check(model, explain, ["1", "0"], draws=2))
    assert (cams.randomization_check(model, lambda _: image[:, 0], ["1"]) == 1).all()


def test_measures_run_on_a_fake_gpu(monkeypatch):
    monkeypatch.setattr(checks, "finite", lambda values, what: values)  # a fake tensor has no values to look at
    monkeypatch.setattr(checks, "boxes_in", lambda size, boxes: boxes)
    monkeypatch.setattr(checks, "class_scores", lambda model, images: model(images))
    monkeypatch.setattr(checks, "choose_classes", lambda logits, classes: classes.unsqueeze(1))
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        maps, boxes, images = torch.rand(2, 8, 8), torch.zeros(2, 4, dtype=torch.long), torch.randn(2, 3, 8, 8)
        curves = cams.insertion_deletion(PixelSum(), images, maps, torch.tensor([0, 1]), steps=2, blur=1.0)
        found = cams.box_masks(boxes, (8, 8)), cams.hottest_overlap(maps, maps)
        assert {value.device.type for value in (*found, *curves.values())} == {"cuda"}
