"""SimCLR: learn features without labels, by telling two views of one image from all others
(Chen et al. 2020, arXiv:2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pdl_utils.data_parallel import rank_and_world
from pdl_utils.images import Augmentation, normalize
from pdl_utils.provenance import Provenance
from pdl_utils.resnet import cifar_resnet18
from pdl_utils.weights import CHECKPOINTS, load_weights

FILE = "simclr_cifar10.safetensors"

# Crops, mirrors and colours of the paper's CIFAR-10 experiments (appendix B.9); larger crops than its 8%.
VIEW = Augmentation(flip=True, scale=(0.2, 1.0), jitter=0.5, gray=0.2)


def two_views(
    images: Tensor,
    size: int | None = None,
    generator: torch.Generator | None = None,
    augment: Augmentation = VIEW,
) -> tuple[Tensor, Tensor]:
    """Two independent random views of every image (sec. 2.1).

    Args:
        images: uint8 (N, 3, H, W), on the device where the views shall be made.
        size: side of the views in pixels; by default that of the images.
        generator: CPU generator; the same one gives the same views on every device.

    Returns:
        Two float32 batches (N, 3, size, size) in 0..1.
    """
    return augment(images, size, generator), augment(images, size, generator)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross-entropy (eq. 1): among all 2N − 1 other embeddings, find the
    other view of the same image.

    In several processes every one passes its own rows; the embeddings of all are compared, and gradients
    flow back to where they belong. With gradients averaged, as DistributedDataParallel does it, the result
    is that of one process with the joint batch.

    Args:
        z1, z2: (N, D), embeddings of the first and of the second view, row by row of the same image; of
            any length, they are normalised here.
        temperature: small values look at the hardest negatives only.

    Returns:
        The mean over all 2N embeddings, a scalar in float32 or wider.

    Raises:
        ValueError: the two differ in shape, or N is 0.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) == 0:
        raise ValueError(
            f"two views of the same images are needed, (N, D) each; got {(*z1.shape,)}, {(*z2.shape,)}"
        )
    n = len(z1)
    rank, world = rank_and_world()
    with torch.autocast(z1.device.type, enabled=False):  # bfloat16 would round similarities to 1/128
        z1, z2 = (F.normalize(z.float() if z.element_size() < 4 else z, dim=1) for z in (z1, z2))
        z = torch.cat([z1, z2])  # (2N, D)
        everyone = Gather.apply(z) if world > 1 else z
        similarity = z @ everyone.T / temperature  # (2N, 2N · processes)
        row = torch.arange(2 * n, device=z.device)
        similarity[row, 2 * n * rank + row] = float("-inf")  # nobody is asked to find itself
        return F.cross_entropy(similarity, 2 * n * rank + (row + n) % (2 * n))


class Gather(torch.autograd.Function):
    """(M, D) of every process → (M · processes, D) in each. Its gradient sums what the processes' losses
    say about a row, and gives it back to the process that the row came from."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # reduced in place, and not ours
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class SimCLR(nn.Module):
    """An encoder, and the projection that the loss looks at and that is thrown away afterwards (sec. 2.1).

    Args:
        encoder: images → features (N, `features`), such as a ResNet without its last layer.
        features: number of features.
        projection: size of the embedding.
        temperature: of the loss.
    """

    def __init__(self, encoder: nn.Module, features: int, projection: int = 128, temperature: float = 0.5):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(inplace=True),
            nn.Linear(features, projection),
        )
        self.temperature = temperature

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of two views, (N, 3, H, W) each in 0..1. Both pass through the encoder as one batch,
        so that batch norm sees them alike."""
        embeddings = self.projector(self.encoder(normalize(torch.cat(list(views)))))  # (2N, projection)
        return nt_xent_loss(*embeddings.chunk(2), self.temperature)


def cifar_encoder(width: int = 64, stem_stride: int = 1) -> tuple[nn.Module, int]:
    """`cifar_resnet18` without its last layer, and how many features it gives."""
    network = cifar_resnet18(width=width, stem_stride=stem_stride)
    features = network.fc.in_features
    network.fc = nn.Identity()
    return network, features


def pretrained_encoder() -> tuple[nn.Module, Provenance, dict[str, Any]]:
    """The encoder that `python -m scripts.pretrain_simclr` made and that ships in `data/checkpoints/`, in
    eval mode; where it comes from; and the facts of its training.

    Raises:
        CorruptCheckpoint: its file is damaged.
    """
    weights, facts = load_weights(CHECKPOINTS / FILE)
    network, _ = cifar_encoder(facts["width"], facts["stem_stride"])
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last).eval()
    source = f"this project's own, {facts['epochs']} epochs on {facts['data']}"
    return network, Provenance("SimCLR encoder", source), facts
