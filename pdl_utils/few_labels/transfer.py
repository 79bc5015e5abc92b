"""Training on a handful of labelled images, from random weights or from pretrained ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pdl_utils.data_parallel import LabelledBatches
from pdl_utils.evaluation import linear_probe, outputs
from pdl_utils.images import Augmentation
from pdl_utils.training import History, fit, warmup_cosine, weight_decay_groups


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum and one cosine cycle.

    Attributes:
        steps: number of batches, however many images there are: every set of labels gets the same budget.
        size: side in pixels that images are resized to; None leaves them.
    """

    steps: int
    lr: float
    weight_decay: float
    batch_size: int = 50
    size: int | None = None
    augment: Augmentation = field(default_factory=Augmentation)


def train_on(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int = 0) -> History:
    """Train all weights that require gradients, in place; the model is left in eval mode. In the loss every
    class counts the same, however many examples it has: a handful of labels is seldom balanced.

    Args:
        images, labels: uint8 (N, 3, H, W) and int64 (N,).
        seed: of the order and of the augmentation.
    """
    device = next(model.parameters()).device
    batch_size = min(recipe.batch_size, len(images))
    epochs = -(-recipe.steps // (len(images) // batch_size))
    batches = LabelledBatches(
        images=images.to(device), labels=labels.to(device), augment=recipe.augment, batch_size=batch_size,
        resolutions=[recipe.size or images.shape[-1]] * epochs, seed=seed,
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        weight_decay_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=0.9, nesterov=True
    )
    steps = epochs * len(batches)
    weight = 1 / batches.labels.bincount().float()  # of a class

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(network(batch[0]), batch[1], reduction="none")
        return (each * weight[batch[1]]).sum() / weight[batch[1]].sum()

    return fit(
        model,
        batches,
        loss,
        optimizer,
        epochs=epochs,
        scheduler=warmup_cosine(optimizer, steps, warmup=steps // 10),
        autocast=True,
        progress=False,
    )


def without_head(network: nn.Module) -> nn.Module:
    """A copy of a ResNet that gives the features its last layer `fc` would look at, in eval mode."""
    encoder = copy.deepcopy(network)
    encoder.fc = nn.Identity()
    return encoder.eval()


def freeze_norms(network: nn.Module) -> nn.Module:
    """The network with every batch norm exchanged, in place, for the fixed affine map that it is in eval mode:
    a hundred images say too little about the statistics of its activations."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
                frozen.load_state_dict(norm.state_dict())
                setattr(parent, name, frozen)
    return network


def fine_tune(
    network: nn.Module, images: Tensor, labels: Tensor, classes: int, recipe: Recipe, C: float, seed: int = 0
) -> nn.Module:
    """A copy of `network`, trained further on a new task: first a linear probe becomes its last layer `fc`,
    then all weights are trained, batch norm staying as it is. A random last layer would spoil the features
    before it has learned anything (Kumar et al. 2022, arXiv:2202.10054).

    Args:
        C: of the linear probe.
        others: as in `train_on`.
    """
    tuned = freeze_norms(without_head(network))
    tuned.fc = linear_probe(outputs(tuned, images, recipe.size), labels, classes, C)
    train_on(tuned, images, labels, recipe, seed)
    return tuned
