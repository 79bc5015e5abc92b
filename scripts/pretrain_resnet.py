"""Train this project's own ResNet-18 and ResNet-34 on Tiny ImageNet.

    python -m scripts.pretrain_resnet --arch resnet18 --state runs/resnet18 --export data/checkpoints
    python -m scripts.pretrain_resnet --arch resnet34 --state runs/resnet34 --export data/checkpoints \\
        --start-from data/checkpoints/resnet18_tiny_imagenet.safetensors --schedule 96x1,128x2 --lr 0.05

Killed at any moment, the same command goes on from the last whole epoch to the same result. Started by
`torchrun --nproc-per-node N -m scripts.pretrain_resnet …`, every process takes its share of each batch.

The recipe: SGD with Nesterov momentum, one cosine cycle, label smoothing, weight decay on kernels only,
residual blocks that start as the identity, and images that grow during training. ResNet-34 starts as the
function of a trained ResNet-18 (Net2Net) rather than from nothing. With `--teacher`, half of each label is what
a network that knows ImageNet's 1,000 classes predicts for the image (Hinton et al. 2015, arXiv:1503.02531).
With `--average`, what ships is the mean of the weights after several cycles (Izmailov et al. 2018,
arXiv:1803.05407).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from pdl_utils.datasets import TinyImageNet, tiny_imagenet
from pdl_utils.images import Augmentation, Batches, outputs, top1
from pdl_utils.resnet import torchvision_network
from pdl_utils.settings import bfloat16_is_faster, save_atomically, seed_everything
from pdl_utils.training import History, fit, sgd, warmup_cosine
from pdl_utils.weights import save_weights
from scripts.common import (
    data_parallel,
    facts_of_run,
    parser_of,
    process_group,
    rank_and_world,
    schedule,
    starting_point,
)

RESOLUTIONS = (64, 128)  # at which a finished network is evaluated


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, schedule=schedule("64x12,96x4,128x2"), batch_size=128, lr=0.2)
    add = parser.add_argument
    add(
        "--arch", choices=("resnet18", "resnet34"), required=True, help="ResNet-34 grows from weights of ResNet-18"
    )
    add("--resolution", type=int, default=128, help="the side in pixels that the weights are shipped for")
    add("--photo-size", type=int, default=128, help="the side in pixels that suits large photographs best")
    add("--label-smoothing", type=float, default=0.1, help="without a teacher")
    add("--teacher", help="a network of torchvision whose predictions are half of each label: resnet50")
    add("--average", type=Path, nargs="+", help="ends of other cycles: the mean of their weights and these ships")
    add("--scale", type=float, nargs=2, default=(0.35, 1.0), help="share of an image in a crop")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The network at the start of training: random, or with the function of the weights to start from."""
    model = torchvision.models.get_model(args.arch, num_classes=classes, zero_init_residual=True)
    if args.start_from:
        weights, _ = starting_point(args.start_from)
        arch = "resnet34" if "layer3.5.conv1.weight" in weights else "resnet18"
        start = torchvision.models.get_model(arch, num_classes=classes)
        start.load_state_dict(weights)
        grow_depth(start, model)  # of equal depth, a plain copy
    return model


@torch.no_grad()
def grow_depth(small: ResNet, large: ResNet) -> None:
    """Give `large` the function of `small`, a shallower network of the same widths (Net2DeeperNet,
    Chen et al. 2015, arXiv:1511.05641).

    Blocks that both have are copied; every further block of `large` becomes the identity, since its
    last batch norm is scaled to 0 and its input, out of a ReLU, is not negative. Training goes on from
    there instead of from nothing.

    Raises:
        ValueError: `small` has a parameter that `large` lacks, or of another shape.
    """
    ours, theirs = large.state_dict(), small.state_dict()
    misfits = [name for name, w in theirs.items() if name not in ours or ours[name].shape != w.shape]
    if misfits:
        raise ValueError(f"cannot grow: {misfits[0]} and {len(misfits) - 1} more do not fit the larger network")
    large.load_state_dict({**ours, **theirs})
    for name, module in large.named_modules():
        if isinstance(module, BasicBlock) and f"{name}.bn2.weight" not in theirs:
            nn.init.zeros_(module.bn2.weight)


def taught_labels(args: argparse.Namespace, data: TinyImageNet, device: torch.device) -> Tensor:
    """Targets for the cross-entropy: the label with probability 1/2, the teacher's prediction with 1/2; float32
    (N, classes), on the device. What the teacher says of all images is kept in the folder of the state."""
    file = args.state / "teacher.pt"
    if not file.exists():
        teacher = torchvision_network(args.teacher, device)
        logits = outputs(teacher.model, data.images, args.resolution)
        predictions = cross_fitted(logits, data.labels.to(device), len(data.wnids)).cpu()
        kept = {"source": teacher.provenance.source, "predictions": predictions}
        save_atomically(lambda partial: torch.save(kept, partial), file)
    predictions = torch.load(file, map_location=device, weights_only=True)["predictions"]
    return (F.one_hot(data.labels.to(device), len(data.wnids)) + predictions) / 2


