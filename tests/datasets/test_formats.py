"""What each data set holds, value by value; photographs and images of one's own; stand-ins; the real files."""

import importlib
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pdl_utils import datasets
from pdl_utils.datasets import DamagedFile, LabelledImages, Provenance, imagenet_photos, stand_ins
from pdl_utils.datasets.photos import to_rgb
from pdl_utils.settings import data_root

module = importlib.import_module("pdl_utils.datasets.tiny_imagenet")  # not the function of the same name
tiny_imagenet = module.tiny_imagenet

pytestmark = pytest.mark.usefixtures("fresh_data")


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_cifar10_and_mnist_values(make_official):
    cifar, mnist = make_official("cifar10"), make_official("mnist")
    cifar.write()
    mnist.write()
    for left in ("training.pt", "test.pt"):  # by old versions of torchvision, which its class would prefer
        path = data_root() / "MNIST" / "processed" / left
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"old")
    data, digits = datasets.cifar10(), datasets.mnist()
    batches = [pickle.loads(cifar.files[f"data_batch_{i}"]) for i in range(1, 6)]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.train_images, torch.from_numpy(pixels))
    assert data.train_labels.tolist() == [label for batch in batches for label in batch["labels"]]
    assert (data.test_images.shape, data.classes[3]) == ((4, 3, 32, 32), "class 3")
    assert digits.train_images.numpy().tobytes() == mnist.files["train-images-idx3-ubyte"][16:]
    assert (digits.train_images.shape, digits.test_images.shape) == ((6, 1, 28, 28), (3, 1, 28, 28))
    assert (digits.train_labels.tolist(), digits.test_labels.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])


def test_tiny_imagenet_values_and_choice(make_official):
    make_official("tiny").write()
    train, val, few = tiny_imagenet("train"), tiny_imagenet("val"), tiny_imagenet("train", limit=4)
    assert (train.wnids, train.names) == (["n01443537", "n02123045"], ["goldfish", "tabby, cat"])
    assert (train.labels.tolist(), few.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert train.boxes[2].tolist() == [1, 2, 3, 2]
    assert val.labels.tolist() == [1, 0]
    assert val.boxes.tolist() == [[0, 5, 63, 50], [9, 9, 9, 9]]
    assert val.images[:, :, 30, 30].int().sub(torch.tensor([[0, 0, 30], [100, 0, 30]])).abs().max() <= 3
    for image, box in zip(few.images, few.boxes, strict=True):  # an image keeps its box
        assert (image[1, 30, 30] - 50 * box[3]).abs() <= 3
    labels = np.repeat(np.arange(20), 30)
    assert np.bincount(labels[module.spread(labels, 110)]).tolist().count(5) == 10
    with pytest.raises(ValueError, match="'train' or 'val'"):
        tiny_imagenet("test")


@pytest.mark.parametrize("name", ["val/val_annotations.txt", "wnids.txt", "words.txt"])
def test_tiny_imagenet_lists_are_verified(name, make_official):
    path = make_official("tiny").write() / "tiny-imagenet-200" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedFile, match=name):
        tiny_imagenet("val")


def test_imagenette_values_and_choice(make_official):
    folder = make_official("photos").write() / "imagenette2-320" / "val"
    data = imagenet_photos()
    assert data.names[:3] == ["tabby", "tench", "tench"]  # a cat, though Imagenette has none
    assert len(data.images) == len(data.names) == 21
    few, same = (imagenet_photos(5, prefer=["n03888257", "n02123045"]) for _ in range(2))
    assert few.names[:3] == ["parachute", "parachute", "tabby"]
    assert (len(few.images), few.names) == (5, same.names)
    save(Image.new("RGB", (9, 9)), folder / "my cats" / "cat.jpeg")
    with pytest.raises(DamagedFile, match=r"val is missing or damaged \('my cats'"):
        imagenet_photos()


def test_ones_own_photographs_are_shown_first_and_what_cannot_be_read_is_named(capsys):
    folder = data_root() / "imagenet-samples"
    for i in range(30):
        save(Image.new("RGB", (9, 9)), folder / "many" / f"n02123045_cat_{i}.jpg")
    for name in ("n01443537_gold_fish.JPG", "a holiday.tif", "old.gif", "n09999999_flat.bmp"):
        save(Image.new("RGB", (3000, 1500)), folder / name)
    half = save(Image.effect_noise((50, 50), 9), folder / "half.jpg")
    half.write_bytes(half.read_bytes()[:-400])
    save(Image.new("1", (14000, 14000)), folder / "scan.png")  # DecompressionBombError
    save(Image.new("F", (4, 4)), folder / "floats.tif")
    (folder / "notes.heic").touch()
    save(Image.new("RGB", (9, 9)), folder / "._holiday.jpg")  # macOS writes such beside each photograph
    linked = save(Image.new("RGB", (9, 9)), data_root() / "elsewhere" / "n02123045_linked.jpg").parent
    (folder / "link").symlink_to(linked, target_is_directory=True)
    data = imagenet_photos(9, prefer=["n02123045"])
    assert data.names == [None, None, "gold fish", "flat", "linked", "cat 0", "cat 1", "cat 10", "cat 11"]
    assert data.images[0].size == (1024, 512)
    out = capsys.readouterr().out
    assert "9 photographs from imagenet-samples/" in out
    assert all(f"{name} is left out: " in out for name in ("half.jpg", "scan.png", "floats.tif", "notes.heic"))
    assert len(imagenet_photos().images) == 35
    with pytest.raises(ValueError, match="at least one"):
        imagenet_photos(0)


