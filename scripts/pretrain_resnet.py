"""Train this project's own ResNet-18 and ResNet-34 on Tiny ImageNet.

    python -m scripts.pretrain_resnet --arch resnet18 --run runs/resnet18 --export data/checkpoints
    python -m scripts.pretrain_resnet --arch resnet34 --run runs/resnet34 --export data/checkpoints \\
        --start-from data/checkpoints/resnet18_tiny_imagenet.safetensors --schedule 96x1,128x2 --lr 0.05

Killed at any moment, the same command goes on from the last whole epoch to the same result. Started by
`torchrun --nproc-per-node N -m scripts.pretrain_resnet …`, every process takes its share of each batch.

The recipe: SGD with Nesterov momentum, one cosine cycle, label smoothing, weight decay on kernels only,
residual blocks that start as the identity, and images that grow during training. ResNet-34 starts as the
function of a trained ResNet-18 (Net2Net) rather than from nothing.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pdl_utils.data_parallel import LabelledBatches, data_parallel, process_group, rank_and_world
from pdl_utils.datasets.tiny_imagenet import TinyImageNet, tiny_imagenet
from pdl_utils.evaluation import top1
from pdl_utils.images import Augmentation
from pdl_utils.provenance import device_name
from pdl_utils.resnet import grow_depth
from pdl_utils.settings import seed_everything
from pdl_utils.training import History, fit, warmup_cosine, weight_decay_groups
from pdl_utils.weights import load_weights, save_weights

RESOLUTIONS = (64, 128)  # at which a finished network is evaluated


def schedule(text: str) -> list[int]:
    """'64x12,96x4' → 64 twelve times, then 96 four times.

    Raises:
        argparse.ArgumentTypeError: for any other form.
    """
    try:
        parts = [tuple(map(int, part.split("x"))) for part in text.split(",")]
        return [resolution for resolution, epochs in parts for _ in range(epochs)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}; write resolution x epochs, as 64x12,96x4") from error


def parser_of(description: str, **defaults: object) -> argparse.ArgumentParser:
    """The options that all programs of pretraining have, with a program's own `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder for the resumable state, outside the repository")
    add("--export", type=Path, help="folder to write the finished weights to")
    add("--start-from", type=Path, help="weights to start from: a run's last.pt, or a file that ships")
    add("--schedule", type=schedule, help="side of the images in pixels x epochs, …")
    add("--stop-after", type=int, help="stop after this many epochs of the schedule, to go on another time")
    add("--batch-size", type=int, help="of all processes together")
    add("--lr", type=float)
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, schedule=schedule("64x12,96x4,128x2"), batch_size=128, lr=0.2)
    add = parser.add_argument
    add(
        "--arch", choices=("resnet18", "resnet34"), required=True, help="ResNet-34 grows from weights of ResNet-18"
    )
    add("--data", type=Path, help="the data root (default: PDL_DATA, or data/)")
    add("--resolution", type=int, default=128, help="the side in pixels that the weights are shipped for")
    add("--photo-size", type=int, default=128, help="the side in pixels that suits large photographs best")
    add("--label-smoothing", type=float, default=0.1)
    add("--scale", type=float, nargs=2, default=(0.35, 1.0), help="share of an image in a crop")
    return parser.parse_args(argv)


def starting_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a run's last.pt, or in a file that ships."""
    if path.suffix == ".safetensors":
        return load_weights(path)[0]
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The network at the start of training: random, or with the function of the weights to start from."""
    model = torchvision.models.get_model(args.arch, num_classes=classes, zero_init_residual=True)
    if args.start_from:
        weights = starting_weights(args.start_from)
        arch = "resnet34" if "layer3.5.conv1.weight" in weights else "resnet18"
        start = torchvision.models.get_model(arch, num_classes=classes)
        start.load_state_dict(weights)
        grow_depth(start, model)  # of equal depth, a plain copy
    return model


def train(args: argparse.Namespace, model: nn.Module, data: TinyImageNet, val: TinyImageNet) -> History:
    device = next(model.parameters()).device
    batches = LabelledBatches(
        images=data.images.to(device), labels=data.labels.to(device), resolutions=args.schedule,
        augment=Augmentation(flip=True, scale=tuple(args.scale)),
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        weight_decay_groups(model, args.weight_decay), lr=args.lr, momentum=0.9, nesterov=True
    )
    epochs = len(args.schedule)
    some, their_labels = val.images[::5].to(device), val.labels[::5].to(device)
    return fit(
        data_parallel(model),
        batches,
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], label_smoothing=args.label_smoothing),
        optimizer,
        epochs=min(epochs, args.stop_after or epochs),
        scheduler=warmup_cosine(optimizer, epochs * len(batches), warmup=len(batches)),
        evaluate=lambda net: {"val_top1": top1(net, some, their_labels, args.resolution)},
        autocast=True,
        checkpoint=args.run / "last.pt",
        examples=len(batches) * args.batch_size,
        label=args.arch,
    )


def facts_of_run(args: argparse.Namespace, history: History, device: torch.device) -> dict[str, Any]:
    """What every file that ships says of its training."""
    hidden = ("run", "data", "export", "start_from", "stop_after")  # say where, not how
    recipe = {key: value for key, value in vars(args).items() if key not in hidden}
    return {
        "recipe": recipe | {"started_from": args.start_from.stem if args.start_from else None},
        "epochs": len(args.schedule),
        "seed": args.seed,
        "training_minutes": round(sum(history["seconds"]) / 60, 1),
        "hardware": device_name(device),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__
        },
    }  # fmt: skip


def export(args: argparse.Namespace, model: nn.Module, val: TinyImageNet, history: History, origin: str) -> None:
    """Evaluate on all validation images and ship the weights with everything that one may ask about them."""
    device = next(model.parameters()).device
    images, labels = val.images.to(device), val.labels.to(device)
    accuracy = {r: round(top1(model, images, labels, r), 4) for r in sorted({*RESOLUTIONS, args.resolution})}
    print(f"{args.arch}: top-1 on {len(labels):,} validation images, by resolution: {accuracy}")
    facts = facts_of_run(args, history, device) | {
        "arch": args.arch,
        "data": origin,
        "top1": accuracy,
        "resolution": args.resolution,
        "photo_size": args.photo_size,
        "categories": [name.split(",")[0] for name in val.names],
        "wnids": val.wnids,
    }
    save_weights(args.export / f"{args.arch}_tiny_imagenet.safetensors", model.state_dict(), facts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with process_group() as device:
        seed_everything(args.seed)
        data, val = (tiny_imagenet(split, root=args.data) for split in ("train", "val"))
        model = build(args, len(data.wnids)).to(device, memory_format=torch.channels_last)
        history = train(args, model, data, val)
        if args.export and len(history.rows) == len(args.schedule) and rank_and_world()[0] == 0:
            export(args, model, val, history, f"{data.provenance.name} ({data.provenance.source})")


if __name__ == "__main__":
    main()
