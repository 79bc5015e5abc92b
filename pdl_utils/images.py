"""Images as whole batches on their own device: resize, augment, normalise, and what a network says about them.

They are uint8 (N, C, H, W), colour or grey, of any height and width, until `normalize`. Cropping, mirroring and
resizing a batch are one `grid_sample`; the colours of an image are changed by one 3×4 matrix."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Size = int | tuple[int, int]  # the shorter side in pixels, which keeps the shape; or height and width
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(images: Tensor) -> None:
    """TypeError or ValueError where `images` are not uint8 (N, C, H, W); says what to do."""
    kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
    if kind != torch.uint8:
        remedy = "floats in 0..1 become that by (255 * images).round().to(torch.uint8)"
        raise TypeError(f"images must be a tensor of uint8 in 0..255, not {kind}; {remedy}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        remedy = "one image: image[None]; grey: images[:, None]; channels last: images.permute(0, 3, 1, 2)"
        raise ValueError(f"images must be (N, 3, H, W), grey ones (N, 1, H, W), not {(*images.shape,)}; {remedy}")


def normalize(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """uint8 (N, C, H, W) → float32 (N, 3, H, W), each channel standardised, grey made three equal ones; in memory
    channels_last, which convolutions like best."""
    check_images(images)
    mean, std = (255 * torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def to_uint8(pixels: Tensor) -> Tensor:
    """Float images in 0..255 → uint8, rounded."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def height_and_width(images: Tensor, size: Size | None) -> tuple[int, int]:
    """What `size` means for these images; None: as they are."""
    height, width = images.shape[-2:]
    if size is None or isinstance(size, Sequence):
        return size or (height, width)
    return size * height // min(height, width), size * width // min(height, width)


def resize(images: Tensor, size: Size | None) -> Tensor:
    """Resize uint8 (N, C, H, W), bilinear and anti-aliased; None: leave them as they are."""
    check_images(images)
    shape = height_and_width(images, size)
    if images.shape[-2:] == shape:
        return images
    return to_uint8(F.interpolate(images.float(), shape, mode="bilinear", antialias=True))


def draw_crops(n: int, scale: tuple[float, float] | None, flip: bool, generator: Generator | None) -> Tensor:
    """Random crops for n images (Szegedy et al. 2014, arXiv:1409.4842, sec. 6): a share of the area from `scale`
    (None: all of it), width to height 3/4 to 4/3 of the image's; with `flip`, half of them are mirrored. Gives
    affine maps (n, 2, 3) from the crop to its place in the image, both in [-1, 1]²."""
    area, aspect, mirror, x, y = torch.rand(5, n, generator=generator)
    (low, high), ratio = scale or (1, 1), math.log(4 / 3) if scale else 0
    area, aspect = area * (high - low) + low, (aspect * 2 * ratio - ratio).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(mirror < 0.5 * flip, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * x - 1) * (1 - width)
    theta[:, 1, 2] = (2 * y - 1) * (1 - height)
    return theta


