"""CIFAR-10, MNIST, or images of your own as `LabelledImages`: small, and whole in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import Provenance, download_tar, obtain, verify_md5, with_notice
from pdl_utils.images import check_images

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {  # of the unpacked files, which torchvision does not check
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class LabelledImages:
    """Images: uint8 (N, C, H, W), C is 3 or 1 (grey). Labels: int64 (N,), positions in `classes`. TypeError or
    ValueError where they are not."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: Sequence[str]
    provenance: Provenance

    def __post_init__(self) -> None:
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            check_images(images)
            fit = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            if not fit or not set(labels.tolist()) <= set(range(len(self.classes))):
                asked = f"one for each of the {len(images)} images, 0 to {len(self.classes) - 1}"
                raise ValueError(f"labels must be a tensor of int64, {asked}: positions in `classes`")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError("training and test images must be of one shape")


def cifar10() -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images (3, 32, 32) in ten classes; offline 5,000 + 1,000."""
    source = "stand-in: crops of 10 scikit-image and scikit-learn sample photographs"
    origin = Provenance("CIFAR-10", source, real=False)
    return obtain(
        "CIFAR-10", CIFAR10.base_folder, read=_read_cifar10,
        download=lambda root: download_tar(CIFAR10.url, root, CIFAR10.tgz_md5),
        stand_in=lambda: LabelledImages(*stand_ins.texture_crops(), list(stand_ins.TEXTURES), origin),
    )  # fmt: skip


def mnist() -> LabelledImages:
    """MNIST (LeCun, Cortes, Burges): 60,000 + 10,000 handwritten digits (1, 28, 28); offline 1,438 + 359."""
    origin = Provenance("MNIST", "stand-in: scikit-learn's 8×8 digits, enlarged", real=False)
    return obtain(
        "MNIST", "MNIST", read=_read_mnist, download=_download_mnist,
        stand_in=lambda: LabelledImages(*stand_ins.digits(), "0123456789", origin),
    )  # fmt: skip


def _read_cifar10(folder: Path) -> LabelledImages:
    try:
        train, test = (CIFAR10(folder.parent, train=part) for part in (True, False))
    except RuntimeError:  # torchvision has checked every MD5, but does not say which file is wrong
        meta = CIFAR10.meta["filename"], CIFAR10.meta["md5"]
        verify_md5(folder, dict([*CIFAR10.train_list, *CIFAR10.test_list, meta]))
        raise
    tensors = []
    for part in (train, test):
        tensors += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return LabelledImages(*tensors, train.classes, with_notice("CIFAR-10", "official files, MD5 verified", folder))


def _read_mnist(folder: Path) -> LabelledImages:
    verify_md5(folder / "raw", MNIST_MD5)
    # torchvision's class would rather take what an older version of it has left in processed/.
    train, names, test, test_names = (read_sn3_pascalvincent_tensor(folder / "raw" / name) for name in MNIST_MD5)
    tensors = train[:, None], names.long(), test[:, None], test_names.long()
    return LabelledImages(*tensors, "0123456789", with_notice("MNIST", "official files, MD5 verified", folder))


def _download_mnist(root: Path) -> None:
    for name, md5 in MNIST.resources:  # not from torchvision's list of mirrors: its first one is gone
        download_and_extract_archive(MNIST_URL + name, root / "MNIST" / "raw", md5=md5, remove_finished=True)
