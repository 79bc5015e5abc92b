"""SimCLR's data path, loss and training step beside lightly's.

    python benchmarks/simclr.py [--rounds 7] [--json FILE]

Batches of 512 images of 32×32, the same operations on both sides (crops, mirroring, colours, greyness, standard
colours; no blur): ours on whole batches as tensors, lightly's image by image through PIL and a DataLoader, in this
process or with a worker per core. A timed call is a whole epoch of a few batches: what the workers make ahead,
they make within it. The network is the encoder that ships, in bfloat16, with the same weights.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from side_by_side import LIMIT, measure, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pdl_utils.few_labels import VIEW, SimCLR, cifar_encoder, nt_xent_loss
from pdl_utils.images import normalize
from pdl_utils.settings import pick_device, seed_everything

BATCHES, BATCH, SIDE = 4, 512, 32


class Pictures(Dataset):
    """PIL images, turned into two views one by one, as lightly's tutorials do it."""

    def __init__(self, images: Tensor) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.views = SimCLRTransform(input_size=SIDE, cj_strength=0.5, min_scale=0.2, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.views(self.images[index])


def loader_of(data: Dataset, workers: int) -> DataLoader:
    """Batches of `data`. Workers live on from one pass to the next, and between passes they rest: they never
    work ahead while another contestant is timed."""
    return DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def our_batches(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two views of every batch of a shuffled epoch."""
    for batch in images[torch.randperm(len(images)).to(images.device)].split(BATCH):
        yield VIEW(batch), VIEW(batch)


def train(batches: Iterable[Sequence[Tensor]], model: nn.Module, loss_of: Callable[..., Tensor]) -> None:
    """A forward and a backward pass on every batch of two views."""
    for views in batches:
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            loss = loss_of(*views)
        model.zero_grad()
        loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    device = pick_device()
    seed_everything(0)
    images = torch.randint(0, 256, (BATCHES * BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    one_process, workers = (loader_of(Pictures(images), n) for n in (0, os.cpu_count() or 1))
    images = images.to(device)
    ready = [[view.to(device) for view in views] for views in our_batches(images)]

    def two_copies() -> None:
        for batch in images.split(BATCH):
            torch.cat([batch, batch]).float()

    data = measure(
        {
            "ours": lambda: [normalize(torch.cat(views)) for views in our_batches(images)],
            "one process": lambda: list(one_process),
            "workers": lambda: list(workers),
            "copies": two_copies,
        },
        args.rounds,
    )

    peer_loss, z = NTXentLoss(temperature=0.2), torch.randn(2, BATCH, 128, device=device, requires_grad=True)

    def three_products() -> None:
        rows = z.detach().flatten(0, 1)
        pairs = rows @ rows.T
        pairs @ rows, pairs.T @ rows

    losses = measure(
        {
            "ours": lambda: nt_xent_loss(z[0], z[1], 0.2).backward(),
            "theirs": lambda: peer_loss(z[0], z[1]).backward(),
            "products": three_products,
        },
        5 * args.rounds,
        warmup=5,
    )

    ours = SimCLR(*cifar_encoder(width=32, stem_stride=2))
    ours.to(device, memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)

    def our_objective(*views: Tensor) -> Tensor:
        return nt_xent_loss(*ours(normalize(torch.cat(views))).chunk(2), 0.2)

    def peer_objective(*views: Tensor) -> Tensor:
        """lightly's tutorials pass the views through the network one after the other."""
        both = [view.to(device).to(memory_format=torch.channels_last) for view in views]
        return peer_loss(*(theirs.projector(theirs.encoder(view)) for view in both))

    def network_alone(*views: Tensor) -> Tensor:
        return ours(normalize(torch.cat(views))).square().mean()

    steps = measure(
        {
            "ours": lambda: train(our_batches(images), ours, our_objective),
            "theirs": lambda: train(workers, theirs, peer_objective),
            "network": lambda: train(ready, ours, network_alone),
        },
        args.rounds,
    )
    pairs = {
        "data: ours / lightly in one process": (data["ours"], data["one process"]),
        "data: ours / lightly, a worker per core": (data["ours"], data["workers"]),
        f"data: ours / the pixels copied as floats {LIMIT}": (data["ours"], data["copies"]),
        "loss: ours / lightly": (losses["ours"], losses["theirs"]),
        f"loss: ours / its three matrix products {LIMIT}": (losses["ours"], losses["products"]),
        "step: ours / lightly, a worker per core": (steps["ours"], steps["theirs"]),
        f"step: ours / the network on views made before {LIMIT}": (steps["ours"], steps["network"]),
    }
    report(f"SimCLR, {BATCHES} batches of {BATCH} images of {SIDE}×{SIDE}", pairs, device, args.json)


if __name__ == "__main__":
    main()
