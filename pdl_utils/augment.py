"""Random augmentation of whole image batches on their own device.

One affine resampling a batch replaces the usual PIL call an image: cropping, resizing to any
resolution and flipping are a single `grid_sample` on uint8 tensors that stay where they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def random_resized_crop(
    images: Tensor,
    size: int,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Crop, resize and mirror every image at random, in one resampling (Szegedy et al. 2014, sec. 6).

    Args:
        images: (N, C, H, W), uint8 or float.
        size: height and width of the result in pixels.
        scale: smallest and largest share of the image's area in a crop.
        ratio: smallest and largest ratio of a crop's width to its height; drawn log-uniformly.
        flip: mirror every second image, at random.
        generator: CPU generator; the same one gives the same crops on every device.

    Returns:
        float32 (N, C, size, size), in the range of `images`.
    """
    theta = crop_parameters(len(images), scale=scale, ratio=ratio, flip=flip, generator=generator)
    return crop(images, theta, size)


def crop_parameters(
    n: int,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What `random_resized_crop` draws for n images: an affine map each, (n, 2, 3), from the crop to its
    place in the image, both spoken of as [-1, 1]²."""

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
