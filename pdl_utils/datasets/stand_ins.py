"""Offline stand-ins, made from sample images that ship inside scikit-image and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor


def _sklearn_photo(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image  # here, because it takes seconds

    return load_sample_image(name)


TEXTURES: dict[str, Callable[[], np.ndarray]] = {
    "brick": skimage.data.brick,
    "cat fur": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "flower": partial(_sklearn_photo, "flower.jpg"),
    "grass": skimage.data.grass,
    "gravel": skimage.data.gravel,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "stars": skimage.data.hubble_deep_field,
    "temple": partial(_sklearn_photo, "china.jpg"),
    "tissue": skimage.data.immunohistochemistry,
}
"""Class name → the photograph, (H, W) or (H, W, 3) uint8, that its crops are cut from."""

# Each with what it shows, and its ImageNet class where it has one.
PHOTOGRAPHS: list[tuple[Callable[[], np.ndarray], str, str | None]] = [
    (skimage.data.chelsea, "tabby", "n02123045"),
    (skimage.data.coffee, "espresso", "n07920052"),
    (skimage.data.astronaut, "astronaut", None),
    (skimage.data.rocket, "rocket", None),
    (TEXTURES["motorcycle"], "motorcycle", None),
    (TEXTURES["temple"], "temple", None),
    (TEXTURES["flower"], "dahlia", None),
    (skimage.data.retina, "retina", None),
    (skimage.data.hubble_deep_field, "galaxies", None),
    (skimage.data.immunohistochemistry, "tissue", None),
]

Split = tuple[Tensor, Tensor]


def texture_crops(train: int = 5000, test: int = 1000, seed: int = 0) -> tuple[Split, Split]:
    """CIFAR-10-shaped crops of `TEXTURES`, the same for the same seed.

    Each photograph is cut into a grid of cells. A crop lies inside one cell, and every fifth cell is
    kept for testing, so no pixel is in both splits. Scale, mirroring and colour vary from crop to crop:
    colour alone does not give the class away.

    Returns:
        (images, labels) of the training and of the test split: uint8 (N, 3, 32, 32) and int64 (N,),
        the classes in turn.
    """
    rng = np.random.default_rng(seed)
    photos = [rgb(load()) for load in TEXTURES.values()]
    splits = []
    for count, held_out in ((train, False), (test, True)):
        labels = torch.arange(count) % len(photos)
        cells = [grid_cells(*photo.size, held_out) for photo in photos]
        crops = np.stack([_random_crop(photos[label], cells[label], rng) for label in labels.tolist()])
        splits.append((torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(), labels))
    return tuple(splits)


def grid_cells(width: int, height: int, held_out: bool) -> list[tuple[int, int, int]]:
    """(left, top, side) of the square cells for testing (`held_out`) or for training. No two overlap;
    the cells for testing lie a knight's move apart, so both splits see all parts of the photograph."""
    side = min(width, height) // 5
    return [
        (column * side, row * side, side)
        for row in range(height // side)
        for column in range(width // side)
        if ((row + 2 * column) % 5 == 0) == held_out
    ]


def _random_crop(photo: Image.Image, cells: list[tuple[int, int, int]], rng: np.random.Generator) -> np.ndarray:
    left, top, cell = cells[rng.integers(len(cells))]
    side = int(rng.integers(min(32, cell), min(64, cell) + 1))
    left, top = left + int(rng.integers(cell - side + 1)), top + int(rng.integers(cell - side + 1))
    # First cut, then resize: `resize(box=...)` would look at pixels outside of the box.
    crop = photo.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop, dtype=np.float32)[:, :: rng.choice((-1, 1))]
    return (pixels * rng.uniform(0.7, 1.3, size=3)).clip(0, 255).astype(np.uint8)


def digits(seed: int = 0) -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits in the shape of MNIST: 20×20 in the middle of 28×28.

    Returns:
        (images, labels) of the training (4 of 5) and of the test split: uint8 (N, 1, 28, 28), int64 (N,).
    """
    from sklearn.datasets import load_digits  # here, because it takes seconds

    small = load_digits()
    images = torch.zeros(len(small.images), 1, 28, 28, dtype=torch.uint8)
    for image, digit in zip(images, small.images, strict=True):
        large = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC)
        image[0, 4:24, 4:24] = torch.from_numpy(np.array(large))
    labels = torch.from_numpy(small.target).long()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    test, train = order.tensor_split([len(order) // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def rgb(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W) or (H, W, 3) as a colour photograph."""
    return Image.fromarray(pixels).convert("RGB")
