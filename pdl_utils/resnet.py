"""Residual networks (He et al. 2015, arXiv:1512.03385): torchvision's own classes, and where their
weights come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain, with_notice
from pdl_utils.images import normalize
from pdl_utils.settings import data_root, progress_wanted
from pdl_utils.weights import CHECKPOINTS, CorruptCheckpoint, load_weights, read_weights, sha256


class UnfitWeights(RuntimeError):
    """A file of weights of the user's own is damaged, or not for this architecture."""


@dataclass
class PretrainedNetwork:
    """A trained classifier with everything that belongs to its weights.

    Attributes:
        model: in eval mode; preprocessed images (N, 3, H, W) → logits (N, number of categories).
        categories: the classes' names, in the order of the logits.
        resize, size: `crop` makes the shorter side `resize` pixels long, then cuts out the middle
            `size` × `size`.
        provenance: which weights these are.
    """

    model: nn.Module
    categories: list[str]
    resize: int
    size: int
    provenance: Provenance

    def crop(self, photos: Sequence[Image.Image]) -> Tensor:
        """Photographs of any size → uint8 (N, 3, size, size): what the network will see, to be shown."""
        small = [TF.resize(TF.pil_to_tensor(p.convert("RGB")), [self.resize], antialias=True) for p in photos]
        return torch.stack([TF.center_crop(image, [self.size]) for image in small])

    def preprocess(self, crops: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) → the standardised float batch that `model` takes, on its device."""
        return normalize(crops.to(next(self.model.parameters()).device))

    def class_of(self, name: str | None) -> int | None:
        """The class of this name, which may be 0; None where the network has none, or several ("crane").
        Upper and lower case are told apart only where they must be, as for "Cardigan" (a dog) and "cardigan"."""
        found = [i for i, category in enumerate(self.categories) if category == name] or [
            i for i, category in enumerate(self.categories) if category.lower() == (name or "").lower()
        ]
        return found[0] if len(found) == 1 else None


def pretrained_resnet(arch: str, device: torch.device | str = "cpu") -> PretrainedNetwork:
    """A ResNet trained on ImageNet, as `torchvision_network` finds it; where that finds nothing, this project's
    own, trained on Tiny ImageNet (200 of the classes).

    Args:
        arch: 'resnet18' or 'resnet34'.

    Raises:
        ValueError: another architecture.
        UnfitWeights: the user's own file is damaged or for another network.
        CorruptCheckpoint: the project's own file is damaged.
    """
    if arch not in ("resnet18", "resnet34"):
        raise ValueError(f"no weights for {arch!r}; choose 'resnet18' or 'resnet34'")
    return torchvision_network(arch, device, otherwise=own_network)


def torchvision_network(
    arch: str,
    device: torch.device | str = "cpu",
    otherwise: Callable[[str], PretrainedNetwork] | None = None,
) -> PretrainedNetwork:
    """Any classifier of torchvision: with the weights in the user's own file `weights/ARCH.safetensors` under the
    data root, if there is one (data/checkpoints/README.md says what it holds), else with torchvision's first
    ImageNet weights, IMAGENET1K_V1.

    Args:
        arch: as torchvision calls it, 'mobilenet_v3_small'.
        otherwise: gives the network where neither is to be had.

    Raises:
        UnfitWeights: the user's own file is damaged or for another network.
        NoRealData: no weights are to be had, and there is no `otherwise`.
    """
    file = data_root() / "weights" / f"{arch}.safetensors"
    network = users_network(arch, file) if file.exists() else _official_network(arch, otherwise)
    network.model.to(device, memory_format=torch.channels_last).eval()
    return network


def users_network(arch: str, file: Path) -> PretrainedNetwork:
    """The network whose weights and facts (`categories`; `source`, `resize`, `size` if given) are in `file`.

    Raises:
        UnfitWeights: weights are missing, left over or of another shape, or there are no categories.
    """
    try:
        weights, facts = read_weights(file)
        model = get_model(arch, num_classes=len(facts["categories"]))
        model.load_state_dict(weights)
    except (CorruptCheckpoint, RuntimeError, KeyError, TypeError) as error:
        problem = "it names no categories" if isinstance(error, KeyError) else shorten(str(error), 400)
        raise UnfitWeights(
            f"{file} does not fit {arch}: {problem}. Write it anew as data/checkpoints/README.md says, "
            "with a category for each output of the last layer, or remove it to use torchvision's weights."
        ) from error
    origin = with_notice(f"{arch} weights", facts.get("source", f"the file weights/{file.name}"), file.parent)
    print(origin)
    return PretrainedNetwork(model, facts["categories"], facts.get("resize", 256), facts.get("size", 224), origin)


def _official_network(arch: str, otherwise: Callable[[str], PretrainedNetwork] | None) -> PretrainedNetwork:
    weights = get_model_weights(arch).IMAGENET1K_V1
    file = weights.url.rsplit("/", 1)[1]

    def read(path: Path) -> PretrainedNetwork:
        # The file's name ends in the start of its SHA-256, as all of torchvision's do.
        if not sha256(path).startswith(path.stem.rsplit("-", 1)[1]):
            raise DamagedFile(f"{path} is truncated or corrupt (its SHA-256 differs)")
        model = get_model(arch)
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        origin = Provenance(f"{arch} weights", "torchvision's IMAGENET1K_V1, 1,000 classes")
        shape = weights.transforms()
        return PretrainedNetwork(
            model, weights.meta["categories"], shape.resize_size[0], shape.crop_size[0], origin
        )

    return obtain(
        f"{arch} weights", file,
        read=read,
        download=lambda root: torch.hub.download_url_to_file(
            weights.url, str(root / file), progress=progress_wanted()
        ),
        stand_in=(lambda: otherwise(arch)) if otherwise else None,
    )  # fmt: skip


def own_network(arch: str) -> PretrainedNetwork:
    """The ResNet that `python -m scripts.pretrain_resnet` made and that ships in `data/checkpoints/`."""
    weights, facts = load_weights(CHECKPOINTS / f"{arch}_tiny_imagenet.safetensors")
    model = get_model(arch, num_classes=len(facts["categories"]))
    model.load_state_dict(weights)
    accuracy = facts["top1"][str(facts["resolution"])]
    origin = Provenance(
        f"{arch} weights",
        f"this project's own, trained on {facts['data']}, top-1 {accuracy:.1%} at {facts['resolution']} px",
    )
    size = facts["photo_size"]
    return PretrainedNetwork(model.eval(), facts["categories"], size, size, origin)


def cifar_resnet18(num_classes: int = 10, *, width: int = 64, stem_stride: int = 1) -> nn.Sequential:
    """ResNet-18 for images of 32×32: torchvision's blocks behind a 3×3 stem without max-pooling, as in the
    CIFAR networks of He et al. (sec. 4.2) and of SimCLR (appendix B.9).

    Args:
        num_classes: outputs of `fc`.
        width: channels of the first stage; 64, 128, 256, 512 features in the four stages as published.
        stem_stride: 1 as published; 2 costs a quarter, for where only a CPU is at hand.

    Returns:
        (N, 3, H, W) → (N, num_classes), with the layers' names of torchvision: `conv1` … `layer4`, `fc`.
    """

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        ) if stride > 1 else None  # fmt: skip
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))

    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            layer1=stage(width, width, 1),
            layer2=stage(width, 2 * width, 2),
            layer3=stage(2 * width, 4 * width, 2),
            layer4=stage(4 * width, 8 * width, 2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(8 * width, num_classes),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
