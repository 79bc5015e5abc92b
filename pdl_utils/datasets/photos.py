"""Photographs of ImageNet's kind, to show what a network looks at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import Imagenette

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import DamagedFile, Provenance, download_tar, obtain, reading, with_notice
from pdl_utils.settings import data_root

NAME = "ImageNet photographs"
OWN_FOLDER = "imagenet-samples"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LARGEST = 1024  # pixels, wide or high; larger ones are made smaller, so that hundreds fit into memory
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"  # the short side has 320 pixels
IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"
IMAGENETTE_COUNT = 3925  # photographs in its validation split
PER_CLASS = 4  # of Imagenette's, so that all ten classes are seen without decoding thousands


@dataclass(frozen=True)
class Photos:
    """`images`: RGB, of any size; `names`: what each shows, or None; `wnids`: its ImageNet class ("n02123045"), or
    None; `files`: what its file is called."""

    images: list[Image.Image]
    names: list[str | None]
    wnids: list[str | None]
    files: list[str]
    provenance: Provenance


class _Candidate(NamedTuple):
    """A photograph that has not been opened yet."""

    file: Path | str  # str: a sample, by its name in stand_ins
    name: str | None
    wnid: str | None


def imagenet_photos(count: int | None = None, prefer: Sequence[str] = ()) -> Photos:
    """At most `count` photographs, the same ones on every call; those of the classes (wnids) in `prefer` first.

    They are from the folder `imagenet-samples` under the data root, if it has any: drop your own in. A name like
    n02123045_tabby.jpg says the class. What lies directly in the folder comes before all else, first what has no
    class; then come its subfolders. Otherwise they are a few of each class of Imagenette's validation split, and a
    cat. Offline: scikit-image's and scikit-learn's samples.
    """
    if count is not None and count < 1:
        raise ValueError(f"count={count}: ask for at least one photograph, or None for all")
    folder = data_root() / OWN_FOLDER
    own = _album(_own_photos(folder), count, prefer, Provenance(NAME, ""), skip=True)
    if own.images:
        source = f"{len(own.images)} photograph{'s' * (len(own.images) > 1)} from {OWN_FOLDER}/"
        own = replace(own, provenance=with_notice(NAME, source, folder))
        print(own.provenance)
        return own
    split = "Imagenette's validation split, and scikit-image's cat"
    samples = Provenance(NAME, "stand-in: sample photographs of scikit-image and scikit-learn", real=False)
    return obtain(
        NAME, Path(IMAGENETTE_URL).stem,
        read=lambda place: _album([_imagenette(place)], count, prefer, with_notice(NAME, split, place)),
        download=lambda root: download_tar(IMAGENETTE_URL, root, IMAGENETTE_MD5),
        stand_in=lambda: _album([_samples()], count, prefer, samples),
    )  # fmt: skip


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit colour, turned as the camera was held (EXIF), on white where it is transparent. 16 bits
    are scaled to 8; 32-bit integers and floats, which have no agreed white, from the darkest to the brightest."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        black, white = (0, 65535) if sixteen_bits else (pixels.min(), pixels.max())
        if not np.isfinite(white - black):
            raise ValueError("it has pixels that are no numbers")
        image = Image.fromarray((255 * (pixels - black) / max(white - black, 1e-9)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _own_photos(folder: Path) -> list[list[_Candidate]]:
    """Directly in `folder` without a class, directly in it with one, in its subfolders. Other files are named."""
    unlabelled, labelled, deeper = [], [], []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith(".") or path.name == "NOTICE.txt":
            continue
        if path.suffix.lower() not in SUFFIXES:
            print(f"{path} is left out: its name must end in {' '.join(SUFFIXES)}")
            continue
        label = re.fullmatch(r"(n\d{8})_(.+)", path.stem)
        wnid, name = (label[1], label[2].replace("_", " ")) if label else (None, None)
        group = deeper if path.parent != folder else labelled if label else unlabelled
        group.append(_Candidate(path, name, wnid))
    deeper.sort(key=lambda candidate: candidate.wnid is None)
    return [unlabelled, labelled, deeper]


def _imagenette(folder: Path) -> list[_Candidate]:
    found = len(list((folder / "val").glob("*/*.JPEG")))
    if found != IMAGENETTE_COUNT:
        raise DamagedFile(f"{folder / 'val'} has {found} photographs, not {IMAGENETTE_COUNT}")
    dataset = Imagenette(folder.parent, "val", "320px")
    candidates = _samples()[:1]  # the cat: Imagenette has none
    for wnid, (name, *_) in zip(dataset.wnids, dataset.classes, strict=True):
        for path in sorted((folder / "val" / wnid).glob("*.JPEG"))[:PER_CLASS]:
            candidates.append(_Candidate(path, name, wnid))
    return candidates


def _samples() -> list[_Candidate]:
    return [_Candidate(file, name, wnid) for file, (name, wnid) in stand_ins.PHOTOGRAPHS.items()]


def _open(file: Path | str) -> Image.Image:
    if isinstance(file, str):
        return stand_ins.photograph(file)
    with reading(file), Image.open(file) as image:
        photo = to_rgb(image)
        photo.thumbnail((LARGEST, LARGEST))
        return photo


def _album(
    groups: list[list[_Candidate]], count: int | None, prefer: Sequence[str], origin: Provenance, skip=False
) -> Photos:  # fmt: skip
    """`count` from the groups in their order. `skip`: one that cannot be opened makes room for another."""
    count = count or sum(map(len, groups))
    found: list[tuple[Image.Image, _Candidate]] = []
    for group in groups:
        for candidate in _ordered(group, count - len(found), prefer):
            if len(found) == count:
                break
            try:
                found.append((_open(candidate.file), candidate))
            except Exception as error:  # Pillow raises all kinds of things
                if not skip:
                    raise
                print(f"{candidate.file} is left out: {error.__cause__ or error}")
    files, names, wnids = ([candidate[field] for _, candidate in found] for field in range(3))
    return Photos([image for image, _ in found], names, wnids, [Path(file).name for file in files], origin)


def _ordered(candidates: list[_Candidate], count: int, prefer: Sequence[str]) -> list[_Candidate]:
    """The preferred ones; until there are `count`, others that are spread evenly over what there is; the rest."""
    first = [c for wnid in prefer for c in candidates if c.wnid == wnid][:count]
    rest = [c for c in candidates if c not in first]
    wanted = min(count - len(first), len(rest))
    chosen = first + [rest[i * len(rest) // wanted] for i in range(wanted)]
    return chosen + [c for c in candidates if c not in chosen]
