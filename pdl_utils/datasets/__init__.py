"""Data sets: real first, never silently something else.

Each function looks for files under the data root, then downloads from the official source, then makes an offline
stand-in, prints which it was, and says so in the result's `.provenance`:

    small_images    cifar10(), mnist(); labelled_folder(folder, side) for images of your own
    photos          imagenet_photos(count, prefer)
    tiny_imagenet   tiny_imagenet(split, limit), without a stand-in
    ppi             ppi()
"""

from pdl_utils.datasets.photos import Photos, imagenet_photos
from pdl_utils.datasets.ppi import TissueGraphs, ppi
from pdl_utils.datasets.small_images import LabelledImages, cifar10, labelled_folder, mnist
from pdl_utils.datasets.sources import DamagedFile, NoRealData, Provenance
from pdl_utils.datasets.tiny_imagenet import TinyImageNet, tiny_imagenet
