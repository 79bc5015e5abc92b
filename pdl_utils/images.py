"""Random augmentation of whole image batches on their own device.

One affine resampling a batch replaces the usual PIL call an image: cropping, resizing to any
resolution and flipping are a single `grid_sample` on uint8 tensors that stay where they are. Colour is
affine as well: brightness, contrast, saturation, hue and greyness of an image are one 3×4 matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)  # smallest and largest ratio of a crop's width to its height


def normalize(images: Tensor, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> Tensor:
    """Standardise colour channels.

    Args:
        images: (N, 3, H, W), uint8 in 0..255 or float in 0..1.
        mean, std: one number a channel, for images in 0..1.

    Returns:
        float32 (N, 3, H, W), channels_last in memory, which convolutions like best.
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    mean = torch.tensor(mean, device=images.device).view(1, -1, 1, 1) * scale
    std = torch.tensor(std, device=images.device).view(1, -1, 1, 1) * scale
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize (N, C, H, W) to (N, C, size, size), bilinear and anti-aliased; float32, same range."""
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def crop_parameters(
    n: int,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = RATIO,
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw crops for n images (Szegedy et al. 2014, sec. 6).

    Args:
        scale: smallest and largest share of the image's area in a crop.
        ratio: smallest and largest ratio of a crop's width to its height; drawn log-uniformly.
        flip: mirror every second image, at random.
        generator: CPU generator; the same one gives the same crops on every device.

    Returns:
        An affine map each, (n, 2, 3), from the crop to its place in the image, both spoken of as [-1, 1]².
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
    """Cut crops (N, 2, 3) out of images (N, C, H, W), as float32 (N, C, size, size) in the same range."""
    grid = F.affine_grid(theta.to(images.device), [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


# Weights of a colour's brightness (ITU-R BT.601, as PIL and torchvision use them), and an orthonormal basis
# (u, v) of the plane of colours without brightness, in which a hue is an angle.
LUMA = torch.tensor([0.299, 0.587, 0.114])
HUE_PLANE = torch.tensor([[2.0, -1.0, -1.0], [0.0, 3**0.5, -(3**0.5)]]) / 6**0.5


def color_jitter(
    images: Tensor,
    *,
    strength: float,
    probability: float = 0.8,
    gray: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change the colours of every image at random (Chen et al. 2020, arXiv:2002.05709, appendix A).

    Brightness, then contrast, saturation, hue and greyness, always in this order: each is an affine map of
    (red, green, blue), so the five together are one matrix an image, and one batched product.

    Args:
        images: (N, 3, H, W), float in 0..1.
        strength: brightness, contrast and saturation change by a factor of 1 ± 0.8·strength, the hue by up
            to ± 0.2·strength of a full turn about the grey axis.
        probability: share of images that are jittered.
        gray: share of images that lose their colour.
        generator: CPU generator; the same one gives the same colours on every device.

    Returns:
        float32 (N, 3, H, W) in 0..1.
    """
    n = len(images)

    def uniform(width: float) -> Tensor:
        chosen = torch.rand(n, generator=generator)
        return (2 * chosen - 1) * width

    brightness, contrast, saturation = (1 + uniform(0.8 * strength) for _ in range(3))
    angle = 2 * math.pi * uniform(0.2 * strength)
    jittered = torch.rand(n, generator=generator) < probability
    saturation, brightness, contrast = (
        torch.where(jittered, factor, 1.0).view(n, 1, 1) for factor in (saturation, brightness, contrast)
    )
    angle = torch.where(jittered, angle, 0.0)
    saturation = saturation * (torch.rand(n, generator=generator) >= gray).view(n, 1, 1)

    to_gray = LUMA.expand(3, 3)  # every channel becomes the luma
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2)
    hue = HUE_PLANE.T @ turn @ HUE_PLANE + 1 / 3  # turns the plane, keeps the grey axis
    color = hue @ (saturation * torch.eye(3) + (1 - saturation) * to_gray)
    # Contrast is about the mean grey of the image; grey is a fixed point of what follows.
    matrix = (brightness * contrast * color).to(images.device)
    luma = images.mean((2, 3)) @ LUMA.to(images.device)
    offset = luma.view(n, 1, 1) * (brightness * (1 - contrast)).to(images.device)
    return torch.baddbmm(offset, matrix, images.flatten(2)).clamp(0, 1).view_as(images)


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
        """uint8 (N, 3, H, W) → float32 (N, 3, size, size) in 0..1; `size` defaults to that of the images."""
        n, side = len(images), images.shape[-1]
        theta = crop_parameters(
            n,
            scale=self.scale or (1, 1),
            ratio=RATIO if self.scale else (1, 1),
            flip=self.flip,
            generator=generator,
        )
        if self.shift:  # the image spans 2 of the grid's units
            theta[:, :, 2] += (2 * torch.rand(n, 2, generator=generator) - 1) * 2 * self.shift / side
        pixels = crop(images, theta, size or side) / 255
        if self.jitter or self.gray:
            pixels = color_jitter(pixels, strength=self.jitter, gray=self.gray, generator=generator)
        return pixels
