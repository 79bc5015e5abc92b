"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64×64, with a box an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain, with_notice

FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
VAL_COUNT = 10_000


@dataclass(frozen=True)
class TinyImageNet:
    """One split.

    `images`: uint8 (N, 3, 64, 64); `labels`: int64 (N,), positions in `wnids` and `names`;
    `boxes`: int64 (N, 4), x0, y0, x1, y1 in pixels, both ends inside the box;
    `wnids`: sorted ("n01443537"); `names`: "goldfish, Carassius auratus".
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    wnids: list[str]
    names: list[str]
    provenance: Provenance


def tiny_imagenet(split: str, limit: int | None = None) -> TinyImageNet:
    """The `train` or the `val` split; its test split has no labels. There is no stand-in.

    Args:
        split: "train" or "val".
        limit: read only so many images, the same ones on every call, spread evenly over the classes.

    Raises:
        NoRealData: neither files nor network; catch it to skip what needs boxes.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: use 'train' or 'val'")
    return obtain(
        "Tiny ImageNet", FOLDER,
        read=lambda folder: _read(folder, split, limit),
        download=lambda folder: download_and_extract_archive(URL, folder, md5=MD5, remove_finished=True),
    )  # fmt: skip


def _read(folder: Path, split: str, limit: int | None) -> TinyImageNet:
    wnids = sorted(_lines(folder / "wnids.txt"))
    words = dict(line.partition("\t")[::2] for line in _lines(folder / "words.txt"))
    classes = [folder / "train" / wnid for wnid in wnids]
    per_class = [len(_lines(c / f"{c.name}_boxes.txt")) for c in classes]
    if split == "train":
        rows = [row for c in classes for row in _rows(c / f"{c.name}_boxes.txt", c / "images", c.name)]
    else:
        rows = _rows(folder / "val" / "val_annotations.txt", folder / "val" / "images")
        if len(rows) != VAL_COUNT:
            raise DamagedFile(f"{folder}/val/val_annotations.txt has {len(rows)} lines, not {VAL_COUNT}")
    if unknown := {wnid for _, wnid, _ in rows}.symmetric_difference(wnids) | set(wnids).difference(words):
        raise DamagedFile(f"{folder}/wnids.txt does not fit the other lists of classes ({min(unknown)})")
    labels = np.array([wnids.index(wnid) for _, wnid, _ in rows])
    picked = np.arange(len(rows)) if limit is None else spread(labels, limit)
    images = np.empty((len(picked), 64, 64, 3), dtype=np.uint8)
    for i, position in enumerate(picked):  # 6 s for 50,000; threads made it slower
        images[i] = _pixels(rows[position][0])
    counted = "–".join(str(n) for n in sorted({min(per_class), max(per_class)}))
    return TinyImageNet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels[picked]),
        torch.tensor([rows[position][2] for position in picked]),
        wnids,
        [words[wnid] for wnid in wnids],
        with_notice("Tiny ImageNet", f"official layout, {counted} training images a class", folder),
    )


def spread(labels: np.ndarray, limit: int) -> np.ndarray:
    """Positions, ascending, of at most `limit` of `labels` (N,), drawn with seed 0, of each class as many
    as of any other, give or take one."""
    order = np.random.default_rng(0).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # this is the how-manieth image of its class?
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def _rows(annotations: Path, images: Path, wnid: str = "") -> list[tuple[Path, str, list[int]]]:
    """Image, class and box from the lines `name [wnid] x0 y0 x1 y1` of an annotation file."""
    rows = []
    for line in _lines(annotations):
        try:
            name, *label, x0, y0, x1, y1 = line.split()
            rows.append((images / name, label[0] if label else wnid, [int(x0), int(y0), int(x1), int(y1)]))
        except ValueError as error:
            raise DamagedFile(f"{annotations} has a line that cannot be read: {line!r}") from error
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path} is missing or not text") from error


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DamagedFile(f"{path} is missing, truncated or not a JPEG file") from error
