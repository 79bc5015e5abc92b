"""Training in one process or, started by `torchrun`, in several that share every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pdl_utils.images import Augmentation, normalize
from pdl_utils.settings import pick_device


@contextmanager
def process_group() -> Iterator[torch.device]:
    """This process's device. Started by torchrun, the processes know each other inside the `with`."""
    device = pick_device()
    if "RANK" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) outside of a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_parallel(model: nn.Module) -> nn.Module:
    """The model itself, or in a process group one whose gradients are averaged over the processes. Batch
    norm sees the joint batch on GPUs, and a process's own share on CPUs, where torch has nothing for it."""
    if not dist.is_initialized():
        return model
    on_gpu = next(model.parameters()).is_cuda
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpu else model
    return nn.parallel.DistributedDataParallel(synced)


@dataclass(frozen=True, kw_only=True)
class ShuffledBatches:
    """Batches of images in random order; calling it gives those of another epoch.

    Everything random follows from `seed` and `epoch` alone, so a resumed run sees what an unbroken one
    does. The last, incomplete batch is left out. In a process group, process `rank` of `world` gets every
    `world`-th image of a batch: together they see what one process would see.

    Attributes:
        images: uint8 (N, C, H, W), on the training device.
        resolutions: side in pixels that images are augmented to, one an epoch.
        batch_size: of all processes together.

    Raises:
        ValueError: there are fewer images than one batch needs.
    """

    images: Tensor
    resolutions: list[int]
    batch_size: int
    seed: int
    epoch: int = 0

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise ValueError(f"{len(self.images)} images make no batch of {self.batch_size}; lower the batch size")

    def __call__(self, epoch: int) -> ShuffledBatches:
        return replace(self, epoch=epoch)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        mine = slice(rank_and_world()[0], None, rank_and_world()[1])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for rows in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self.batch(rows, mine, generator)

    def batch(self, rows: Tensor, mine: slice, generator: torch.Generator) -> Any:
        """The images `rows[mine]`, augmented with what is drawn for all `rows`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LabelledBatches(ShuffledBatches):
    """Shuffled, augmented and standardised images with their labels, int64 (N,), on the training device."""

    labels: Tensor
    augment: Augmentation

    def batch(self, rows: Tensor, mine: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels = self.augment(self.images[rows], self.resolutions[self.epoch], generator)
        return normalize(pixels[mine]), self.labels[rows[mine]]
