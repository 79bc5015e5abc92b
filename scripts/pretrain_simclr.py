"""Train this project's own SimCLR encoder on CIFAR-10's training images, without their labels.

    python -m scripts.pretrain_simclr --run runs/simclr --export data/checkpoints

Killed at any moment, the same command goes on from the last whole epoch to the same result. Started by
`torchrun --nproc-per-node N -m scripts.pretrain_simclr …`, every process takes its share of each batch,
and compares with the embeddings of all.

The defaults suit a CPU: a ResNet-18 of half the width whose stem has stride 2. The network of the paper's
CIFAR-10 experiments, for a GPU: `--width 64 --stem-stride 1 --schedule 32x400`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdl_utils.data_parallel import ShuffledBatches, data_parallel, process_group, rank_and_world
from pdl_utils.datasets.small_images import LabelledImages, cifar10
from pdl_utils.evaluation import knn_accuracy, outputs
from pdl_utils.few_labels.simclr import FILE, SimCLR, cifar_encoder, two_views
from pdl_utils.settings import seed_everything
from pdl_utils.training import History, fit, warmup_cosine, weight_decay_groups
from pdl_utils.weights import save_weights
from scripts.pretrain_resnet import facts_of_run, parser_of, schedule, starting_weights

BANK = 10_000  # training images that kNN accuracy looks its neighbours up in, for …
QUERIES = 2_000  # … as many others; the test images are not touched


@dataclass(frozen=True, kw_only=True)
class ViewBatches(ShuffledBatches):
    """Shuffled batches of two random views of every image, in 0..1."""

    def batch(self, rows: Tensor, mine: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        size = self.resolutions[self.epoch]
        first, second = two_views(self.images[rows], size, generator)
        return first[mine], second[mine]


def watch(images: Tensor, labels: Tensor, bank: int = BANK, queries: int = QUERIES):
    """An `evaluate` callback for `fit`: kNN accuracy of the encoder, the labels serving as a yardstick only."""
    some, known = images[: bank + queries], labels[: bank + queries]

    def evaluate(model: SimCLR) -> dict[str, float]:
        features = outputs(model.encoder, some)
        theirs = known.to(features.device)
        return {"knn": knn_accuracy(features[:bank], theirs[:bank], features[bank:], theirs[bank:])}

    return evaluate


def pretrain(
    model: SimCLR,
    images: Tensor,
    labels: Tensor,
    resolutions: list[int],
    *,
    batch_size: int = 512,
    lr: float = 0.25,
    weight_decay: float = 5e-4,
    seed: int = 0,
    stop_after: int | None = None,
    bank: int = BANK,
    queries: int = QUERIES,
    autocast: bool = True,
    checkpoint: Path | None = None,
    progress: bool | None = None,
) -> History:
    """SimCLR on all `images`, uint8 (N, 3, H, W): SGD with Nesterov momentum and one cosine cycle, an epoch
    at each of `resolutions` (side of the views in pixels).

    Args:
        labels: (N,), looked at by the kNN accuracy alone, never by the loss.
        bank, queries: how many images serve that accuracy, as examples and as questions.
        autocast: compute in bfloat16 where that is safe.
        checkpoint: to go on from after a kill.

    Returns:
        One row an epoch: `loss`, `knn`, `seconds`.
    """
    device = next(model.parameters()).device
    batches = ViewBatches(images=images.to(device), resolutions=resolutions, batch_size=batch_size, seed=seed)
    optimizer = torch.optim.SGD(weight_decay_groups(model, weight_decay), lr=lr, momentum=0.9, nesterov=True)
    epochs = len(resolutions)
    return fit(
        data_parallel(model),
        batches,
        lambda network, views: network(views),
        optimizer,
        epochs=min(epochs, stop_after or epochs),
        scheduler=warmup_cosine(optimizer, epochs * len(batches), warmup=len(batches)),
        evaluate=watch(images, labels, bank, queries),
        autocast=autocast,
        checkpoint=checkpoint,
        examples=len(batches) * batch_size,
        label="SimCLR",
        progress=progress,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, schedule=schedule("24x30,32x30"), batch_size=512, lr=0.25)
    add = parser.add_argument
    add("--width", type=int, default=32, help="channels of the first stage")
    add("--stem-stride", type=int, default=2)
    add("--temperature", type=float, default=0.2)
    return parser.parse_args(argv)


def export(args: argparse.Namespace, model: SimCLR, data: LabelledImages, history: History) -> None:
    """Ship the encoder, without the projection, with everything that one may ask about it."""
    facts = facts_of_run(args, history, next(model.parameters()).device) | {
        "arch": "cifar_resnet18",
        "width": args.width,
        "stem_stride": args.stem_stride,
        "data": f"{data.provenance.name}, {len(data.train_images):,} training images without labels "
                f"({data.provenance.source})",
        "knn": history["knn"],
        "loss": history["loss"],
    }  # fmt: skip
    save_weights(args.export / FILE, model.encoder.state_dict(), facts)
    print(f"SimCLR: kNN accuracy {history['knn'][-1]:.1%} on {QUERIES:,} training images")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with process_group() as device:
        seed_everything(args.seed)
        data = cifar10()
        model = SimCLR(*cifar_encoder(args.width, args.stem_stride), temperature=args.temperature)
        if args.start_from:  # a file that ships holds no projection: that starts anew
            weights = starting_weights(args.start_from)
            whole = any(name.startswith("encoder.") for name in weights)
            (model if whole else model.encoder).load_state_dict(weights)
        model.to(device, memory_format=torch.channels_last)
        history = pretrain(
            model,
            data.train_images,
            data.train_labels,
            args.schedule,
            batch_size=args.batch_size,
            lr=args.lr,
            weight_decay=args.weight_decay,
            seed=args.seed,
            stop_after=args.stop_after,
            checkpoint=args.run / "last.pt",
        )
        if args.export and len(history.rows) == len(args.schedule) and rank_and_world()[0] == 0:
            export(args, model, data, history)


if __name__ == "__main__":
    main()
