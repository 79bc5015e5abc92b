"""Train this project's own SimCLR encoder on CIFAR-10's training images, without their labels.

    python -m scripts.pretrain_simclr --export data/checkpoints

Killed at any moment, the same command goes on from the last whole epoch to the same result; the state is kept in
`runs/` under the data root. Started by `torchrun --nproc-per-node N -m scripts.pretrain_simclr …`, every process
takes its share of each batch, augments it in its own way, and compares its embeddings with those of all.

The defaults suit a CPU: a ResNet-18 of half the width whose stem has stride 2. The network of the paper's
CIFAR-10 experiments, for a GPU: `--width 64 --stem-stride 1 --schedule 32x400`.
"""

import argparse
from functools import partial

import torch
from torch import Tensor

from pdl_utils.datasets import LabelledImages, cifar10
from pdl_utils.few_labels.simclr import FILE, SimCLR, cifar_encoder, knn_monitor, nt_xent_loss, pretrain
from pdl_utils.settings import seed_everything
from pdl_utils.training import History, run_file
from pdl_utils.weights import load_weights, save_weights
from scripts import common

BANK = 10_000  # training images that kNN accuracy looks its neighbours up in, for …
QUERIES = 2_000  # … as many others; the test images are not touched


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser_of(__doc__, schedule="24x30,32x30", batch_size=512, lr=0.25)
    add = parser.add_argument
    add("--width", type=int, default=32, help="channels of the first stage")
    add("--stem-stride", type=int, default=2)
    add("--temperature", type=float, default=0.2)
    return parser.parse_args(argv)


def joint_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """`nt_xent_loss` over the embeddings of all processes, each of which has its own rows."""
    if common.rank_and_world()[1] > 1:
        z1, z2 = common.Gather.apply(z1), common.Gather.apply(z2)
    return nt_xent_loss(z1, z2, temperature)


def build(args: argparse.Namespace) -> SimCLR:
    """The model at the start of training. A file that ships holds no projection: that starts anew."""
    model = SimCLR(*cifar_encoder(args.width, args.stem_stride))
    if args.start_from:
        model.encoder.load_state_dict(load_weights(args.start_from)[0])
    return model


def train(args: argparse.Namespace, model: SimCLR, data: LabelledImages) -> History:
    images, labels, settings = data.train_images, data.train_labels, common.settings_of(args)
    bank = min(BANK, 5 * len(images) // 6)  # fewer where there are fewer images
    return pretrain(
        common.data_parallel(model), images, args.schedule,
        loss=partial(joint_loss, temperature=args.temperature), lr=args.lr, weight_decay=args.weight_decay,
        batch_size=args.batch_size, seed=args.seed, part=common.rank_and_world(),
        evaluate=knn_monitor(images, labels, bank, min(QUERIES, len(images) - bank)),
        file=run_file("SimCLR", model, train, pretrain, nt_xent_loss, data=str(data.provenance), **settings),
        label=None if common.rank_and_world()[0] else "SimCLR",
    )  # fmt: skip


def export(args: argparse.Namespace, model: SimCLR, data: LabelledImages, history: History) -> None:
    """Ship the encoder, without the projection, with everything that one may ask about it."""
    count, origin = len(data.train_images), data.provenance
    facts = common.facts_of_run(args, history) | {
        "arch": "cifar_resnet18",
        "width": args.width,
        "stem_stride": args.stem_stride,
        "data": f"{origin.name}, {count:,} training images without labels ({origin.source})",
    }
    save_weights(args.export / FILE, model.encoder.state_dict(), facts)
    print(f"SimCLR: kNN accuracy {facts['knn'][-1]:.1%}")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with common.process_group() as device:
        seed_everything(args.seed)
        data = cifar10()
        model = build(args).to(device, memory_format=torch.channels_last)
        history = train(args, model, data)
        if args.export and common.rank_and_world()[0] == 0:
            export(args, model, data, history)


if __name__ == "__main__":
    main()
