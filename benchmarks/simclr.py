"""SimCLR's data path, loss and training step beside lightly's.

    python benchmarks/simclr.py [--rounds 5] [--json FILE]

Batches of 512 images of 32×32, the same operations on both sides (crops, mirroring, colours, greyness, standard
colours; no blur). Ours augments whole batches as tensors; lightly augments image by image through PIL and a
DataLoader, in this process or with a worker per core: this makes the difference. A timed call is a whole epoch
of a few batches; what the workers make ahead, they make within it. The network is the encoder that ships, with
the same weights, in bfloat16 where the device is faster with it and in float32 elsewhere. The limits leave a lot
out: views are more than copied pixels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lightly.loss import NTXentLoss
from lightly.transforms import SimCLRTransform
from PIL import Image
from side_by_side import LIMIT, arguments, measure, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pdl_utils.few_labels import VIEW, SimCLR, cifar_encoder, nt_xent_loss
from pdl_utils.images import normalize
from pdl_utils.settings import bfloat16_is_faster, pick_device, seed_everything

BATCHES, BATCH, SIDE = 2, 512, 32
TEMPERATURE = 0.2


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
    device = next(model.parameters()).device
    for views in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_faster(device)):
            loss = loss_of(*views)
        model.zero_grad()
        loss.backward()


def time_data(images: Tensor, loaders: dict[str, DataLoader], rounds: int) -> dict[str, list[float]]:
    """Views of every image; and copies of the pixels as numbers, which no way of making views can avoid."""

    def two_copies() -> None:
        for batch in images.split(BATCH):
            torch.cat([batch, batch]).float()

    ours = {"ours": lambda: [normalize(torch.cat(views)) for views in our_batches(images)]}
    theirs = {name: lambda loader=loader: list(loader) for name, loader in loaders.items()}
    return measure(ours | theirs | {"copies": two_copies}, rounds, budget=30)


def time_loss(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Loss and gradient of a batch of embeddings; and the three matrix products in it."""
    peer, z = NTXentLoss(temperature=TEMPERATURE), torch.randn(2, BATCH, 128, device=device, requires_grad=True)

    def three_products() -> None:
        rows = z.detach().flatten(0, 1)
        pairs = rows @ rows.T
        pairs @ rows, pairs.T @ rows

    ours = {"ours": lambda: nt_xent_loss(*z, TEMPERATURE).backward()}
    return measure(ours | {"theirs": lambda: peer(*z).backward(), "products": three_products}, rounds, warmup=5)


def time_steps(images: Tensor, loader: DataLoader, rounds: int) -> dict[str, list[float]]:
    """Training on every batch; and the network alone, on views made before."""
    device, peer_loss = images.device, NTXentLoss(temperature=TEMPERATURE)
    ours = SimCLR(*cifar_encoder(width=32, stem_stride=2)).to(device, memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    ready = list(our_batches(images))

    def embed(*views: Tensor) -> Tensor:
        return ours(normalize(torch.cat(views)))

    def our_loss(*views: Tensor) -> Tensor:
        return nt_xent_loss(*embed(*views).chunk(2), TEMPERATURE)

    def peer_objective(*views: Tensor) -> Tensor:
        """lightly's tutorials pass the views through the network one after the other."""
        return peer_loss(*(theirs(view.to(device).to(memory_format=torch.channels_last)) for view in views))

    calls = {
        "ours": lambda: train(our_batches(images), ours, our_loss),
        "theirs": lambda: train(loader, theirs, peer_objective),
        "network": lambda: train(ready, ours, lambda *views: embed(*views).square().mean()),
    }
    return measure(calls, rounds, budget=90)


def main() -> None:
    args = arguments(__doc__, rounds=5)
    device = pick_device()
    seed_everything(0)
    images = torch.randint(0, 256, (BATCHES * BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    loaders = {
        n: loader_of(Pictures(images), k) for n, k in (("one process", 0), ("workers", os.cpu_count() or 1))
    }
    images = images.to(device)
    data = time_data(images, loaders, args.rounds)
    losses = time_loss(device, 5 * args.rounds)
    steps = time_steps(images, loaders["workers"], args.rounds)
    pairs = {
        "data: ours / lightly in one process": (data["ours"], data["one process"]),
        "data: ours / lightly, a worker per core": (data["ours"], data["workers"]),
        f"data: ours / the pixels copied as floats {LIMIT}": (data["ours"], data["copies"]),
        "loss: ours / lightly": (losses["ours"], losses["theirs"]),
        f"loss: ours / its three matrix products {LIMIT}": (losses["ours"], losses["products"]),
        "step: ours / lightly, a worker per core": (steps["ours"], steps["theirs"]),
        f"step: ours / the network on views made before {LIMIT}": (steps["ours"], steps["network"]),
    }
    precision = "bfloat16" if bfloat16_is_faster(device) else "float32"
    report(f"SimCLR, {BATCHES} batches of {BATCH} images of {SIDE}×{SIDE}, {precision}", pairs, device, args.json)


if __name__ == "__main__":
    main()
