"""The weight files that ship: small, complete in their facts, described by README with the same numbers, and as
good as they say."""

import math
from types import SimpleNamespace

import pytest

from pdl_utils.datasets import cifar10, tiny_imagenet
from pdl_utils.few_labels.simclr import knn_monitor, pretrained_encoder
from pdl_utils.images import accuracy
from pdl_utils.resnet import own_network
from pdl_utils.weights import CHECKPOINTS, load_weights

FILES = sorted(path.name for path in CHECKPOINTS.glob("*.safetensors"))
README = (CHECKPOINTS / "README.md").read_text(encoding="utf-8")


def assert_near(measured, stated, images):
    """Within three standard errors of a share that is measured on so many images."""
    assert abs(measured - stated) < 3 * math.sqrt(stated * (1 - stated) / images), (measured, stated)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_small_and_says_how_it_came_about(name):
    assert (CHECKPOINTS / name).stat().st_size < 45 * 10**6
    weights, facts = load_weights(CHECKPOINTS / name)
    assert all(w.isfinite().all() for w in weights.values())
    assert {"arch", "data", "recipe", "epochs", "seed", "training_minutes", "hardware", "versions"} <= set(facts)
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`") and "minutes" in line]
    figures = facts["top1"].values() if "top1" in facts else facts.get("knn", [])[-1:]
    assert all(f"{figure:.1%}" in row for figure in figures)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34"])
def test_a_network_recognises_as_many_images_as_it_says(arch, real_data):
    real_data("tiny-imagenet-200")
    _, facts = load_weights(CHECKPOINTS / f"{arch}_tiny_imagenet.safetensors")
    network, side = own_network(arch), facts["resolution"]
    data = tiny_imagenet("val", limit=300)
    assert network.categories == [name.split(",")[0] for name in data.names]
    assert_near(accuracy(network.model, data.images, data.labels, side), facts["top1"][str(side)], 300)


def test_the_neighbours_of_the_encoders_features_are_of_the_same_class_as_often_as_it_says(real_data):
    real_data("cifar-10-batches-py")
    encoder, provenance, facts = pretrained_encoder()
    assert f"{facts['epochs']} epochs" in provenance.source
    data = cifar10()
    monitor = knn_monitor(data.train_images, data.train_labels, bank=10_000, queries=1_000)
    assert_near(monitor(SimpleNamespace(encoder=encoder))["knn"], facts["knn"][-1], 1_000)
