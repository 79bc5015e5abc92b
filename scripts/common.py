"""What both pretraining programs share: options, several processes, and the facts that ship with the weights."""

import argparse
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from pdl_utils.settings import device_name, pick_device
from pdl_utils.training import History
from pdl_utils.weights import load_weights, sha256


@contextmanager
def process_group() -> Iterator[torch.device]:
    """This process's device. Started by torchrun, the processes know each other inside the `with`."""
    device = pick_device()
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) outside of a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_parallel(model: nn.Module) -> nn.Module:
    """In a process group, a model whose gradients are averaged over the processes; else the model itself. Batch
    norm sees the joint batch on GPUs, but a process's own share on CPUs, where torch has no other."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


class Gather(torch.autograd.Function):
    """(N, D) of every process → (N · processes, D) in each. Each computes the loss of all rows: a row's gradient
    is the sum over the processes, and DistributedDataParallel's mean is the gradient of the joint batch."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # reduced in place
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def schedule(text: str) -> list[int]:
    """'64x12,96x4' → 64 twelve times, then 96 four times. ArgumentTypeError: any other form."""
    if not re.fullmatch(r"([1-9]\d*x[1-9]\d*,)+", text + ","):
        raise argparse.ArgumentTypeError(f"{text!r}; write size x epochs, as 64x12,96x4")
    parts = [part.split("x") for part in text.split(",")]
    return [int(size) for size, epochs in parts for _ in range(int(epochs))]


def parser_of(description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options that both programs have, with a program's own `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--export", type=Path, help="folder to write the finished weights to")
    add("--start-from", type=Path, help="a file of weights that ships, to go on from")
    add("--schedule", type=schedule, help="side of the images in pixels x epochs, …")
    add("--batch-size", type=int, help="of all processes together")
    add("--lr", type=float)
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result: the name of the file of a training's state is made of it."""
    aside = "export", "start_from", "photo_size"  # decide nothing
    settings = {key: value for key, value in vars(args).items() if key not in aside}
    return settings | ({"started_from": sha256(args.start_from)} if args.start_from else {})


def facts_of_run(args: argparse.Namespace, history: History) -> dict[str, Any]:
    """What every file that ships says of its training. After a second cycle (`--start-from`), epochs, minutes and
    curves are those of both, and the recipe's `started_from` is the first's."""
    facts = {"epochs": len(history.rows), "training_minutes": round(sum(history["seconds"]) / 60, 1)}
    facts |= {name: history[name] for name in ("loss", "knn") if name in history.rows[0]}
    recipe = settings_of(args)
    if args.start_from:
        _, before = load_weights(args.start_from)
        recipe["started_from"] = before.get("recipe", args.start_from.stem)
        facts = {name: before[name] + value if name in before else value for name, value in facts.items()}
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, torchvision)}
    return facts | {
        "recipe": recipe, "seed": args.seed, "hardware": device_name(pick_device()), "versions": versions
    }  # fmt: skip
