"""Train this project's own ResNet-18 and ResNet-34 on Tiny ImageNet.

    python -m scripts.pretrain_resnet --arch resnet18 --export data/checkpoints
    python -m scripts.pretrain_resnet --arch resnet34 --export data/checkpoints \\
        --start-from data/checkpoints/resnet18_tiny_imagenet.safetensors --schedule 96x1,128x2 --lr 0.05

Killed at any moment, the same command goes on from the last whole epoch to the same result; the state is kept in
`runs/` under the data root. Started by `torchrun --nproc-per-node N -m scripts.pretrain_resnet …`, every process
takes its share of each batch.

The recipe: SGD with Nesterov momentum, one cosine cycle, label smoothing, weight decay on kernels only,
residual blocks that start as the identity, and images that grow during training. ResNet-34 starts as the
function of a trained ResNet-18 (Net2Net) rather than from nothing.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from pdl_utils.datasets import TinyImageNet, tiny_imagenet
from pdl_utils.images import Augmentation, Batches, accuracy
from pdl_utils.settings import has_bfloat16, seed_everything
from pdl_utils.training import History, fit, run_file, sgd
from pdl_utils.weights import load_weights, save_weights
from scripts import common

RESOLUTIONS = (64, 128)  # at which a finished network is evaluated
SMOOTHING = 0.1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser_of(__doc__, schedule="64x12,96x4,128x2", batch_size=128, lr=0.2)
    add = parser.add_argument
    add("--arch", choices=("resnet18", "resnet34"), required=True)
    add("--resolution", type=int, default=128, help="the side in pixels that the weights are shipped for")
    add("--photo-size", type=int, default=160, help="the side in pixels that suits large photographs best")
    add("--scale", type=float, nargs=2, default=(0.35, 1.0), help="share of an image in a crop")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The network at the start of training: random, or with the function of the weights to start from."""
    model = torchvision.models.get_model(args.arch, num_classes=classes, zero_init_residual=True)
    if args.start_from:
        grow_depth(load_weights(args.start_from)[0], model)
    return model


@torch.no_grad()
def grow_depth(weights: dict[str, Tensor], model: ResNet) -> None:
    """Give `model` the function of a network of the same widths that is not deeper (Net2DeeperNet, Chen et al.
    2015, arXiv:1511.05641): blocks that both have are copied; every further block becomes the identity, since its
    last batch norm is scaled to 0 and its input, out of a ReLU, is not negative.
    RuntimeError: a weight has no place in `model`, or another shape."""
    model.load_state_dict(model.state_dict() | weights)
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock) and f"{name}.bn2.weight" not in weights:
            nn.init.zeros_(module.bn2.weight)


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1], label_smoothing=SMOOTHING)


def train(args: argparse.Namespace, model: nn.Module, data: TinyImageNet, val: TinyImageNet) -> History:
    device, (rank, world) = next(model.parameters()).device, common.rank_and_world()
    batches = Batches(
        images=data.images.to(device), labels=data.labels.to(device), sizes=args.schedule,
        augment=Augmentation(flip=True, scale=tuple(args.scale)),
        batch_size=args.batch_size, seed=args.seed, part=(rank, world),
    )  # fmt: skip
    steps = len(args.schedule) * len(batches)
    optimizer, scheduler = sgd(model, args.lr, args.weight_decay, steps, warmup=len(batches))
    some, their_labels = val.images[::5], val.labels[::5]
    return fit(
        common.data_parallel(model), batches, loss, optimizer, epochs=len(args.schedule), scheduler=scheduler,
        evaluate=lambda net: {"val_top1": accuracy(net, some, their_labels, args.resolution)},
        file=run_file(args.arch, model, train, data=str(data.provenance), **common.settings_of(args)),
        autocast=has_bfloat16(device), label=None if rank else args.arch,
    )  # fmt: skip


def export(args: argparse.Namespace, model: nn.Module, data: TinyImageNet, val: TinyImageNet, history: History):
    """Evaluate on all validation images, and ship the weights with everything that one may ask about them."""
    sizes = sorted({*RESOLUTIONS, args.resolution})
    top1 = {size: round(accuracy(model, val.images, val.labels, size), 4) for size in sizes}
    print(f"{args.arch}: top-1 on {len(val.labels):,} validation images, by resolution: {top1}")
    facts = common.facts_of_run(args, history) | {
        "arch": args.arch,
        "data": f"{data.provenance.name} ({data.provenance.source})",
        "top1": top1,
        "resolution": args.resolution,
        "photo_size": args.photo_size,
        "categories": [name.split(",")[0] for name in val.names],
        "wnids": val.wnids,
    }
    save_weights(args.export / f"{args.arch}_tiny_imagenet.safetensors", model.state_dict(), facts)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with common.process_group() as device:
        seed_everything(args.seed)
        data, val = tiny_imagenet("train"), tiny_imagenet("val")
        model = build(args, len(data.wnids)).to(device)
        history = train(args, model, data, val)
        if args.export and common.rank_and_world()[0] == 0:
            export(args, model, data, val, history)


if __name__ == "__main__":
    main()
