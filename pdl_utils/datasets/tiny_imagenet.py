"""Tiny ImageNet (Stanford CS231n): 200 ImageNet classes at 64×64, with a box an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass
class TinyImageNet:
    """One split.

    `images`: uint8 (N, 3, 64, 64); `labels`: int64 (N,) in 0..199, in the order of `wnids`;
    `boxes`: int64 (N, 4), x0, y0, x1, y1 in pixels, both ends inside the box.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    wnids: list[str]
    names: list[str]


def read_split(root: Path, split: str, limit: int | None = None) -> TinyImageNet:
    wnids = sorted((root / "wnids.txt").read_text().split())
    words = dict(line.split("\t") for line in (root / "words.txt").read_text().splitlines())
    rows: list[tuple[Path, str, list[int]]] = []
    if split == "train":
        for wnid in wnids:
            for line in (root / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines():
                name, *box = line.split()
                rows.append((root / "train" / wnid / "images" / name, wnid, [int(v) for v in box]))
    else:
        for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
            name, wnid, *box = line.split()
            rows.append((root / "val" / "images" / name, wnid, [int(v) for v in box]))
    rows = rows[:limit]
    images = torch.empty(len(rows), 3, 64, 64, dtype=torch.uint8)
    for i, (path, _, _) in enumerate(rows):
        with Image.open(path) as image:
            images[i] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    index = {wnid: i for i, wnid in enumerate(wnids)}
    return TinyImageNet(
        images,
        torch.tensor([index[wnid] for _, wnid, _ in rows]),
        torch.tensor([box for _, _, box in rows]),
        wnids,
        [words[wnid] for wnid in wnids],
    )