def crop(images: Tensor, theta: Tensor, size: Size | None = None) -> Tensor:
    """Cut crops (N, 2, 3), as `draw_crops` gives them, out of uint8 (N, C, H, W), and resize them to `size`. Where
    that is smaller than the image, a pixel is the mean of k×k samples: one sample would skip pixels."""
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
    `angle` (N,) in radians: one affine map of (red, green, blue) an image. Gives uint8 (N, 3, H, W)."""
    brightness, contrast, saturation = (factor.view(-1, 1, 1) for factor in (brightness, contrast, saturation))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    hue = HUE_PLANE.T @ turn @ HUE_PLANE + 1 / 3  # turns the plane, keeps the grey axis
    color = hue @ (saturation * torch.eye(3) + (1 - saturation) * LUMA.expand(3, 3))
    matrix = (brightness * contrast * color).to(images.device)
    images = images.expand(-1, 3, -1, -1)
    pixels = images.flatten(2).float()
    # Contrast is about the mean grey of the image, which saturation and hue leave as it is.
    grey = pixels.mean(2) @ LUMA.to(images.device)
    offset = grey.view(-1, 1, 1) * (brightness * (1 - contrast)).to(images.device)
    return to_uint8(torch.baddbmm(offset, matrix, pixels)).view(images.shape)


def color_jitter(images: Tensor, strength: float, gray: float = 0.0, generator: Generator | None = None) -> Tensor:
    """Random colours (Chen et al. 2020, arXiv:2002.05709, appendix A): of 80% of the images brightness, contrast
    and saturation change by a factor of 1 ± 0.8·strength, the hue by up to ± 0.2·strength of a full turn; a share
    `gray` of all loses its colour. uint8 (N, C, H, W) → (N, 3, H, W)."""
    check_images(images)
    changed = (torch.rand(len(images), generator=generator) < 0.8).float()
    change = changed * (2 * torch.rand(4, len(images), generator=generator) - 1)  # (4, N), in -1..1
    brightness, contrast, saturation = 1 + change[:3] * (0.8 * strength)
    angle = 2 * math.pi * (change[3] * (0.2 * strength))
    saturation = saturation * (torch.rand(len(images), generator=generator) >= gray)
    return change_colors(images, brightness, contrast, saturation, angle)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of whole batches; without arguments, none. `generator` is one of the CPU: it gives the same
    changes on every device."""

    flip: bool = False  # mirror every second image, at random
    shift: int = 0  # move by up to so many pixels, the border repeated: the padded crop of CIFAR recipes
    scale: tuple[float, float] | None = None  # smallest and largest share of the image in a crop; None: no crops
    jitter: float = 0.0  # strength of `color_jitter`
    gray: float = 0.0  # share of images that lose their colour

    def __call__(self, images: Tensor, size: Size | None = None, generator: Generator | None = None) -> Tensor:
        """uint8 (N, C, H, W) → uint8 of `size`, by default that of the images."""
        check_images(images)
        theta = draw_crops(len(images), self.scale, self.flip, generator)
        if self.shift:  # an image spans 2 of the grid's units
            pixel = 2 / torch.tensor([images.shape[3], images.shape[2]])
            theta[:, :, 2] += (2 * torch.rand(len(images), 2, generator=generator) - 1) * self.shift * pixel
        images = crop(images, theta, size)
        if self.jitter or self.gray:
            images = color_jitter(images, self.jitter, self.gray, generator)
        return images


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of augmented images in random order: normalised float32 (N, 3, h, w) and labels (N,), or, without
    labels, two independent views of the same images. An incomplete last batch is left out.

    Call it for another epoch. All that is random follows from `seed`, `epoch` and `part`: a resumed training sees
    what an unbroken one does."""

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
        count, size, processes = len(self.images), self.batch_size, self.part[1]
        if not 1 <= size <= count:
            raise ValueError(f"{count} images make no batch of {size}; take a batch size of 1 to {count}")
        if size % processes:
            raise ValueError(f"{processes} processes do not divide a batch of {size}; change its size")
        if self.labels is not None and len(self.labels) != count:
            raise ValueError(f"{count} images have {len(self.labels)} labels; give one label an image")

    def __call__(self, epoch: int) -> "Batches":
        return replace(self, epoch=epoch)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed, (k, n) = 1_000_003 * self.seed + self.epoch, self.part
        order = torch.randperm(len(self.images), generator=Generator().manual_seed(seed))
        own = Generator().manual_seed(seed + 7_919 * k)  # each process augments in its own way
        for batch in order.split(self.batch_size)[: len(self)]:
            rows, size = batch[k::n], self.sizes[self.epoch]
            first = normalize(self.augment(self.images[rows], size, own))
            if self.labels is None:
                yield first, normalize(self.augment(self.images[rows], size, own))
            else:
                yield first, self.labels[rows]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, size: Size | None = None, batch: int = 250) -> Tensor:
    """What a network in eval mode gives for uint8 images (N, C, H, W), resized to `size`: logits, or features, on
    its device, always computed in float32, `batch` images at a time."""
    check_images(images)
    if any(module.training for module in model.modules()):
        raise ValueError("a part of the model is in train mode (batch norm, dropout); call model.eval() first")
    device = next(model.parameters(), images).device
    with torch.autocast(device.type, enabled=False):
        return torch.cat([model(normalize(resize(some.to(device), size))) for some in images.split(batch)])


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows (N, classes) whose largest entry is that of their label (N,). ValueError: they are not."""
    fit = logits.ndim == 2 and logits.shape[1] > 1 and labels.shape == logits.shape[:1] and len(labels) > 0
    if not fit or logits.isnan().any():
        shapes = f"{(*logits.shape,)} and {(*labels.shape,)}"
        raise ValueError(f"scores must be (N, classes) without NaN, and labels (N,); they are {shapes}")
    return (logits.argmax(1).cpu() == labels.cpu()).float().mean().item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: Size | None = None) -> float:
    """Share of uint8 images (N, C, H, W) whose most probable class is their label (N,)."""
    return share_right(outputs(model, images, size), labels)
