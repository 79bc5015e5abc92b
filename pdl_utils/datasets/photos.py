"""Photographs of ImageNet's kind, to show what a network looks at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import Imagenette

from pdl_utils.datasets import stand_ins
from pdl_utils.datasets.sources import Provenance, download_tar, obtain, reading, tell, with_notice
from pdl_utils.settings import data_root

NAME = "ImageNet photographs"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"  # the short side has 320 pixels
IMAGENETTE_MD5 = "3df6f0d01a2c9592104656642f5e78a3"
IMAGENETTE_COUNT = 3925  # photographs in its validation split
Group = list[tuple[Path | str, str | None, str | None]]  # of files or samples' names, what each shows, its wnid


@dataclass(frozen=True)
class Photos:
    """`images`: RGB, of any size; `names`: what each shows, or None."""

    images: list[Image.Image]
    names: list[str | None]
    provenance: Provenance


def imagenet_photos(count: int | None = None, prefer: Sequence[str] = ()) -> Photos:
    """At most `count` photographs, the same ones on every call; those of the classes (wnids) in `prefer` first.

    Your own, if `imagenet-samples` under the data root has any (n02123045_tabby.jpg says the class; what lies in
    subfolders comes last); else a few of each class of Imagenette's validation split, and a cat; else samples."""
    if count is not None and count < 1:
        raise ValueError(f"count={count}: ask for at least one photograph, or None for all")
    folder = data_root() / "imagenet-samples"
    images, names = _album(_own_photos(folder), count, prefer, leave_out=True)
    if images:
        source = f"{len(images)} photograph{'s' * (len(images) > 1)} from imagenet-samples/"
        own = Photos(images, names, with_notice(NAME, source, folder))
        tell(own.provenance)
        return own
    split = "Imagenette's validation split, and scikit-image's cat"
    samples = Provenance(NAME, "stand-in: sample photographs of scikit-image and scikit-learn", real=False)
    return obtain(
        NAME, Path(IMAGENETTE_URL).stem,
        read=lambda place: Photos(*_album([_imagenette(place)], count, prefer), with_notice(NAME, split, place)),
        download=lambda root: download_tar(IMAGENETTE_URL, root, IMAGENETTE_MD5),
        stand_in=lambda: Photos(*_album([stand_ins.PHOTOGRAPHS], count, prefer), samples),
    )  # fmt: skip


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit colour, turned as the camera was held (EXIF), on white where it is transparent.
    ValueError: 32-bit numbers, which have no agreed white, and 16-bit greys that Pillow would show wrong."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # older Pillow
    tags = getattr(image, "tag_v2", {})  # of a TIFF: how many bits, and 0 where white is 0
    if sixteen_bits and (tags.get(258, (16,)) != (16,) or tags.get(262) == 0 or "transparency" in image.info):
        raise ValueError("it is grey with 12 bits, with white as 0 or with transparency: save it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if sixteen_bits:  # Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _own_photos(folder: Path) -> list[Group]:
    """Directly in `folder` without a class, directly in it with one, in its subfolders."""
    unlabelled, labelled, deeper = [], [], []
    found = glob("**", root_dir=folder, recursive=True)  # noqa: PTH207 (unlike rglob it follows links, skips .hidden)
    for path in sorted(folder / name for name in found):
        if path.suffix.lower() in SUFFIXES:
            label = re.fullmatch(r"(n\d{8}) (.+)", path.stem.replace("_", " "))
            wnid, name = label.groups() if label else (None, None)
            group = deeper if path.parent != folder else labelled if label else unlabelled
            group.append((path, name, wnid))
        elif path.is_file() and path.name != "NOTICE.txt":
            print(f"{path} is left out: its name must end in {' '.join(SUFFIXES)}")
    return [unlabelled, labelled, sorted(deeper, key=lambda photo: photo[2] is None)]


def _imagenette(folder: Path) -> Group:
    """The cat, because Imagenette has none, and four of each class: thousands would take long to decode."""
    with reading(folder / "val"):
        dataset = Imagenette(folder.parent, "val", "320px")
        if len(dataset) != IMAGENETTE_COUNT:
            raise ValueError(f"it has {len(dataset)} photographs, not {IMAGENETTE_COUNT}")
    photos = stand_ins.PHOTOGRAPHS[:1]
    for wnid, (name, *_) in zip(dataset.wnids, dataset.classes, strict=True):
        photos += [(path, name, wnid) for path in sorted((folder / "val" / wnid).glob("*.JPEG"))[:4]]
    return photos


def _album(groups: list[Group], count: int | None, prefer: Sequence[str], leave_out=False) -> tuple[list, list]:
    """Images and names of `count` from the groups in their order: the preferred ones, then others spread evenly
    over the group. `leave_out`: what cannot be opened is named, and left out."""
    count, chosen = count or sum(map(len, groups)), []
    for group in groups:
        first = [photo for wnid in prefer for photo in group if photo[2] == wnid]
        rest = [photo for photo in group if photo not in first]
        room = max(0, min(count - len(chosen) - len(first), len(rest)))
        chosen += first + [rest[i * len(rest) // room] for i in range(room)]
    images, names = [], []
    for file, name, _ in dict.fromkeys([*chosen[:count], *chain(*groups)]):  # others in the place of broken ones
        if len(images) == count:
            break
        try:
            images.append(stand_ins.photograph(file) if isinstance(file, str) else _open(file))
            names.append(name)
        except Exception as error:  # Pillow raises all kinds of things
            if not leave_out:
                raise
            print(f"{file} is left out: {error.__cause__ or error}")
    return images, names


def _open(file: Path) -> Image.Image:
    with reading(file), Image.open(file) as image:
        photo = to_rgb(image)
        photo.thumbnail((1024, 1024))  # so that hundreds fit into memory
        return photo
