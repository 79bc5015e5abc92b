"""Photographs of ImageNet's kind, to show what a network looks at."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from torchvision.datasets import Imagenette
from torchvision.datasets.folder import make_dataset

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import DamagedFile, Provenance, data_root, obtain

OWN_FOLDER = "imagenet-samples"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
IMAGENETTE_SIZE = "320px"  # short side
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
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


@dataclass(frozen=True)
class _Candidate:
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
    own = _own_photos(data_root() / OWN_FOLDER, count, prefer)
    if own.images:
        print(own.provenance)
        return own
    return obtain(
        "ImageNet photographs",
        Path(IMAGENETTE_URL).stem,
        read=lambda folder: _imagenette(folder, count, prefer),
        download=lambda root: Imagenette(root, "val", IMAGENETTE_SIZE, download=True),
        url=IMAGENETTE_URL,
        stand_in=lambda: _stand_in(count, prefer),
    )


def _own_photos(folder: Path, count: int | None, prefer: Sequence[str]) -> Photos:
    candidates = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            label = re.fullmatch(r"(n\d{8})_(.+)", path.stem)
            wnid, name = (label[1], label[2].replace("_", " ")) if label else (None, None)
            candidates.append(_Candidate(partial(_open_or_skip, path), name, wnid))
    candidates.sort(key=lambda c: c.wnid is None)  # labelled ones first
    source = f"{len(candidates)} photographs in {OWN_FOLDER}/"
    return _choose(candidates, count, prefer, Provenance("ImageNet photographs", source))


def _imagenette(folder: Path, count: int | None, prefer: Sequence[str]) -> Photos:
    try:
        dataset = Imagenette(folder.parent, "val", IMAGENETTE_SIZE)
        files = make_dataset(folder / "val", dataset.wnid_to_idx, extensions=".jpeg")  # without decoding them
    except (OSError, KeyError) as error:
        raise DamagedFile(folder / "val", f"is not Imagenette's validation split ({error})") from error
    if len(files) != IMAGENETTE_COUNT:
        raise DamagedFile(folder / "val", f"has {len(files)} photographs, not {IMAGENETTE_COUNT}")
    candidates = _stand_in_candidates()[:1]  # the cat: Imagenette has none
    seen = [0] * len(dataset.classes)
    for path, label in files:
        seen[label] += 1
        if seen[label] <= PER_CLASS:
            candidates.append(
                _Candidate(partial(_open, Path(path)), dataset.classes[label][0], dataset.wnids[label])
            )
    source = "Imagenette's validation split, and scikit-image's cat"
    return _choose(candidates, count, prefer, Provenance("ImageNet photographs", source))


def _stand_in(count: int | None, prefer: Sequence[str]) -> Photos:
    source = "stand-in: sample photographs of scikit-image and scikit-learn"
    provenance = Provenance("ImageNet photographs", source, real=False)
    return _choose(_stand_in_candidates(), count, prefer, provenance)


def _stand_in_candidates() -> list[_Candidate]:
    return [
        _Candidate(partial(stand_ins.photograph, index), name, wnid)
        for index, (_, name, wnid) in enumerate(stand_ins.PHOTOGRAPHS)
    ]


def _choose(
    candidates: list[_Candidate], count: int | None, prefer: Sequence[str], provenance: Provenance
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
        raise DamagedFile(path, f"cannot be decoded ({error})") from error


def _open_or_skip(path: Path) -> Image.Image | None:
    """For the user's own photographs, which are not ours to remove."""
    try:
        return _open(path)
    except DamagedFile as damage:
        print(f"{damage} and is left out")
        return None
