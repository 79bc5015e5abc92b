"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64×64, with a box an image. It has no stand-in."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain, reading, with_notice

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
VAL_COUNT = 10_000


@dataclass(frozen=True)
class TinyImageNet:
    """`images`: uint8 (N, 3, 64, 64); `labels`: int64 (N,), positions in `wnids` ("n01443537") and `names`
    ("goldfish, Carassius auratus"); `boxes`: int64 (N, 4), x0, y0, x1, y1 in pixels, both ends inside."""

    images: Tensor
    labels: Tensor
    boxes: Tensor
    wnids: list[str]
    names: list[str]
    provenance: Provenance


def tiny_imagenet(split: str, limit: int | None = None) -> TinyImageNet:
    """The "train" or the "val" split, or `limit` images of it, spread evenly over the classes, always the same.
    NoRealData where there are neither files nor network: catch it to skip what needs boxes."""
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: use 'train' or 'val'")
    return obtain(
        "Tiny ImageNet", "tiny-imagenet-200", read=lambda folder: _read(folder, split, limit),
        download=lambda folder: download_and_extract_archive(URL, folder, md5=MD5, remove_finished=True),
    )  # fmt: skip


def _read(folder: Path, split: str, limit: int | None) -> TinyImageNet:
    with reading(folder / "wnids.txt"):
        wnids = sorted((folder / "wnids.txt").read_text("utf-8").split())
        if wnids != sorted(path.name for path in (folder / "train").glob("n*[0-9]")):
            raise ValueError("it does not name the folders in train/")
    with reading(folder / "words.txt"):
        words = dict(line.split("\t") for line in (folder / "words.txt").read_text("utf-8").splitlines())
        names = [words[wnid] for wnid in wnids]
    # Lines of `name wnid x0 y0 x1 y1`; those of a training class do not repeat its wnid.
    annotations = {"": folder / "val" / "val_annotations.txt"}
    if split == "train":
        annotations = {wnid: folder / "train" / wnid / f"{wnid}_boxes.txt" for wnid in wnids}
    files, labels, boxes = [], [], []
    for wnid, path in annotations.items():
        with reading(path):
            for line in path.read_text("utf-8").splitlines():
                name, *label, x0, y0, x1, y1 = line.split()
                files.append(path.parent / "images" / name)
                labels.append(wnids.index(label[0] if label else wnid))
                boxes.append([int(x0), int(y0), int(x1), int(y1)])
    if split == "val" and len(files) != VAL_COUNT:
        raise DamagedFile(f"{annotations['']} has {len(files)} lines, not {VAL_COUNT}")
    picked = spread(labels, limit)
    images = torch.empty(len(picked), 3, 64, 64, dtype=torch.uint8)
    for image, i in zip(images, picked, strict=True):  # 6 s for 50,000; threads made it slower
        with reading(files[i]), Image.open(files[i], formats=["JPEG"]) as file:
            image[:] = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    counted = f"{len(files) // len(wnids)} {'training' if split == 'train' else 'validation'} images a class"
    origin = with_notice("Tiny ImageNet", f"official layout, {counted}", folder)
    return TinyImageNet(images, torch.tensor(labels)[picked], torch.tensor(boxes)[picked], wnids, names, origin)


def spread(labels: list[int], limit: int | None) -> list[int]:
    """Positions, ascending, of `limit` of `labels` (None: of all), drawn with seed 0, evenly over the classes."""
    order, seen, turn = np.random.default_rng(0).permutation(len(labels)).tolist(), Counter(), {}
    for i in order:
        turn[i] = seen[labels[i]]  # this is the how-manieth image of its class?
        seen[labels[i]] += 1
    return sorted(sorted(order, key=turn.get)[:limit])
