"""CIFAR-10 and MNIST: small labelled images, whole in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import Provenance, download_tar, obtain, verify_md5, with_notice

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# torchvision checks the MD5 of MNIST's archives, but not of the unpacked files that it reads.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class LabelledImages:
    """A data set of small images.

    `train_images`, `test_images`: uint8 (N, channels, side, side); `train_labels`, `test_labels`:
    int64 (N,), positions in `classes`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: Sequence[str]
    provenance: Provenance


def cifar10() -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images (3, 32, 32) in ten classes.

    Offline: 5,000 + 1,000 crops of ten photographs, with classes of their own.

    Raises:
        NoRealData: `PDL_REQUIRE_REAL=1` and CIFAR-10 cannot be had.
    """
    return obtain(
        "CIFAR-10", CIFAR10.base_folder,
        read=_read_cifar10, download=lambda root: download_tar(CIFAR10.url, root, CIFAR10.tgz_md5),
        stand_in=_cifar10_stand_in,
    )  # fmt: skip


def mnist() -> LabelledImages:
    """MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 handwritten digits (1, 28, 28).

    Offline: scikit-learn's 1,797 digits, enlarged.

    Raises:
        NoRealData: `PDL_REQUIRE_REAL=1` and MNIST cannot be had.
    """
    return obtain(
        "MNIST", "MNIST",
        read=_read_mnist, download=_download_mnist,
        stand_in=_mnist_stand_in,
    )  # fmt: skip


def _read_cifar10(folder: Path) -> LabelledImages:
    try:
        train, test = (CIFAR10(folder.parent, train=part) for part in (True, False))
    except RuntimeError:  # torchvision checks every MD5, but does not say which file is wrong
        meta = CIFAR10.meta["filename"], CIFAR10.meta["md5"]
        verify_md5(folder, dict([*CIFAR10.train_list, *CIFAR10.test_list, meta]))
        raise
    arrays = []
    for part in (train, test):
        arrays += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return LabelledImages(*arrays, train.classes, with_notice("CIFAR-10", "official files, MD5 verified", folder))


def _read_mnist(folder: Path) -> LabelledImages:
    verify_md5(folder / "raw", MNIST_MD5)
    train, test = (MNIST(folder.parent, train=part) for part in (True, False))
    arrays = [train.data[:, None], train.targets, test.data[:, None], test.targets]
    return LabelledImages(*arrays, "0123456789", with_notice("MNIST", "official files, MD5 verified", folder))


def _download_mnist(root: Path) -> None:
    # torchvision 0.21 asks a mirror first that is gone, and its loader names the folder after its class.
    type("MNIST", (MNIST,), {"mirrors": [MNIST_URL]})(root, download=True)


def _cifar10_stand_in() -> LabelledImages:
    train, test = stand_ins.texture_crops()
    source = f"stand-in: crops of {len(stand_ins.TEXTURES)} scikit-image and scikit-learn sample photographs"
    return LabelledImages(*train, *test, list(stand_ins.TEXTURES), Provenance("CIFAR-10", source, real=False))


def _mnist_stand_in() -> LabelledImages:
    train, test = stand_ins.digits()
    source = "stand-in: scikit-learn's 8×8 digits, enlarged"
    return LabelledImages(*train, *test, "0123456789", Provenance("MNIST", source, real=False))
