"""Classifiers with all that belongs to their weights: torchvision's networks, and a ResNet for small images
(He et al. 2015, arXiv:1512.03385)."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from unittest.mock import patch

import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.resnet import BasicBlock

from pdl_utils.datasets.photos import to_rgb
from pdl_utils.datasets.sources import Provenance, obtain, reading, tell, with_notice
from pdl_utils.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from pdl_utils.settings import data_root, progress_wanted
from pdl_utils.weights import CHECKPOINTS, load_weights, read_weights, sha256


class UnfitWeights(RuntimeError):
    """A file of weights of the user's own is damaged, or not for this architecture."""


@dataclass
class PretrainedNetwork:
    """A trained classifier in eval mode, its classes' names in the order of its scores, and how it wants images:
    the shorter side `resize` pixels long, of that the middle `size` × `size`, `mean` and `std` of the colours in
    0..1. `model` knows the `categories` too, so that maps can be asked for by name."""

    model: nn.Module
    categories: list[str]
    provenance: Provenance
    resize: int = 256
    size: int = 224
    interpolation: str | TF.InterpolationMode = "bilinear"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        fit = len(self.mean) == len(self.std) == 3 and 0 not in self.std
        if not fit or not all(0 <= value <= 1 for value in [*self.mean, *self.std]):
            raise ValueError("mean and std are of three colours in 0..1, not in 0..255")
        self.model.eval().categories = self.categories
        self.resize = max(self.resize, self.size)  # a smaller photograph would get a black frame
        self.interpolation = TF.InterpolationMode(self.interpolation)  # by its name

    def crop(self, photos: Sequence[Image.Image]) -> Tensor:
        """Photographs of any size and kind → uint8 (N, 3, size, size): what the network will see, to be shown."""
        how = {"interpolation": self.interpolation, "antialias": True}
        small = [TF.resize(to_rgb(photo), [self.resize], **how) for photo in photos]
        return torch.stack([TF.pil_to_tensor(TF.center_crop(photo, [self.size])) for photo in small])

    def preprocess(self, crops: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) → the standardised float batch that `model` takes, on its device."""
        weight = next(self.model.parameters())
        return normalize(crops.to(weight.device), self.mean, self.std).to(weight.dtype)

    @torch.no_grad()
    def logits(self, crops: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) → scores (N, number of categories), on the CPU."""
        return torch.cat([self.model(self.preprocess(some)).cpu() for some in crops.split(32)])

    def classes_of(self, names: Sequence[str | None]) -> Tensor:
        """`find_class` of each name, int64 (N,). Of synonyms, "goldfish, Carassius auratus", the first counts."""
        found = {name: find_class(name.split(",")[0], self.categories) for name in set(names) if name}
        return torch.tensor([found.get(name, -1) for name in names])


def find_class(name: str, categories: Sequence[str]) -> int:
    """The one class of this name; -1 where there is none, or several ("crane"). Upper and lower case are told
    apart only where they must be, as for "Cardigan" (a dog) and "cardigan"."""
    exact = [i for i, category in enumerate(categories) if category == name]
    found = exact or [i for i, category in enumerate(categories) if category.lower() == name.lower()]
    return found[0] if len(found) == 1 else -1


def torchvision_network(arch: str, device: torch.device | str = "cpu") -> PretrainedNetwork:
    """A classifier of torchvision, 'mobilenet_v3_small': with the user's own `weights/ARCH.safetensors` under the
    data root, if it is there (data/checkpoints/README.md); else with torchvision's weights for ImageNet; where
    those cannot be had, 'resnet18' and 'resnet34' as this project trained them. UnfitWeights: the user's file is
    damaged or for another network. NoRealData: there are no weights."""
    known = list_models(module=torchvision.models)
    if arch not in known:
        similar = get_close_matches(arch, known) or known
        raise ValueError(f"torchvision has no classifier {arch!r}; did you mean {', '.join(similar)}?")
    file = data_root() / "weights" / f"{arch}.safetensors"
    mine = file.exists() or file.is_symlink()
    network = users_network(arch, file) if mine else official_network(arch)
    network.model.to(device, memory_format=torch.channels_last)
    return network


pretrained_resnet = torchvision_network  # its name for 'resnet18' and 'resnet34', which can always be had


