"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64×64, with a box an image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from pdl_utils.datasets.sources import DamagedFile, obtain
from pdl_utils.provenance import Provenance

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


@dataclass(frozen=True)
class _Annotation:
    path: Path
    wnid: str
    box: tuple[int, int, int, int]


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
    rows = {"train": _train_annotations(folder, wnids), "val": _val_annotations(folder, wnids)}
    per_class = sorted(set(Counter(row.wnid for row in rows["train"]).values()))
    counted = "–".join(str(n) for n in sorted({per_class[0], per_class[-1]}))

    chosen = rows[split]
    index = {wnid: i for i, wnid in enumerate(wnids)}
    labels = np.array([index[row.wnid] for row in chosen])
    if limit is not None:
        picked = spread(labels, limit, seed)
        chosen, labels = [chosen[i] for i in picked], labels[picked]
    images = torch.empty(len(chosen), 3, 64, 64, dtype=torch.uint8)
    for image, row in zip(images, chosen, strict=True):  # 3 s for 50,000; threads made it slower
        image.copy_(_decode(row.path))
    return TinyImageNet(
        images,
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


def _train_annotations(folder: Path, wnids: list[str]) -> list[_Annotation]:
    rows = []
    for wnid in wnids:
        place = folder / "train" / wnid
        rows += _annotations(place / f"{wnid}_boxes.txt", place / "images", wnid)
    return rows


def _val_annotations(folder: Path, wnids: list[str]) -> list[_Annotation]:
    path = folder / "val" / "val_annotations.txt"
    rows = _annotations(path, folder / "val" / "images")
    if len(rows) != VAL_COUNT:
        raise DamagedFile(path, f"has {len(rows)} lines, not {VAL_COUNT}")
    if unknown := {row.wnid for row in rows}.difference(wnids):
        raise DamagedFile(folder / "wnids.txt", f"does not have {min(unknown)}, which {path.name} uses")
    return rows


def _annotations(path: Path, images: Path, wnid: str | None = None) -> list[_Annotation]:
    """Rows of `name [wnid] x0 y0 x1 y1`, each of an image that exists."""
    there = {entry.name for entry in images.iterdir()} if images.is_dir() else set()
    rows = []
    for line in _lines(path):
        try:
            name, label, *box = line.split() if wnid is None else [line.split()[0], wnid, *line.split()[1:]]
            x0, y0, x1, y1 = map(int, box)
        except ValueError as error:
            raise DamagedFile(path, f"has a line that cannot be read: {line!r}") from error
        if name not in there:
            raise DamagedFile(images / name, f"is missing, although {path.name} lists it")
        rows.append(_Annotation(images / name, label, (x0, y0, x1, y1)))
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError as error:
        raise DamagedFile(path, "is missing") from error


def _decode(path: Path) -> Tensor:
    try:
        return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DamagedFile(path, "is truncated or not a JPEG file") from error