RAMP = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
RED = Image.new("RGB", (4, 4), (250, 20, 10))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by 90° clockwise: its top, which is black, comes to lie on the right


@pytest.mark.parametrize(
    ("name", "image", "options", "pixel"),
    [
        ("16 bits.png", Image.fromarray(RAMP), {}, (255, 255, 255)),
        ("16 bits.tif", Image.fromarray(RAMP // 2), {}, (127, 127, 127)),
        ("transparent.png", Image.new("RGBA", (4, 4), (200, 10, 60, 0)), {}, (255, 255, 255)),
        ("palette.png", RED.quantize(2), {"transparency": 0}, (255, 255, 255)),
        ("turned.png", Image.linear_gradient("L").crop((0, 0, 256, 99)), {"exif": TURNED}, (0, 0, 0)),
    ],
)
def test_a_photograph_of_any_kind_is_shown_as_it_looks(name, image, options, pixel, tmp_path):
    with Image.open(save(image, tmp_path / name, **options)) as opened:
        seen = to_rgb(to_rgb(opened))  # twice is once
    assert seen.mode == "RGB"
    assert seen.size == (image.size[::-1] if "exif" in options else image.size)
    np.testing.assert_allclose(np.asarray(seen)[-1, -1], pixel, atol=1)


@pytest.mark.parametrize("tags", [{262: 0}, {258: 12}], ids=["white is 0", "12 bits"])
def test_grey_of_a_kind_that_pillow_does_not_show_right_is_refused(tags, tmp_path):
    with Image.open(save(Image.fromarray(RAMP), tmp_path / "x.tif")) as opened:
        for number, value in tags.items():
            opened.tag_v2[number] = value
        with pytest.raises(ValueError, match="12 bits, with white as 0"):
            to_rgb(opened)


def test_labelled_images_that_do_not_fit_are_refused():
    images, labels = torch.zeros(6, 1, 8, 9, dtype=torch.uint8), torch.arange(6) % 3
    whole = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    whole |= {"classes": "abc", "provenance": Provenance("mine", "mine")}
    LabelledImages(**whole)
    wrong_labels = "int64, one for each of the 6 images, 0 to 2"
    for changed, message in [
        ({"train_images": images.float()}, "uint8"),
        ({"test_images": images.repeat(1, 3, 1, 1)}, "one shape"),
        ({"train_labels": torch.arange(5) % 3}, wrong_labels),
        ({"train_labels": torch.ones(6)}, wrong_labels),
        ({"train_labels": labels.tolist()}, wrong_labels),
        ({"test_labels": torch.arange(6) - 3}, wrong_labels),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            LabelledImages(**whole | changed)


def test_texture_crops_of_train_and_test_share_no_pixel(monkeypatch):
    """Photographs whose cells for testing are white and the others black: a crop must be one or the other."""
    photograph = stand_ins.photograph

    def marked(name: str) -> Image.Image:
        image = Image.new("RGB", photograph(name).size)
        for left, top, side in stand_ins.grid_cells(*image.size, held_out=True):
            image.paste((255, 255, 255), (left, top, left + side, top + side))
        return image

    monkeypatch.setattr(stand_ins, "photograph", marked)
    train, labels, test, _ = stand_ins.texture_crops(300, 300)
    assert (train.shape, labels.bincount().tolist()) == ((300, 3, 32, 32), [30] * 10)
    assert train.max() == 0
    assert test.min() > 150


def test_digits_and_photographs_stand_in(monkeypatch):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.delattr(socket, "getaddrinfo")  # they must not touch the network
    digits = datasets.mnist()
    train, test = digits.train_images, digits.test_images
    assert (train.shape, test.shape) == ((1438, 1, 28, 28), (359, 1, 28, 28))
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    assert set(digits.train_labels.tolist()) == set(digits.test_labels.tolist()) == set(range(10))
    data = imagenet_photos(8)
    assert (len(data.images), data.names[0], data.images[0].size) == (8, "tabby", (451, 300))
    assert imagenet_photos(prefer=["n07920052"]).names[0] == "espresso"
    assert len(imagenet_photos(100).images) == len(stand_ins.PHOTOGRAPHS)


def test_real_data(real_data):
    real_data("cifar-10-batches-py")
    digits, images = datasets.mnist(), datasets.cifar10()
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert (len(digits.train_images), len(images.train_images)) == (60_000, 50_000)
    assert images.classes[int(images.test_labels[0])] == "cat"
    assert tiny_imagenet("val", limit=200).labels.bincount().tolist() == [1] * 200