def cross_fitted(logits: Tensor, labels: Tensor, classes: int, folds: int = 5) -> Tensor:
    """Probabilities of our classes (N, classes) from a linear map of the teacher's logits (N, 1000). Each fifth of
    the images is predicted by a map that was fitted to the other four, and so has not seen their labels."""
    rows = (logits - logits.mean(0)) / (logits.std(0) + 1e-3)
    fold = torch.randint(folds, labels.shape, generator=torch.Generator().manual_seed(1)).to(labels.device)
    probabilities = rows.new_empty(len(rows), classes)
    for k in range(folds):
        linear = linear_map(rows[fold != k], labels[fold != k], classes)
        with torch.no_grad():
            probabilities[fold == k] = linear(rows[fold == k]).softmax(1)
    return probabilities


def linear_map(rows: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier of rows (N, D): eight epochs of AdamW from zero, with dropout."""
    linear = nn.Linear(rows.shape[1], classes, device=rows.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=0.1)

    def loss(net: nn.Module, chosen: Tensor) -> Tensor:
        return F.cross_entropy(net(F.dropout(rows[chosen], 0.1)), labels[chosen], label_smoothing=0.05)

    fit(
        linear, lambda epoch: torch.randperm(len(rows)).to(rows.device).split(512), loss, optimizer, epochs=8,
        scheduler=warmup_cosine(optimizer, steps=8 * -(-len(rows) // 512)), progress=False,
    )  # fmt: skip
    return linear


def average(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several networks' weights and of their batch norms' statistics, float64."""
    return {name: torch.stack([w[name].cpu().double() for w in weights]).mean(0) for name in weights[0]}


def train(args: argparse.Namespace, model: nn.Module, data: TinyImageNet, val: TinyImageNet) -> History:
    device = next(model.parameters()).device
    smoothing = 0.0 if args.teacher else args.label_smoothing
    batches = Batches(
        labels=taught_labels(args, data, device) if args.teacher else data.labels.to(device),
        images=data.images.to(device), sizes=args.schedule,
        augment=Augmentation(flip=True, scale=tuple(args.scale)),
        batch_size=args.batch_size, seed=args.seed, part=rank_and_world(),
    )  # fmt: skip
    steps = len(args.schedule) * len(batches)
    optimizer, scheduler = sgd(model, args.lr, args.weight_decay, steps, warmup=len(batches))
    some, their_labels = val.images[::5], val.labels[::5]
    return fit(
        data_parallel(model),
        batches,
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], label_smoothing=smoothing),
        optimizer,
        epochs=len(args.schedule),
        stop_after=args.stop_after,
        scheduler=scheduler,
        evaluate=lambda net: {"val_top1": top1(net, some, their_labels, args.resolution)},
        autocast=bfloat16_is_faster(device),
        checkpoint=args.state / "last.pt",
        save=rank_and_world()[0] == 0,
        label=args.arch,
        progress=None if rank_and_world()[0] == 0 else False,
    )


def export(args: argparse.Namespace, model: nn.Module, data: TinyImageNet, val: TinyImageNet, history: History):
    """Evaluate on all validation images and ship the weights with everything that one may ask about them."""
    if args.average:
        ends = [starting_point(file)[0] for file in args.average]
        model.load_state_dict(average([model.state_dict(), *ends]))
    sizes = sorted({*RESOLUTIONS, args.resolution})
    accuracy = {size: round(top1(model, val.images, val.labels, size), 4) for size in sizes}
    print(f"{args.arch}: top-1 on {len(val.labels):,} validation images, by resolution: {accuracy}")
    facts = facts_of_run(args, history, next(model.parameters()).device) | {
        "arch": args.arch,
        "data": f"{data.provenance.name} ({data.provenance.source})",
        "top1": accuracy,
        "resolution": args.resolution,
        "photo_size": args.photo_size,
        "categories": [name.split(",")[0] for name in val.names],
        "wnids": val.wnids,
    }
    if args.average:
        facts["average_of"] = 1 + len(args.average)
    if args.teacher:
        facts["teacher"] = torch.load(args.state / "teacher.pt", weights_only=True)["source"]
    save_weights(args.export / f"{args.arch}_tiny_imagenet.safetensors", model.state_dict(), facts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with process_group() as device:
        seed_everything(args.seed)
        data, val = (tiny_imagenet(split) for split in ("train", "val"))
        model = build(args, len(data.wnids)).to(device)
        history = train(args, model, data, val)
        if args.export and len(history.rows) == len(args.schedule) and rank_and_world()[0] == 0:
            export(args, model, data, val, history)


if __name__ == "__main__":
    main()
