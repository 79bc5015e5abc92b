"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64×64, with a box an image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain

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


class _Row(NamedTuple):
    """One line of an annotation file."""

    folder: Path
    name: str
    wnid: str
    box: list[int]


def tiny_imagenet(
    split: str, limit: int | None = None, *, seed: int = 0, root: Path | None = None
) -> TinyImageNet:
    """The `train` or the `val` split; its test split has no labels. There is no stand-in.

    Args:
        split: "train" or "val".
        limit: read only so many images, drawn with `seed` and spread evenly over the classes.
        root: the data root, if not `data_root()`.

    Raises:
        NoRealData: neither files nor network; catch it to skip what needs boxes.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: use 'train' or 'val'")
    return obtain(
        "Tiny ImageNet", FOLDER,
        read=lambda folder: _read(folder, split, limit, seed),
        download=lambda folder: download_and_extract_archive(URL, folder, md5=MD5, remove_finished=True),
        url=URL, root=root,
    )  # fmt: skip


def _read(folder: Path, split: str, limit: int | None, seed: int) -> TinyImageNet:
    wnids = sorted(_lines(folder / "wnids.txt"))
    words = dict(line.partition("\t")[::2] for line in _lines(folder / "words.txt"))
    if missing := [wnid for wnid in wnids if wnid not in words]:
        raise DamagedFile(folder / "words.txt", f"has no words for {missing[0]}")
    rows = {"train": _train_rows(folder, wnids), "val": _val_rows(folder, wnids)}
    per_class = Counter(row.wnid for row in rows["train"]).values()
    counted = "–".join(str(n) for n in sorted({min(per_class), max(per_class)}))

    chosen = rows[split]
    index = {wnid: i for i, wnid in enumerate(wnids)}
    labels = np.array([index[row.wnid] for row in chosen])
    if limit is not None:
        picked = spread(labels, limit, seed)
        chosen, labels = [chosen[i] for i in picked], labels[picked]
    images = np.empty((len(chosen), 64, 64, 3), dtype=np.uint8)
    for i, row in enumerate(chosen):  # 6 s for 50,000; threads made it slower
        images[i] = _pixels(row.folder / row.name)
    return TinyImageNet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels),
        torch.tensor([row.box for row in chosen]),
        wnids,
        [words[wnid] for wnid in wnids],
        Provenance("Tiny ImageNet", f"official layout, {counted} training images a class"),
    )


def spread(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Positions, ascending, of at most `limit` of `labels` (N,), drawn at random, of each class as many
    as of any other, give or take one."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.empty(len(labels), dtype=np.int64)  # this is the how-manieth image of its class?
    turn[by_class] = np.arange(len(labels)) - starts
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def _train_rows(folder: Path, wnids: list[str]) -> list[_Row]:
    classes = [folder / "train" / wnid for wnid in wnids]
    return [row for c in classes for row in _rows(c / f"{c.name}_boxes.txt", c / "images", c.name)]


def _val_rows(folder: Path, wnids: list[str]) -> list[_Row]:
    path = folder / "val" / "val_annotations.txt"
    rows = _rows(path, folder / "val" / "images")
    if len(rows) != VAL_COUNT:
        raise DamagedFile(path, f"has {len(rows)} lines, not {VAL_COUNT}")
    if unknown := {row.wnid for row in rows}.difference(wnids):
        raise DamagedFile(folder / "wnids.txt", f"does not have {min(unknown)}, which {path.name} uses")
    return rows


def _rows(path: Path, images: Path, wnid: str = "") -> list[_Row]:
    """The lines `name [wnid] x0 y0 x1 y1` of an annotation file, each of an image that exists."""
    there = {entry.name for entry in images.iterdir()} if images.is_dir() else set()
    rows = []
    for line in _lines(path):
        try:
            name, *label, x0, y0, x1, y1 = line.split()
            rows.append(_Row(images, name, label[0] if label else wnid, [int(x0), int(y0), int(x1), int(y1)]))
        except ValueError as error:
            raise DamagedFile(path, f"has a line that cannot be read: {line!r}") from error
        if name not in there:
            raise DamagedFile(images / name, f"is missing, although {path.name} lists it")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DamagedFile(path, "is missing or not text") from error


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DamagedFile(path, "is truncated or not a JPEG file") from error
