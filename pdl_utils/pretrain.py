"""Train this project's own ResNet-34 and ResNet-18 on Tiny ImageNet.

    python -m pdl_utils.pretrain --arch resnet18 --run runs/resnet18
    python -m pdl_utils.pretrain --arch resnet34 --run runs/resnet34 --grow-from runs/resnet18/last.pt

Killed at any moment, the same command goes on from the last epoch to the same result. With
`torchrun --nproc-per-node 2 -m pdl_utils.pretrain …` every process takes its share of each batch.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pdl_utils.augment import normalize, random_resized_crop, resize
from pdl_utils.datasets.sources import data_root
from pdl_utils.datasets.tiny_imagenet import tiny_imagenet
from pdl_utils.resnet import grow_depth, zero_last_norm
from pdl_utils.settings import pick_device, seed_everything
from pdl_utils.training import fit, warmup_cosine, weight_decay_groups


@dataclass
class AugmentedBatches:
    """The shuffled, augmented batches of an epoch; the order and the crops follow from `seed` and the
    epoch alone. Process `rank` of `world` takes every `world`-th image of each batch."""

    images: Tensor
    labels: Tensor
    resolutions: list[int]
    batch_size: int
    scale: tuple[float, float]
    seed: int
    rank: int = 0
    world: int = 1

    def __call__(self, epoch: int) -> EpochOfBatches:
        return EpochOfBatches(self, epoch)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size


@dataclass
class EpochOfBatches:
    source: AugmentedBatches
    epoch: int

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        s = self.source
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(s.images), generator=generator)
        for step in range(len(self)):
            rows = order[step * s.batch_size : (step + 1) * s.batch_size][s.rank :: s.world]
            crops = random_resized_crop(
                s.images[rows], s.resolutions[self.epoch], scale=s.scale, generator=generator
            )
            yield normalize(crops / 255), s.labels[rows]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, resolution: int, batch: int = 250) -> float:
    """Share of images whose most probable class is their label, at `resolution` pixels."""
    hits = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16):
            scores = model(normalize(resize(x, resolution) / 255))
        hits += int((scores.argmax(1) == y).sum())
    return hits / len(labels)


def per_epoch(text: str) -> list[int]:
    """'64x12,96x4' → 64 twelve times, then 96 four times."""
    return [int(r) for part in text.split(",") for r in [part.split("x")[0]] * int(part.split("x")[1])]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("resnet18", "resnet34"), required=True)
    parser.add_argument("--data", type=Path, default=data_root(), help="data root")
    parser.add_argument("--run", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--export", type=Path, help="write the finished weights here (.safetensors)")
    parser.add_argument("--schedule", type=per_epoch, default="64x12,96x4,128x2", help="resolution x epochs, …")
    parser.add_argument("--resolution", type=int, default=128, help="evaluation resolution in pixels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--scale", type=float, nargs=2, default=(0.35, 1.0))
    parser.add_argument("--grow-from", type=Path, help="start from a finished shallower run's state (Net2Net)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    distributed = "RANK" in os.environ
    device = pick_device()
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    seed_everything(args.seed)

    train, val = (tiny_imagenet(split, root=args.data) for split in ("train", "val"))
    images, labels = train.images.to(device), train.labels.to(device)
    val_images, val_labels = val.images.to(device), val.labels.to(device)

    def build(arch: str) -> nn.Module:
        return torchvision.models.get_model(arch, num_classes=len(train.wnids))

    model = build(args.arch)
    zero_last_norm(model)
    if args.grow_from:
        small = build("resnet18")
        small.load_state_dict(torch.load(args.grow_from, map_location="cpu", weights_only=True)["model"])
        grow_depth(small, model)
    model = model.to(device, memory_format=torch.channels_last)
    net = nn.parallel.DistributedDataParallel(model) if distributed else model

    epochs = len(args.schedule)
    batches = AugmentedBatches(
        images, labels, args.schedule, args.batch_size, tuple(args.scale), args.seed, rank, world
    )
    optimizer = torch.optim.SGD(
        weight_decay_groups(model, args.weight_decay), lr=args.lr, momentum=0.9, nesterov=True
    )
    scheduler = warmup_cosine(optimizer, epochs * len(batches), warmup=len(batches))

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=args.label_smoothing)

    def watch(_: nn.Module) -> dict[str, float]:
        return {"val_top1": top1(model, val_images[::5], val_labels[::5], args.resolution)}

    history = fit(
        net, batches, loss, optimizer, epochs=epochs, scheduler=scheduler, evaluate=watch, autocast=True,
        checkpoint=args.run / "last.pt", examples=len(batches) * args.batch_size, label=args.arch,
        progress=rank == 0,
    )  # fmt: skip
    if rank == 0:
        accuracy = {r: top1(model, val_images, val_labels, r) for r in (64, 96, 112, 128, 160, 224)}
        print(json.dumps({"top1": accuracy, "epochs": history.rows}))


if __name__ == "__main__":
    main()
