"""Learning from a handful of labelled images: from random weights, by a probe on frozen features, by
fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pdl_utils.few_labels.lora import add_lora
from pdl_utils.images import Augmentation, Batches, outputs
from pdl_utils.settings import bfloat16_is_faster
from pdl_utils.training import History, fit, sgd


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
    images, labels = images.to(device), labels.to(device)
    batch_size = min(recipe.batch_size, len(images))
    epochs = -(-recipe.steps // (len(images) // batch_size))
    batches = Batches(
        images=images, labels=labels, augment=recipe.augment, batch_size=batch_size, seed=seed,
        sizes=[recipe.size or images.shape[-1]] * epochs,
    )  # fmt: skip
    steps = epochs * len(batches)
    optimizer, scheduler = sgd(model, recipe.lr, recipe.weight_decay, steps, warmup=steps // 10)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = network(batch[0]).float()
        count = labels.bincount(minlength=logits.shape[1]).clamp(min=1)  # images of each class
        return F.cross_entropy(logits, batch[1], 1 / count)

    autocast = bfloat16_is_faster(device)
    return fit(
        model, batches, loss, optimizer, epochs=epochs, scheduler=scheduler, autocast=autocast, progress=False
    )


def fold_norms(network: nn.Module) -> nn.Module:
    """Fold every batch norm, in place, into the convolution defined before it, as the fixed affine map that it is
    in eval mode. The outputs are those of eval mode, faster; and fine-tuning on a hundred images, which say
    too little about the statistics of activations, cannot change these."""
    for block in list(network.modules()):
        children = list(block.named_children())
        for (name, layer), (after, norm) in pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(layer.eval(), norm.eval()))
                setattr(block, after, nn.Identity())
    return network


def without_head(network: nn.Module) -> nn.Module:
    """A copy of a ResNet that gives the features its last layer `fc` would look at, in eval mode, with the
    batch norms folded into the convolutions."""
    encoder = copy.deepcopy(network)
    encoder.fc = nn.Identity()
    return fold_norms(encoder).to(memory_format=torch.channels_last).eval()


def linear_probe(features: Tensor, labels: Tensor, classes: int, C: float = 0.01) -> nn.Linear:
    """A linear classifier on frozen features: scikit-learn's logistic regression on standardised features,
    with the standardisation folded into its weights. Every class counts the same, however many examples it has.

    Args:
        features: (N, D) of the labelled images.
        labels: int64 (N,); classes without an example get a score far below all others.
        classes: number of outputs.
        C: inverse strength of the L2 penalty: smaller is stronger.

    Returns:
        Features (…, D) → logits (…, classes), on the device of `features`.
    """
    scaler = StandardScaler().fit(features.cpu().numpy())
    regression = LogisticRegression(C=C, class_weight="balanced", max_iter=1000, tol=1e-3)
    fitted = regression.fit(scaler.transform(features.cpu().numpy()), labels.cpu().numpy())
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(fitted.classes_) == 2:  # one row: the log-odds of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / torch.from_numpy(scaler.scale_)
    bias = bias - weight @ torch.from_numpy(scaler.mean_)
    probe = nn.Linear(features.shape[1], classes, device=features.device)
    seen = torch.from_numpy(fitted.classes_)
    with torch.no_grad():
        probe.weight.zero_()
        probe.bias.fill_(-100.0)
        probe.weight[seen] = weight.to(probe.weight)
        probe.bias[seen] = bias.to(probe.bias)
    return probe.requires_grad_(False)


def fine_tune(
    encoder: nn.Module, images: Tensor, labels: Tensor, classes: int, recipe: Recipe, C: float, seed: int = 0,
    rank: int | None = None,
) -> nn.Module:  # fmt: skip
    """A copy of `encoder` (see `without_head`), trained on a new task: first a linear probe becomes its last
    layer `fc`, then the weights are trained. A random last layer would spoil the features before it has learned
    anything (Kumar et al. 2022, arXiv:2202.10054).

    Args:
        C: of the linear probe.
        rank: train LoRA updates of this rank on the convolutions of the residual stages, and `fc`, instead of
            all weights.
        others: as in `train_on`.
    """
    tuned = copy.deepcopy(encoder)
    tuned.fc = linear_probe(outputs(encoder, images, recipe.size), labels, classes, C).requires_grad_(True)
    if rank is not None:
        torch.manual_seed(seed)  # of A
        add_lora(tuned, rank, 1.0, "layer*", scaling="rs", train="fc")
    train_on(tuned, images, labels, recipe, seed)
    return tuned


def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, k: int = 20, temperature: float = 0.1
) -> Tensor:
    """What the k most similar features of the bank vote for, weighted by exp(cosine / temperature)
    (Wu et al. 2018, arXiv:1805.01978, sec. 3.4).

    Args:
        bank, queries: features (N, D) and (M, D).
        bank_labels: int64 (N,).
        k: number of neighbours; all N where there are fewer.

    Returns:
        (M, classes); the largest in a row is the guess.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # (M, N)
    similarity, nearest = similarity.topk(min(k, len(bank)))
    votes = similarity.new_zeros(len(queries), classes)
    return votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20) -> float:
    """Share of queries that `knn_votes` guesses right; `labels` are theirs, int64 (M,)."""
    votes = knn_votes(bank, bank_labels, queries, int(bank_labels.max()) + 1, k)
    return (votes.argmax(1) == labels).float().mean().item()


def knn_monitor(
    images: Tensor, labels: Tensor, bank: int, queries: int
) -> Callable[[nn.Module], dict[str, float]]:
    """An `evaluate` callback for `fit`: kNN accuracy of `model.encoder`, which looks up the neighbours of
    `queries` of the images among `bank` others. The labels measure the features; no loss sees them."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        features = outputs(model.encoder, images[: bank + queries])
        known = labels[: bank + queries].to(features.device)
        return {"knn": knn_accuracy(features[:bank], known[:bank], features[bank:], known[bank:])}

    return evaluate
