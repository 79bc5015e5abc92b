"""The answers to notebook 1's exercises, on the photographs that need no download: docs/answers.md."""

import pytest
import torch

from pdl_utils.grad_cam import rank_correlation

CORE = "FIRST =", "def class_map"


@pytest.fixture
def cells(notebook_cells):
    return notebook_cells("1_grad_cam")


def test_log_probabilities_keep_each_map_in_its_own_half(cells):
    logit = cells.run(*CORE, "pair =")
    old, new = "model(image)[0, class_number]", "model(image).log_softmax(1)[0, class_number]"
    log_probability = cells.run(*CORE, "pair =", change={old: new})
    assert log_probability["left"][0] >= logit["left"][0] > 0.9
    assert log_probability["left"][1] < logit["left"][1] < 0.3


def test_without_a_copy_the_map_is_that_of_the_block(cells):
    def map_of(space, layer):
        layer = space["model"].get_submodule(layer)
        return space["class_map"](space["model"], layer, space["images"][:1], space["guesses"][0, 0])

    copied = cells.run(*CORE)
    shared = cells.run(*CORE, change={"return output.clone()": "return output"})
    assert torch.equal(map_of(shared, "layer4.2.bn2"), map_of(copied, "layer4"))
    assert not torch.allclose(map_of(copied, "layer4.2.bn2"), map_of(copied, "layer4"))


def test_cell_by_cell_only_the_last_stage_stays_the_same(cells):
    def maps_of(space, stage):
        model, images, classes = space["model"], space["images"][:6], space["guesses"][:6, 0]
        layer = model.get_submodule(stage)
        pairs = zip(images, classes, strict=True)
        return torch.stack([space["class_map"](model, layer, image[None], c) for image, c in pairs])

    mean, each = cells.run(*CORE), cells.run(*CORE, change={"gradient.mean((2, 3), keepdim=True)": "gradient"})
    torch.testing.assert_close(maps_of(each, "layer4"), maps_of(mean, "layer4"), rtol=1e-3, atol=1e-4)
    alike = [rank_correlation(maps_of(mean, f"layer{s}"), maps_of(each, f"layer{s}")).mean() for s in (1, 2, 3)]
    assert alike[0] < alike[1] < alike[2] < 0.8
    assert alike[0].abs() < 0.1


def test_the_average_box_is_one_more_answer_without_a_network(make_official, notebook_cells):
    make_official("tiny").write()  # two images: a wide box in the middle rows, and one of a single pixel within it
    old = 'hits = {"anywhere": area,'
    new = 'hits = {"average box": cams.pointing_game(cams.box_masks(boxes, (64, 64)).float().mean(0).expand('
    change = {old: new + 'len(boxes), -1, -1), boxes, (64, 64)), "anywhere": area,'}
    space = notebook_cells("1_grad_cam").run(*CORE, "STAGES =", "def if_there_is", "hits =", change=change)
    assert space["hits"]["average box"].tolist() == [1, 1]  # both overlap in that pixel
    assert space["hits"]["centre point"].tolist() == [1, 0]
