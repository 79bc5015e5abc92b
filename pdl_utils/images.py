"""Images as whole batches on their own device: resize, augment, normalise, and what a network says about them.

Images are uint8 (N, C, H, W) in 0..255, three channels or one (grey), of any height and width, until `normalize`;
a network sees only what `normalize` gives. One affine resampling a batch replaces the usual call an image:
cropping, resizing and flipping are a single `grid_sample`. Colour is affine as well: brightness, contrast,
saturation, hue and greyness of an image are one 3×4 matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]  # the shorter side in pixels, which keeps the shape; or height and width
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)  # by how much a crop is wider than its image's shape, at least and at most


def check_images(images: Tensor) -> None:
    """TypeError or ValueError where `images` are not uint8 (N, C, H, W); says what to do."""
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8:
        remedy = "floats in 0..1 become that by (255 * images).round().to(torch.uint8)"
        raise TypeError(f"images must be a tensor of uint8 in 0..255, not {kind}; {remedy}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        remedy = "one image: image[None]; channels last: images.permute(0, 3, 1, 2)"
        raise ValueError(f"images must be (N, 3, H, W), grey ones (N, 1, H, W), not {(*images.shape,)}; {remedy}")


def normalize(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """uint8 (N, C, H, W) → float32 (N, 3, H, W), each channel standardised, channels_last in memory, which
    convolutions like best. Grey becomes three equal channels first."""
    check_images(images)
    mean, std = (255 * torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_uint8(pixels: Tensor) -> Tensor:
    """Float images in 0..255 → uint8, rounded."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def height_and_width(images: Tensor, size: Size | None) -> tuple[int, int]:
    """What `size` means for these images; None: as they are."""
    height, width = images.shape[-2:]
    if isinstance(size, int):
        shorter = min(height, width)
        return size * height // shorter, size * width // shorter
    return size or (height, width)


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize uint8 (N, C, H, W), bilinear and anti-aliased."""
    check_images(images)
    shape = height_and_width(images, size)
    if images.shape[-2:] == shape:
        return images
    return to_uint8(F.interpolate(images.float(), shape, mode="bilinear", antialias=True))


def crop_parameters(
    n: int, *, scale: tuple[float, float] = (0.35, 1.0), ratio: tuple[float, float] = RATIO, flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Draw crops for n images (Szegedy et al. 2014, arXiv:1409.4842, sec. 6): a share of the area from `scale`, a
    ratio log-uniformly from `ratio`, and with `flip` every second one mirrored, at random. Gives an affine map
    each, (n, 2, 3), from the crop to its place in the image, both in [-1, 1]². `generator` is one of the CPU: it
    gives the same crops on every device."""

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


def crop(images: Tensor, theta: Tensor, size: Size | None = None) -> Tensor:
    """Cut crops (N, 2, 3), as `crop_parameters` draws them, out of uint8 (N, C, H, W), and resize them to `size`.
    Where that is smaller than the image, a pixel is the mean of k×k samples: one sample would skip pixels."""
    (height, width), (rows, columns) = images.shape[-2:], height_and_width(images, size)
    k = math.ceil(max(height / rows, width / columns, 1))
    grid = F.affine_grid(theta.to(images.device), [len(images), 3, k * rows, k * columns], align_corners=False)
    pixels = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return to_uint8(F.avg_pool2d(pixels, k) if k > 1 else pixels)


# Weights of a colour's brightness (ITU-R BT.601, as PIL and torchvision use them), and an orthonormal basis
# (u, v) of the plane of colours without brightness, in which a hue is an angle.
LUMA = torch.tensor([0.299, 0.587, 0.114])
HUE_PLANE = torch.tensor([[2.0, -1.0, -1.0], [0.0, 3**0.5, -(3**0.5)]]) / 6**0.5


def change_colors(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, angle: Tensor
) -> Tensor:
    """Brightness, then contrast and saturation, by factors (N,), then the hue, turned about the grey axis by
    `angle` (N,) in radians. Each is an affine map of (red, green, blue): one matrix an image. Gives uint8 (N, 3,
    H, W)."""
    brightness, contrast, saturation = (factor.view(-1, 1, 1) for factor in (brightness, contrast, saturation))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    hue = HUE_PLANE.T @ turn @ HUE_PLANE + 1 / 3  # turns the plane, keeps the grey axis
    color = hue @ (saturation * torch.eye(3) + (1 - saturation) * LUMA.expand(3, 3))
    # Contrast is about the mean grey of the image, which saturation and hue leave as it is.
    images = images.expand(-1, 3, -1, -1)
    pixels = images.flatten(2).float()
    grey = pixels.mean(2) @ LUMA.to(images.device)
    offset = grey.view(-1, 1, 1) * (brightness * (1 - contrast)).to(images.device)
    matrix = (brightness * contrast * color).to(images.device)
    return to_uint8(torch.baddbmm(offset, matrix, pixels)).view(images.shape)


