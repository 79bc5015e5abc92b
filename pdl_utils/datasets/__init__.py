"""Data sets: real first, never silently something else. Each function looks for files under the data root, then
downloads from the official source, then makes an offline stand-in (none of Tiny ImageNet). It prints which it was,
and says so in the result's `.provenance`."""

from pdl_utils.datasets.photos import Photos, imagenet_photos
from pdl_utils.datasets.ppi import TissueGraphs, ppi
from pdl_utils.datasets.small_images import LabelledImages, cifar10, mnist
from pdl_utils.datasets.sources import DamagedFile, NoRealData, Provenance
from pdl_utils.datasets.tiny_imagenet import TinyImageNet, tiny_imagenet
