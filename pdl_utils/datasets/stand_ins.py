"""Offline stand-ins, made from sample images that ship inside scikit-image and scikit-learn."""

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

# Class: the photograph that its crops are cut from, as `photograph` calls it.
TEXTURES = {
    "brick": "brick", "cat fur": "chelsea", "coffee": "coffee", "flower": "flower.jpg", "grass": "grass",
    "gravel": "gravel", "motorcycle": "stereo_motorcycle", "stars": "hubble_deep_field",
    "temple": "china.jpg", "tissue": "immunohistochemistry",
}  # fmt: skip
PHOTOGRAPHS = [  # what `photograph` calls it, what it shows, its ImageNet class where it has one
    ("chelsea", "tabby", "n02123045"), ("coffee", "espresso", "n07920052"), ("astronaut", "astronaut", None),
    ("rocket", "rocket", None), ("stereo_motorcycle", "motorcycle", None), ("china.jpg", "temple", None),
    ("flower.jpg", "dahlia", None), ("retina", "retina", None), ("hubble_deep_field", "galaxies", None),
    ("immunohistochemistry", "tissue", None),
]  # fmt: skip


def photograph(name: str) -> Image.Image:
    """In RGB: one of `skimage.data`, or with ".jpg" one of scikit-learn."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image  # here, because importing it takes seconds

        return Image.fromarray(load_sample_image(name))
    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")


def texture_crops(train: int = 5000, test: int = 1000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops of `TEXTURES` as in CIFAR-10: images uint8 (N, 3, 32, 32), labels int64 (N,) for training, the same
    for testing. No pixel is in both: a crop lies inside one cell of a grid, and every fifth cell is for testing.
    Colours vary, so that they alone do not give the class away."""
    rng = np.random.default_rng(0)
    photos = [photograph(name) for name in TEXTURES.values()]
    tensors = []
    for count, held_out in ((train, False), (test, True)):
        labels = torch.arange(count) % len(photos)
        cells = [grid_cells(*photo.size, held_out) for photo in photos]
        crops = np.stack([_random_crop(photos[label], cells[label], rng) for label in labels.tolist()])
        tensors += [torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(), labels]
    return tuple(tensors)


def grid_cells(width: int, height: int, held_out: bool) -> list[tuple[int, int, int]]:
    """(left, top, side) of the square cells for testing (`held_out`) or for training, all over the picture."""
    side, cells = min(width, height) // 5, []
    for row in range(height // side):
        columns = [column for column in range(width // side) if ((row + 2 * column) % 5 == 0) == held_out]
        cells += [(column * side, row * side, side) for column in columns]
    return cells


def _random_crop(photo: Image.Image, cells: list[tuple[int, int, int]], rng: np.random.Generator) -> np.ndarray:
    left, top, cell = cells[rng.integers(len(cells))]
    side = int(rng.integers(min(32, cell), min(64, cell) + 1))
    left, top = left + int(rng.integers(cell - side + 1)), top + int(rng.integers(cell - side + 1))
    # First cut, then resize: `resize(box=...)` would look at pixels outside of the box.
    crop = photo.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop, dtype=np.float32)[:, :: rng.choice((-1, 1))]
    return (pixels * rng.uniform(0.7, 1.3, size=3)).clip(0, 255).astype(np.uint8)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits as in MNIST, 20×20 in the middle of 28×28: images uint8 (N, 1, 28, 28), labels
    int64 (N,) for training (4 of 5), the same for testing."""
    from sklearn.datasets import load_digits

    small = load_digits()
    images = torch.zeros(len(small.images), 1, 28, 28, dtype=torch.uint8)
    for image, digit in zip(images, small.images, strict=True):
        large = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC)
        image[0, 4:24, 4:24] = torch.from_numpy(np.array(large))
    labels = torch.from_numpy(small.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    test, train = order.tensor_split([len(order) // 5])
    return images[train], labels[train], images[test], labels[test]