def color_jitter(
    images: Tensor, *, strength: float, probability: float = 0.8, gray: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Change the colours of images at random (Chen et al. 2020, arXiv:2002.05709, appendix A): of a share
    `probability` of them brightness, contrast and saturation by a factor of 1 ± 0.8·strength, and the hue by up to
    ± 0.2·strength of a full turn; a share `gray` of all loses its colour. uint8 (N, C, H, W) → (N, 3, H, W)."""
    check_images(images)
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
    """Random changes of whole batches; without arguments, none. Images keep their shape unless `size` has
    another."""

    flip: bool = False  # mirror every second image
    shift: int = 0  # move by up to so many pixels, the border repeated: the padded crop of CIFAR recipes
    scale: tuple[float, float] | None = None  # smallest and largest share of the image in a crop; None: no crops
    jitter: float = 0.0  # strength of `color_jitter`
    gray: float = 0.0  # share of images that lose their colour

    def __call__(
        self, images: Tensor, size: Size | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """uint8 (N, C, H, W) → uint8 of `size`, by default that of the images."""
        check_images(images)
        scale, ratio = (self.scale, RATIO) if self.scale else ((1, 1), (1, 1))
        theta = crop_parameters(len(images), scale=scale, ratio=ratio, flip=self.flip, generator=generator)
        if self.shift:  # an image spans 2 of the grid's units
            pixel = 2 / torch.tensor([images.shape[3], images.shape[2]])
            theta[:, :, 2] += (2 * torch.rand(len(images), 2, generator=generator) - 1) * self.shift * pixel
        images = crop(images, theta, size)
        if self.jitter or self.gray:
            images = color_jitter(images, strength=self.jitter, gray=self.gray, generator=generator)
        return images


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of augmented images in random order, (images, labels): normalised float32 (N, 3, h, w) and int64
    (N,); where there are no labels, two independent views of the same images. Calling it gives those of another
    epoch.

    Everything random follows from `seed`, `epoch` and `part` alone, so a resumed run sees what an unbroken one
    does. The last, incomplete batch is left out; ValueError where that leaves none."""

    images: Tensor  # uint8 (N, C, H, W), on the training device
    sizes: list[Size]  # that images are augmented to, one an epoch
    augment: Augmentation
    batch_size: int
    labels: Tensor | None = None  # (N,), on the same device
    seed: int = 0
    epoch: int = 0
    part: tuple[int, int] = (0, 1)  # (k, n): of each batch the k-th of n equal parts, for training in n processes

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.batch_size < 1 or len(self) < 1:
            raise ValueError(f"{len(self.images)} images make no batch of {self.batch_size}; lower the batch size")
        if self.batch_size % self.part[1]:
            raise ValueError(
                f"{self.part[1]} processes do not divide a batch of {self.batch_size}; change its size"
            )
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"{len(self.images)} images have {len(self.labels)} labels; give one label an image")

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
def outputs(model: nn.Module, images: Tensor, size: Size | None = None, batch: int = 250) -> Tensor:
    """What a network gives for uint8 images (N, C, H, W), resized to `size` first: logits, or the features of an
    encoder, (N, D), on the model's device, always computed in float32, `batch` images at a time.
    ValueError: the model is in train mode, where its outputs would depend on the rest of the batch."""
    check_images(images)
    if model.training:
        raise ValueError("the model is in train mode, batch norm would look at the batch; call model.eval() first")
    device = next(model.parameters()).device
    shape = height_and_width(images, size)
    with torch.autocast(device.type, enabled=False):
        return torch.cat([model(normalize(resize(some.to(device), shape))) for some in images.split(batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: Size | None = None) -> float:
    """Share of uint8 images (N, C, H, W) whose most probable class is their label (N,)."""
    guesses = outputs(model, images, size).argmax(1)
    return (guesses == labels.to(guesses.device)).float().mean().item()
