"""SimCLR: learn features without labels, by telling two views of one image from all others
(Chen et al. 2020, arXiv:2002.05709)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdl_utils.datasets.sources import Provenance
from pdl_utils.images import Augmentation, Batches, Size, outputs, share_right
from pdl_utils.resnet import cifar_resnet18
from pdl_utils.settings import has_bfloat16
from pdl_utils.training import History, fit, sgd
from pdl_utils.weights import CHECKPOINTS, load_weights

FILE = "simclr_cifar10.safetensors"

# Crops, mirrors and colours of the paper's CIFAR-10 experiments (appendix B.9); larger crops than its 8%.
VIEW = Augmentation(flip=True, scale=(0.2, 1.0), jitter=0.5, gray=0.2)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross-entropy (eq. 1): among all 2N − 1 other embeddings, find the other view
    of the same image. z1, z2: (N, D), row by row of the same image. A scalar in float32 or wider."""
    if z1.shape != z2.shape or len(z1) < 2 or not temperature > 0:
        found = f"the embeddings are {(*z1.shape,)} and {(*z2.shape,)}, at temperature {temperature}"
        raise ValueError(f"there must be two views each of two images or more, and a temperature above 0; {found}")
    row = torch.arange(2 * len(z1), device=z1.device)
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 would round similarities to 1/128
        z = torch.cat([z1, z2])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)  # (2N, D)
        similarity = z @ z.T / temperature  # (2N, 2N)
        similarity[row, row] = float("-inf")  # the similarity of a view with itself is masked
        return F.cross_entropy(similarity, row.roll(len(z1)))


class SimCLR(nn.Module):
    """An encoder, images → features (N, `features`), and the projection to what the loss compares, normalised
    images (N, 3, H, W) → (N, `projection`), which is thrown away afterwards (sec. 2.1)."""

    def __init__(self, encoder: nn.Module, features: int, projection: int = 128):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU(inplace=True),
            nn.Linear(features, projection),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))


def pretrain(
    model: nn.Module, images: Tensor, sizes: list[Size], *, loss: Callable[[Tensor, Tensor], Tensor],
    augment: Augmentation = VIEW, lr: float = 0.25, weight_decay: float = 5e-4, batch_size: int = 512,
    seed: int = 0, part: tuple[int, int] = (0, 1), **options: Any,
) -> History:  # fmt: skip
    """Train `model`, normalised images → embeddings, on uint8 `images` (N, C, H, W) without labels. `augment`
    draws two views of each, in pixels of `sizes`, one an epoch; `loss` takes the embeddings of both, (batch, D)
    each; for `part` see `Batches`; `options` are for `fit`, such as `evaluate` (`knn_monitor`)."""
    device = next(model.parameters()).device
    batches = Batches(
        images=images.to(device), sizes=sizes, augment=augment, batch_size=batch_size, seed=seed, part=part
    )
    optimizer, scheduler = sgd(model, lr, weight_decay, steps=len(sizes) * len(batches), warmup=len(batches))

    def contrast(network: nn.Module, views: tuple[Tensor, Tensor]) -> Tensor:
        z = network(torch.cat(views))  # as one batch: batch norm sees both views alike
        with torch.autocast(device.type, enabled=False):  # bfloat16 would round similarities to 1/128
            return loss(*z.float().chunk(2))

    how = {"label": "SimCLR", "scheduler": scheduler, "autocast": has_bfloat16(device), **options}
    return fit(model, batches, contrast, optimizer, epochs=len(sizes), **how)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20) -> float:
    """Share of the queries (M, D) whose label, of int64 (M,), the k most similar features of the bank (N, D) vote
    for, each with the weight exp(cosine / 0.1) (Wu et al. 2018, arXiv:1805.01978, sec. 3.4)."""
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T  # (M, N)
    similarity, nearest = similarity.topk(min(k, len(bank)))
    votes = similarity.new_zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels.to(nearest)[nearest], (similarity / 0.1).exp())
    return share_right(votes, labels)


def knn_monitor(
    images: Tensor, labels: Tensor, bank: int, queries: int
) -> Callable[[nn.Module], dict[str, float]]:
    """An `evaluate` for `fit`: kNN accuracy of `model.encoder`, with the first images as the bank and the next
    ones as queries. The labels measure the features; no loss sees them. ValueError: there are too few images."""
    if min(bank, queries) < 1 or len(images) < bank + queries:
        has = f"a bank of {bank} and {queries} queries need as many images, not {len(images)}"
        raise ValueError(f"{has}; ask for less")

    def evaluate(model: nn.Module) -> dict[str, float]:
        features = outputs(model.encoder, images[: bank + queries])
        known = labels[: bank + queries]
        return {"knn": knn_accuracy(features[:bank], known[:bank], features[bank:], known[bank:])}

    return evaluate


def cifar_encoder(width: int = 64, stem_stride: int = 1) -> tuple[nn.Module, int]:
    """`cifar_resnet18` without its last layer, and how many features it gives."""
    network = cifar_resnet18(width=width, stem_stride=stem_stride)
    features, network.fc = network.fc.in_features, nn.Identity()
    return network, features


class PretrainedEncoder(NamedTuple):
    """An encoder in eval mode, images → features; where it comes from; and the facts of its training."""

    model: nn.Module
    provenance: Provenance
    facts: dict[str, Any]


def pretrained_encoder() -> PretrainedEncoder:
    """The encoder of `python -m scripts.pretrain_simclr` that ships. CorruptCheckpoint: it is damaged."""
    weights, facts = load_weights(CHECKPOINTS / FILE)
    network, _ = cifar_encoder(facts["width"], facts["stem_stride"])
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last).eval()
    source = f"this project's own, {facts['epochs']} epochs on {facts['data']}"
    return PretrainedEncoder(network, Provenance("SimCLR encoder", source), facts)
