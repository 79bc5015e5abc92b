"""Photographs of ImageNet's kind, to show what a network looks at."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from torchvision.datasets import Imagenette

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import DamagedFile, Provenance, download_tar, obtain, with_notice
from pdl_utils.settings import data_root

NAME = "ImageNet photographs"
OWN_FOLDER = "imagenet-samples"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
IMAGENETTE_SIZE = "320px"  # short side
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"
IMAGENETTE_COUNT = 3925  # photographs in its validation split
PER_CLASS = 4  # of Imagenette's, so that all ten classes are seen without decoding thousands


@dataclass(frozen=True)
class Photos:
    """Photographs and what is known of them.

    `images`: RGB, of any size; `names`: what each shows, or None; `wnids`: its ImageNet class
    ("n02123045"), or None where it has no label.
    """

    images: list[Image.Image]
    names: list[str | None]
    wnids: list[str | None]
    provenance: Provenance


class _Candidate(NamedTuple):
    """A photograph that has not been decoded yet."""

    load: Callable[[], Image.Image | None]
    name: str | None
    wnid: str | None


def imagenet_photos(count: int | None = None, prefer: Sequence[str] = ()) -> Photos:
    """Photographs with ImageNet labels where known; the same ones on every call.

    They come from the folder `imagenet-samples` under the data root, if there is one: drop your own in,
    named `WNID_name.jpg` (n02123045_tabby.jpg) where the class is known. Otherwise from Imagenette's
    validation split, a few of each class, and a cat. Offline: scikit-image's and scikit-learn's samples.

    Args:
        count: how many at most, all if None. Spread evenly over what there is.
        prefer: wnids; photographs of these classes come first, in this order, where there are any.

    Raises:
        NoRealData: `PDL_REQUIRE_REAL=1` and no photograph can be had.
    """
    own = _choose(*_own_photos(data_root() / OWN_FOLDER), count, prefer)
    if own.images:
        print(own.provenance)
        return own
    stand_in = Provenance(NAME, "stand-in: sample photographs of scikit-image and scikit-learn", real=False)
    return obtain(
        NAME, Path(IMAGENETTE_URL).stem,
        read=lambda folder: _choose(*_imagenette(folder), count, prefer),
        download=lambda root: download_tar(IMAGENETTE_URL, root, IMAGENETTE_MD5),
        stand_in=lambda: _choose(_samples(), stand_in, count, prefer),
    )  # fmt: skip


def _own_photos(folder: Path) -> tuple[list[_Candidate], Provenance]:
    candidates = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            label = re.fullmatch(r"(n\d{8})_(.+)", path.stem)
            wnid, name = (label[1], label[2].replace("_", " ")) if label else (None, None)
            candidates.append(_Candidate(partial(_open_or_skip, path), name, wnid))
    candidates.sort(key=lambda c: c.wnid is None)  # labelled ones first
    return candidates, with_notice(NAME, f"{len(candidates)} photographs in {OWN_FOLDER}/", folder)


def _imagenette(folder: Path) -> tuple[list[_Candidate], Provenance]:
    found = len(list((folder / "val").glob("*/*.JPEG")))
    if found != IMAGENETTE_COUNT:
        raise DamagedFile(f"{folder}/val has {found} photographs, not {IMAGENETTE_COUNT}")
    dataset = Imagenette(folder.parent, "val", IMAGENETTE_SIZE)
    candidates = _samples()[:1]  # the cat: Imagenette has none
    for wnid, (name, *_) in zip(dataset.wnids, dataset.classes, strict=True):
        for path in sorted((folder / "val" / wnid).glob("*.JPEG"))[:PER_CLASS]:
            candidates.append(_Candidate(partial(_open, path), name, wnid))
    return candidates, with_notice(NAME, "Imagenette's validation split, and scikit-image's cat", folder)


def _samples() -> list[_Candidate]:
    return [
        _Candidate(lambda load=load: stand_ins.rgb(load()), name, wnid)
        for load, name, wnid in stand_ins.PHOTOGRAPHS
    ]


def _choose(
    candidates: list[_Candidate], provenance: Provenance, count: int | None, prefer: Sequence[str]
) -> Photos:
    first = [c for wnid in prefer for c in candidates if c.wnid == wnid][:count]
    rest = [c for c in candidates if c not in first]
    wanted = len(rest) if count is None else min(count - len(first), len(rest))
    chosen = first + [rest[i * len(rest) // wanted] for i in range(wanted)]
    decoded = [(image, c.name, c.wnid) for c in chosen if (image := c.load())]
    return Photos(*([row[field] for row in decoded] for field in range(3)), provenance)


def _open(path: Path) -> Image.Image:
    """Decode, turned as the camera was held."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise DamagedFile(f"{path} cannot be decoded ({error})") from error


def _open_or_skip(path: Path) -> Image.Image | None:
    """For the user's own photographs: one that is damaged does not stop the others."""
    try:
        return _open(path)
    except DamagedFile as damage:
        print(f"{damage} and is left out")
        return None
