"""The weight files that ship: small, complete in their facts, and described by README with the same numbers."""

import pytest
import torch

from pdl_utils.evaluation import outputs
from pdl_utils.few_labels.simclr import pretrained_encoder
from pdl_utils.resnet import own_network
from pdl_utils.settings import REPOSITORY
from pdl_utils.weights import CHECKPOINTS, load_weights, read_digests

FILES = sorted(read_digests(CHECKPOINTS))
README = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")


def test_the_list_of_digests_is_that_of_the_files():
    assert sorted(path.name for path in CHECKPOINTS.glob("*.safetensors")) == FILES
    assert len(FILES) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_small_and_says_how_it_came_about(name):
    limit = 25 if name.startswith("simclr") else 45
    assert (CHECKPOINTS / name).stat().st_size < limit * 10**6
    weights, facts = load_weights(CHECKPOINTS / name)
    assert all(w.isfinite().all() for w in weights.values())
    expected = {"arch", "data", "recipe", "epochs", "seed", "training_minutes", "hardware", "versions"}
    assert expected <= set(facts)
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
    figures = facts["top1"].values() if "top1" in facts else facts["knn"][-1:]
    for figure in figures:
        assert f"{figure:.1%}" in row


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_the_accuracy_that_the_main_readme_gives_is_the_measured_one(arch):
    _, facts = load_weights(CHECKPOINTS / f"{arch}_tiny_imagenet.safetensors")
    main = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"| ResNet-{arch[-2:]} | {facts['top1']['128']:.1%} |" in main
    network = own_network(arch)
    assert len(network.categories) == 200
    assert f"{facts['top1']['128']:.1%}" in network.provenance.source


def test_the_encoder_gives_features_that_depend_on_the_image():
    network, provenance, facts = pretrained_encoder()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    features = outputs(network, images)
    assert features.shape == (4, 8 * facts["width"])
    assert features.std(0).mean() > 0.01
    assert f"{facts['epochs']} epochs" in provenance.source
