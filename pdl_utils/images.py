"""Images as whole batches on their own device: resize, augment, normalise, and what a network says about them.

Images are uint8 in 0..255 until `normalize`; a network sees only what `normalize` gives.

One affine resampling a batch replaces the usual call an image: cropping, resizing and flipping are a single
`grid_sample`. Colour is affine as well: brightness, contrast, saturation, hue and greyness of an image are one
3×4 matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)  # smallest and largest ratio of a crop's width to its height


def normalize(images: Tensor) -> Tensor:
    """Standardise the colour channels with ImageNet's mean and deviation.

    Args:
        images: uint8 (N, 3, H, W).

    Returns:
        float32 (N, 3, H, W), channels_last in memory, which convolutions like best.

    Raises:
        TypeError: the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255, not {images.dtype}")
    mean = 255 * torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_uint8(pixels: Tensor) -> Tensor:
    """Float images in 0..255 → uint8, rounded."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (N, C, H, W) to (N, C, size, size), bilinear and anti-aliased."""
    if images.shape[-2:] == (size, size):
        return images
    return to_uint8(F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True))


def crop_parameters(
    n: int,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = RATIO,
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw crops for n images (Szegedy et al. 2014, arXiv:1409.4842, sec. 6).

    Args:
        scale: smallest and largest share of the image's area in a crop.
        ratio: smallest and largest ratio of a crop's width to its height; drawn log-uniformly.
        flip: mirror every second image, at random.
        generator: CPU generator; the same one gives the same crops on every device.

    Returns:
        An affine map each, (n, 2, 3), from the crop to its place in the image; both have coordinates in [-1, 1]².
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    area, aspect = uniform(*scale), uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = width * (1 - 2 * (torch.rand(n, generator=generator) < 0.5 * flip).float())
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    return theta


def crop(images: Tensor, theta: Tensor, size: int) -> Tensor:
    """Cut crops (N, 2, 3), as `crop_parameters` draws them, out of uint8 (N, C, H, W).
    Gives uint8 (N, C, size, size)."""
    grid = F.affine_grid(theta.to(images.device), [len(images), images.shape[1], size, size], align_corners=False)
    return to_uint8(F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False))


# Weights of a colour's brightness (ITU-R BT.601, as PIL and torchvision use them), and an orthonormal basis
# (u, v) of the plane of colours without brightness, in which a hue is an angle.
LUMA = torch.tensor([0.299, 0.587, 0.114])
HUE_PLANE = torch.tensor([[2.0, -1.0, -1.0], [0.0, 3**0.5, -(3**0.5)]]) / 6**0.5


def change_colors(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, angle: Tensor
) -> Tensor:
    """Brightness, then contrast, saturation and hue. Each is an affine map of (red, green, blue), so the four
    together are one matrix an image, and one batched product.

    Args:
        images: uint8 (N, 3, H, W).
        brightness, contrast, saturation: factors (N,), 1 for no change. Saturation 0 gives grey.
        angle: by which the hue turns about the grey axis, (N,), in radians.

    Returns:
        uint8 (N, 3, H, W).
    """
    brightness, contrast, saturation = (factor.view(-1, 1, 1) for factor in (brightness, contrast, saturation))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    hue = HUE_PLANE.T @ turn @ HUE_PLANE + 1 / 3  # turns the plane, keeps the grey axis
    color = hue @ (saturation * torch.eye(3) + (1 - saturation) * LUMA.expand(3, 3))
    # Contrast is about the mean grey of the image, which saturation and hue leave as it is.
    pixels = images.flatten(2).float()
    grey = pixels.mean(2) @ LUMA.to(images.device)
    offset = grey.view(-1, 1, 1) * (brightness * (1 - contrast)).to(images.device)
    matrix = (brightness * contrast * color).to(images.device)
    return to_uint8(torch.baddbmm(offset, matrix, pixels)).view_as(images)


