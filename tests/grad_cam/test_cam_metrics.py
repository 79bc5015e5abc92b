"""Measures of maps against values worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils import grad_cam as cams
from pdl_utils.datasets import Provenance
from pdl_utils.resnet import PretrainedNetwork


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
    assert cams.pointing_game(peaks, BOX.expand(8, 4)).tolist() == [True] * 4 + [False] * 4


def test_a_map_of_zeros_points_nowhere():
    everywhere = torch.tensor([[0, 0, 7, 7]])
    assert cams.pointing_game(torch.zeros(1, 8, 8), everywhere).tolist() == [False]
    assert cams.energy_in_box(torch.zeros(1, 8, 8), everywhere).tolist() == [0.0]


def test_energy_is_a_share_of_the_positive_part():
    heat = point(3, 2) * 3 + point(0, 0) - 5 * point(7, 7)
    assert cams.energy_in_box(heat.unsqueeze(0), BOX).tolist() == [0.75]
    uniform = torch.ones(1, 8, 8)
    assert cams.energy_in_box(uniform, BOX).tolist() == [16 / 64]


def test_the_interval_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, low, high = cams.mean_interval(values)
    assert mean == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    share, low, high = cams.mean_interval(torch.tensor([True] * 80 + [False] * 20))
    assert share == pytest.approx(0.8)
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)  # 0.8 ± 1.96·sqrt(0.8·0.2/100)


def test_boxes_are_scored_beside_two_baselines():
    maps = torch.stack([point(3, 2), point(0, 0)])
    scores = cams.score_boxes({"ours": maps}, BOX.expand(2, 4))
    assert list(scores) == ["anywhere", "centre point", "ours"]
    assert scores["ours"][0][0] == scores["ours"][1][0] == 0.5
    assert scores["centre point"][0][0] == scores["centre point"][1][0] == 1.0  # (4, 4) is inside
    assert scores["anywhere"][0][0] == scores["anywhere"][1][0] == 0.25


def test_labels_of_a_data_set_become_classes_of_a_network():
    categories = ["goldfish", "crane", "tabby", "crane"]
    network = PretrainedNetwork(nn.Identity(), categories, 64, 64, Provenance("weights", "a test"))
    names = ["tabby, tabby cat", "goldfish, Carassius auratus", None, "crane", "lorry", "Goldfish"]
    classes, known = cams.match_classes(names, network.class_of)
    assert classes.tolist() == [2, 0, -1, -1, -1, 0]  # class 0 is a class as well; "crane" are two
    assert known.tolist() == [True, True, False, False, False, True]
    assert classes.dtype == torch.int64


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
    image = torch.full((1, 3, 8, 8), 0.1)
    good = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2)
    model, label = PixelSum(), torch.tensor([0])
    right = cams.insertion_deletion(model, image, good, label, steps=8, blur=0.5)
    wrong = cams.insertion_deletion(model, image, 1 - good, label, steps=8, blur=0.5)
    full, none = torch.sigmoid(torch.tensor(9.6)), 0.5
    assert right.share.tolist() == [i / 8 for i in range(9)]
    # Half of the pixels, the left ones, are gone after half of the steps, and with them the evidence.
    torch.testing.assert_close(right.deletion[0, [0, 4, 8]], torch.tensor([full, none, none]))
    torch.testing.assert_close(wrong.deletion[0, [0, 4, 8]], torch.tensor([full, full, none]))
    torch.testing.assert_close(right.insertion[0, 8], full)
    assert right.areas()[1] < wrong.areas()[1]
    torch.testing.assert_close(right.areas()[1][0], torch.trapezoid(right.deletion[0], right.share))


def test_insertion_starts_from_a_blurred_image_and_ends_with_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model.train()
    image = torch.randn(2, 3, 16, 16)
    label = torch.tensor([0, 2])
    curves = cams.insertion_deletion(model, image, torch.rand(2, 16, 16), label, steps=4, blur=2.0)
    whole = model(image).softmax(1)[torch.arange(2), label].detach()
    torch.testing.assert_close(curves.insertion[:, -1], whole)
    torch.testing.assert_close(curves.deletion[:, 0], whole)
    assert not torch.allclose(curves.insertion[:, 0], whole)
    assert model.training


def test_rank_correlation():
    a = torch.arange(16.0).view(1, 4, 4)
    assert cams.rank_correlation(a, a**3).tolist() == [1.0]
    assert cams.rank_correlation(a, -a).tolist() == [-1.0]
    assert cams.rank_correlation(a, torch.zeros(1, 4, 4)).tolist() == [0.0]
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 40, 40)))
    assert abs(cams.rank_correlation(noise, noise.flip(1)).item()) < 0.1


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


def test_randomization_check_tells_a_map_of_the_network_from_a_map_of_the_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
    image = torch.randn(2, 3, 12, 12)
    of_the_network = cams.randomization_check(model, lambda net: net(image)[:, 0].detach(), ["1", "0"])
    of_the_image = cams.randomization_check(model, lambda net: image[:, 0], ["1", "0"])
    assert list(of_the_network) == ["1", "0"]
    assert (of_the_network["0"].abs() < 0.6).all()
    assert all((similarity == 1).all() for similarity in of_the_image.values())


def test_measures_run_on_a_fake_gpu():
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        maps, boxes, images = torch.rand(2, 16, 16), torch.zeros(2, 4, dtype=torch.long), torch.randn(2, 3, 16, 16)
        assert cams.pointing_game(maps, boxes).device.type == cams.energy_in_box(maps, boxes).device.type == "cuda"
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        curves = cams.insertion_deletion(model, images, maps, torch.tensor([0, 2]), steps=2, blur=1.0)
        assert {area.device.type for area in curves.areas()} == {"cuda"}