def users_network(arch: str, file: Path) -> PretrainedNetwork:
    """The network whose weights are in `file`, with its facts: `categories`, and where they are not the usual ones
    `source`, `resize`, `size`, `interpolation`, `mean`, `std` and `transform_input`."""
    try:
        weights, facts = read_weights(file)
        if "categories" not in facts:
            raise ValueError("it names no categories")
        broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if broken or type(facts["categories"]) is not list:
            raise ValueError(f"`categories` must be a list of names, and weights finite; {broken[:3]} are not")
        model = get_model(arch, num_classes=len(facts["categories"]))
        heads = {name: value for name, value in model.state_dict().items() if "aux" in name.lower()}
        model.load_state_dict(heads | weights)  # heads that only training uses may be left out
        given = {name: facts[name] for name in ("resize", "size", "interpolation", "mean", "std") if name in facts}
        origin = with_notice(f"{arch} weights", facts.get("source", f"the file weights/{file.name}"), file.parent)
        network = PretrainedNetwork(model, facts["categories"], origin, **given)
        if "transform_input" in facts:
            model.transform_input = facts["transform_input"]
        network.classes_of(network.categories)
        network.logits(network.crop([Image.new("RGB", (8, 8))]))
    except Exception as error:  # facts can be wrong in all kinds of ways
        raise UnfitWeights(
            f"{file} does not fit {arch}: {shorten(str(error), 400)}. Write it anew as data/checkpoints/README.md "
            "says, with a category for each output of the last layer, or remove it to use torchvision's weights."
        ) from error
    tell(origin)
    return network


def official_network(arch: str) -> PretrainedNetwork:
    """With torchvision's weights IMAGENET1K_V1, or the first that it has; else as this project trained it."""
    entries = get_model_weights(arch).__members__
    entry = entries.get("IMAGENET1K_V1") or next(iter(entries.values()))
    file, preset, categories = Path(entry.url).name, entry.transforms(), entry.meta["categories"]

    def read(path: Path) -> PretrainedNetwork:
        with reading(path):
            # The file's name ends in the start of its SHA-256, as all of torchvision's do.
            if not sha256(path).startswith(path.stem.rsplit("-", 1)[1]):
                raise ValueError("its SHA-256 differs")
            state = torch.load(path, map_location="cpu", weights_only=True)
        # torchvision's own function knows what belongs to the weights: transform_input, sizes, renamed keys.
        with patch.object(type(entry), "get_state_dict", lambda *_, **__: state):
            model = get_model(arch, weights=entry)
        origin = Provenance(f"{arch} weights", f"torchvision's {entry.name}, {len(categories):,} classes")
        resize, size, how = preset.resize_size[0], preset.crop_size[0], preset.interpolation.value
        return PretrainedNetwork(model, categories, origin, resize, size, how, preset.mean, preset.std)

    def download(folder: Path) -> None:
        torch.hub.download_url_to_file(entry.url, str(folder / file), progress=progress_wanted())

    stand_in = (lambda: own_network(arch)) if arch in ("resnet18", "resnet34") else None
    return obtain(f"{arch} weights", file, read=read, download=download, stand_in=stand_in)


def own_network(arch: str) -> PretrainedNetwork:
    """The ResNet that `python -m scripts.pretrain_resnet` made and that ships in `data/checkpoints/`."""
    weights, facts = load_weights(CHECKPOINTS / f"{arch}_tiny_imagenet.safetensors")
    model = get_model(arch, num_classes=len(facts["categories"]))
    model.load_state_dict(weights)
    side, size = facts["resolution"], facts["photo_size"]
    source = f"this project's own, trained on {facts['data']}, top-1 {facts['top1'][str(side)]:.1%} at {side} px"
    return PretrainedNetwork(model, facts["categories"], Provenance(f"{arch} weights", source), size, size)


def cifar_resnet18(num_classes: int = 10, *, width: int = 64, stem_stride: int = 1) -> nn.Sequential:
    """ResNet-18 for images of 32×32, (N, 3, H, W) → (N, num_classes): torchvision's blocks and layer names behind
    a 3×3 stem without max-pooling, as in the CIFAR networks of He et al. (sec. 4.2) and of SimCLR (appendix B.9).
    `width`: channels of the first stage. `stem_stride`: 1 as published; 2 costs a quarter."""

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))

    layers = OrderedDict(
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
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
