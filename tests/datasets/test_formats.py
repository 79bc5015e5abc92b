"""What each data set holds, value by value; the choice of photographs; stand-ins; the real files, if at hand."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdl_utils.datasets import cifar10, imagenet_photos, mnist, stand_ins
from pdl_utils.settings import data_root

module = importlib.import_module("pdl_utils.datasets.tiny_imagenet")  # not the function of the same name
tiny_imagenet = module.tiny_imagenet
REAL_DATA = Path(os.environ.get("PDL_DATA", "")).expanduser()
WNIDS = ["n01443537", "n02123045"]

pytestmark = pytest.mark.usefixtures("fresh_data")


def test_cifar10_values(make_official):
    official = make_official("cifar10")
    official.write()
    data = cifar10()
    batches = [pickle.loads(official.files[f"cifar-10-batches-py/data_batch_{i}"]) for i in range(1, 6)]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert torch.equal(data.train_images, torch.from_numpy(pixels))
    assert data.train_labels.tolist() == [label for batch in batches for label in batch["labels"]]
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.classes[3] == "class 3"


def test_mnist_values(make_official):
    official = make_official("mnist")
    official.write()
    data = mnist()
    assert data.train_images.numpy().tobytes() == official.files["MNIST/raw/train-images-idx3-ubyte"][16:]
    assert data.train_images.shape == (6, 1, 28, 28)
    assert data.test_images.shape == (3, 1, 28, 28)
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])


def test_tiny_imagenet_values(make_official):
    make_official("tiny").write()
    train, val = (tiny_imagenet(split) for split in ("train", "val"))
    assert (train.wnids, train.names) == (WNIDS, ["goldfish", "tabby, cat"])
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.boxes[2].tolist() == [1, 2, 3, 2]
    assert "3 training images a class" in str(train.provenance)
    assert val.labels.tolist() == [1, 0]
    assert val.boxes.tolist() == [[0, 5, 63, 50], [9, 9, 9, 9]]
    assert val.images.dtype == torch.uint8
    assert val.images[:, :, 30, 30].sub(torch.tensor([[0, 0, 30], [100, 0, 30]])).abs().max() <= 3
    with pytest.raises(ValueError, match="'train' or 'val'"):
        tiny_imagenet("test")


def test_tiny_imagenet_limit_is_spread_over_the_classes(make_official):
    make_official("tiny").write()
    first, same = (tiny_imagenet("train", limit=4) for _ in range(2))
    assert first.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(first.images, same.images)
    whole = tiny_imagenet("train")
    pairs = list(zip(whole.images.flatten(1).tolist(), whole.boxes.tolist(), strict=True))
    for pair in zip(first.images.flatten(1).tolist(), first.boxes.tolist(), strict=True):
        assert pair in pairs  # an image keeps its box
    labels = np.repeat(np.arange(20), 30)
    assert np.bincount(labels[module.spread(labels, 110)]).tolist().count(5) == 10


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("val/val_annotations.txt", b"val_0.JPEG\tn02123045\t0\t5\t63\t50\n", "has 1 lines, not 2"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn0212", "has a line that cannot be read"),
        ("wnids.txt", b"n01443537\n", "does not fit the other lists of classes (n02123045)"),
        ("words.txt", b"n01443537\tgoldfish\nn021", "does not fit the other lists of classes (n02123045)"),
    ],
)
def test_tiny_imagenet_lists_are_verified(name, content, complaint, make_official, capsys):
    (make_official("tiny").write() / "tiny-imagenet-200" / name).write_bytes(content)
    assert tiny_imagenet("val").labels.tolist() == [1, 0]
    assert complaint in capsys.readouterr().out


def test_imagenette_values_and_choice(make_official):
    make_official("photos").write()
    data = imagenet_photos()
    assert data.names[:3] == ["tabby", "tench", "tench"]  # a cat, though Imagenette has none
    assert len(data.images) == len(data.names) == len(data.wnids) == 21
    assert all(image.mode == "RGB" for image in data.images)
    few = imagenet_photos(5, prefer=["n03888257", "n02123045"])
    assert few.names[:3] == ["parachute", "parachute", "tabby"]
    assert len(few.images) == 5
    assert few.names == imagenet_photos(5, prefer=["n03888257", "n02123045"]).names


@pytest.mark.fault("damaged files")
def test_own_photographs_come_first_and_unreadable_ones_stay(capsys):
    folder = data_root() / "imagenet-samples" / "one_per_class"
    folder.mkdir(parents=True)

    names = ("../a holiday.jpg", "n02123045_tabby.jpg", "n01443537_gold_fish.JPG", "n02099601_half.jpg")
    for name, side in zip(names, (50, 60, 70, 80), strict=True):
        Image.new("RGB", (side, side), (0, 0, 255)).save(folder / name)
    half = folder / names[-1]
    half.write_bytes(half.read_bytes()[:-40])
    (folder / "notes.txt").touch()
    data = imagenet_photos(prefer=["n02123045"])
    assert data.names == ["tabby", "gold fish", None]
    assert data.wnids == ["n02123045", "n01443537", None]
    assert [image.width for image in data.images] == [60, 70, 50]
    assert data.provenance.real
    assert "n02099601_half.jpg cannot be decoded" in capsys.readouterr().out
    assert half.exists()


# Stand-ins


@pytest.fixture
def no_sockets(monkeypatch):
    """A stand-in must not touch the network."""
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.delattr(socket, name)
    monkeypatch.setenv("PDL_OFFLINE", "1")


def test_texture_crops_follow_from_the_seed():
    (train, labels), (test, test_labels) = stand_ins.texture_crops(40, 20, seed=3)
    (same, _), (same_test, _) = stand_ins.texture_crops(40, 20, seed=3)
    assert torch.equal(torch.cat([train, test]), torch.cat([same, same_test]))
    assert not torch.equal(train, stand_ins.texture_crops(40, 20, seed=4)[0][0])
    assert (train.shape, train.dtype) == ((40, 3, 32, 32), torch.uint8)
    assert (labels.bincount().tolist(), test_labels.bincount().tolist()) == ([4] * 10, [2] * 10)


def test_texture_crops_of_train_and_test_share_no_pixel(monkeypatch):
    """Photographs whose cells for testing are white and whose other cells are black: crops must be one or
    the other, whole."""

    def marked(load: Callable[[], np.ndarray]) -> np.ndarray:
        pixels = np.zeros_like(load())
        for left, top, side in stand_ins.grid_cells(pixels.shape[1], pixels.shape[0], held_out=True):
            pixels[top : top + side, left : left + side] = 255
        return pixels

    monkeypatch.setattr(
        stand_ins, "TEXTURES", {name: partial(marked, load) for name, load in stand_ins.TEXTURES.items()}
    )
    (train, _), (test, _) = stand_ins.texture_crops(300, 300)
    assert train.max() == 0
    assert test.min() > 150


def test_digits_are_split_without_overlap(no_sockets):
    data = mnist()
    train, test = data.train_images, data.test_images
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape[1:] == (1, 28, 28)
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))
    assert torch.equal(mnist().train_images, train)


def test_stand_in_photographs_show_a_cat_first(no_sockets):
    data = imagenet_photos(8)
    assert len(data.images) == 8
    assert (data.names[0], data.wnids[0]) == ("tabby", "n02123045")
    assert data.images[0].size == (451, 300)
    assert all(image.mode == "RGB" for image in data.images)
    assert imagenet_photos(prefer=["n07920052"]).names[0] == "espresso"
    assert len(imagenet_photos(100).images) == len(stand_ins.PHOTOGRAPHS)


# The real thing, where it is


@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="PDL_DATA holds no real data")
def test_real_data(monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(REAL_DATA))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    digits = mnist()
    assert digits.train_images.shape == (60000, 1, 28, 28)
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    if (REAL_DATA / "cifar-10-batches-py").is_dir():
        images = cifar10()
        assert images.train_images.shape == (50000, 3, 32, 32)
        assert images.classes[int(images.test_labels[0])] == "cat"
    if (REAL_DATA / "tiny-imagenet-200").is_dir():
        val = tiny_imagenet("val", limit=200)
        assert val.labels.bincount().tolist() == [1] * 200
