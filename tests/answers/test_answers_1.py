"""The answers to notebook 1's exercises, on the photographs that need no download: docs/answers.md."""

import pytest
import torch

from pdl_utils.grad_cam import rank_correlation

CORE = "FIRST =", "def class_map"


@pytest.fixture
def cells(notebook_cells):
    return notebook_cells("1_grad_cam")


def maps_of(space, layer, count):
    """Maps of the first photographs, for what they most probably show."""
    model, images, classes = space["model"], space["images"][:count], space["guesses"][:count, 0]
    layer = model.get_submodule(layer)
    return torch.stack([space["class_map"](model, layer, images[[i]], c) for i, c in enumerate(classes)])


def test_log_probabilities_keep_each_map_in_its_own_half(cells):
    logit = cells(*CORE, "pair =")["left"]
    change = {"model(image)[0, class_number]": "model(image).log_softmax(1)[0, class_number]"}
    log_probability = cells(*CORE, "pair =", change=change)["left"]
    assert log_probability[0] >= logit[0] > 0.9
    assert log_probability[1] < logit[1] < 0.3


def test_without_a_copy_the_map_is_that_of_the_block(cells):
    copied, shared = cells(*CORE), cells(*CORE, change={"return output.clone()": "return output"})
    block = maps_of(copied, "layer4", 1)
    assert torch.equal(maps_of(shared, "layer4.2.bn2", 1), block)
    assert not torch.allclose(maps_of(copied, "layer4.2.bn2", 1), block)
    with pytest.raises(LookupError, match="no cell that runs holds"):  # or a change would be none
        cells(*CORE, change={"return output.copy()": "return output"})


def test_cell_by_cell_only_the_last_stage_stays_the_same(cells):
    mean, each = cells(*CORE), cells(*CORE, change={"gradient.mean((2, 3), keepdim=True)": "gradient"})
    maps = [(maps_of(mean, f"layer{stage}", 6), maps_of(each, f"layer{stage}", 6)) for stage in (1, 2, 3, 4)]
    torch.testing.assert_close(maps[3][1], maps[3][0], rtol=1e-3, atol=1e-4)
    alike = [rank_correlation(*pair).mean() for pair in maps[:3]]
    assert alike[0].abs() < 0.1
    assert alike[0] < alike[1] < alike[2] < 0.8


def test_the_average_box_is_one_more_answer_without_a_network(make_official, cells):
    make_official("tiny").write()  # two images: a wide box in the middle rows, and one of a single pixel within it
    old = 'hits = {"anywhere": area,'
    new = 'hits = {"average box": cams.pointing_game(cams.box_masks(boxes, (64, 64)).float().mean(0).expand('
    change = {old: new + 'len(boxes), -1, -1), boxes, (64, 64)), "anywhere": area,'}
    hits = cells(*CORE, "STAGES =", "def if_there_is", "hits =", change=change)["hits"]
    assert hits["average box"].tolist() == [1, 1]  # both overlap in that pixel
    assert hits["centre point"].tolist() == [1, 0]