def color_jitter(
    images: Tensor,
    *,
    strength: float,
    probability: float = 0.8,
    gray: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change the colours of every image at random (Chen et al. 2020, arXiv:2002.05709, appendix A).

    Args:
        images: uint8 (N, 3, H, W).
        strength: brightness, contrast and saturation change by a factor of 1 ± 0.8·strength, the hue by up
            to ± 0.2·strength of a full turn.
        probability: share of images that are jittered.
        gray: share of images that lose their colour.
        generator: CPU generator; the same one gives the same colours on every device.

    Returns:
        uint8 (N, 3, H, W).
    """
    n = len(images)
    jittered = (torch.rand(n, generator=generator) < probability).float()

    def uniform(width: float) -> Tensor:
        return jittered * (2 * torch.rand(n, generator=generator) - 1) * width

    brightness, contrast, saturation = (1 + uniform(0.8 * strength) for _ in range(3))
    angle = 2 * math.pi * uniform(0.2 * strength)
    saturation = saturation * (torch.rand(n, generator=generator) >= gray)
    return change_colors(images, brightness, contrast, saturation, angle)


@dataclass(frozen=True)
class Augmentation:
    """A recipe of random changes, applied to whole batches; without arguments, none.

    Attributes:
        flip: mirror every second image.
        shift: move by up to so many pixels, filling up with the border: the padded crop of CIFAR recipes.
        scale: smallest and largest share of the image in a crop that is then resized; None for no such crop.
        jitter: strength of `color_jitter`; 0 leaves the colours alone.
        gray: share of images that lose their colour.
    """

    flip: bool = False
    shift: int = 0
    scale: tuple[float, float] | None = None
    jitter: float = 0.0
    gray: float = 0.0

    def __call__(
        self, images: Tensor, size: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """uint8 (N, 3, H, W) → uint8 (N, 3, size, size); `size` defaults to that of the images."""
        n, side = len(images), images.shape[-1]
        scale, ratio = (self.scale, RATIO) if self.scale else ((1, 1), (1, 1))
        theta = crop_parameters(n, scale=scale, ratio=ratio, flip=self.flip, generator=generator)
        if self.shift:  # the image spans 2 of the grid's units
            theta[:, :, 2] += (2 * torch.rand(n, 2, generator=generator) - 1) * 2 * self.shift / side
        images = crop(images, theta, size or side)
        if self.jitter or self.gray:
            images = color_jitter(images, strength=self.jitter, gray=self.gray, generator=generator)
        return images


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of augmented images in random order; calling it gives those of another epoch.

    A batch is (images, labels): normalised float32 (N, 3, size, size) and int64 (N,). Where there are no
    labels, it is two independent views of the same images. Everything random follows from `seed`, `epoch` and
    `part` alone, so a resumed run sees what an unbroken one does. The last, incomplete batch is left out.

    Attributes:
        images: uint8 (N, 3, H, W), on the training device.
        sizes: side in pixels that images are augmented to, one an epoch.
        labels: (N,), on the same device.
        part: (k, n): of each batch, this is the k-th of n equal parts, for training in n processes.

    Raises:
        ValueError: there are fewer images than one batch needs.
    """

    images: Tensor
    sizes: list[int]
    augment: Augmentation
    batch_size: int
    labels: Tensor | None = None
    seed: int = 0
    epoch: int = 0
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(f"{len(self.images)} images make no batch of {self.batch_size}; lower the batch size")

    def __call__(self, epoch: int) -> Batches:
        return replace(self, epoch=epoch)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed, (k, n) = 1_000_003 * self.seed + self.epoch, self.part
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        own = torch.Generator().manual_seed(seed + 7_919 * k)  # each process augments in its own way
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            images, size = self.images[rows[k::n]], self.sizes[self.epoch]
            first = normalize(self.augment(images, size, own))
            if self.labels is None:
                yield first, normalize(self.augment(images, size, own))
            else:
                yield first, self.labels[rows[k::n]]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, size: int | None = None, batch: int = 250) -> Tensor:
    """What a network in eval mode gives for uint8 images (N, 3, H, W): logits, or the features of an encoder,
    float32 (N, D), on the model's device. Always computed in float32.

    Args:
        size: resize the images to this side in pixels first.
        batch: how many images to look at in one go; it does not change the result.

    Raises:
        ValueError: the model is in train mode, where its outputs would depend on the rest of the batch.
    """
    if model.training:
        raise ValueError("the model is in train mode, batch norm would look at the batch; call model.eval() first")
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        parts = [model(normalize(resize(some.to(device), size or some.shape[-1]))) for some in images.split(batch)]
    return torch.cat(parts)


def top1(model: nn.Module, images: Tensor, labels: Tensor, size: int | None = None) -> float:
    """Share of uint8 images (N, 3, H, W) whose most probable class is their label (N,)."""
    guesses = outputs(model, images, size).argmax(1)
    return (guesses == labels.to(guesses.device)).float().mean().item()
