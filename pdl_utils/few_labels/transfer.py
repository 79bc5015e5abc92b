"""Learning from a handful of labelled images: from random weights, by a probe on frozen features, by
fine-tuning; and what each way reaches on test images."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pdl_utils.datasets import LabelledImages
from pdl_utils.few_labels.lora import add_lora
from pdl_utils.images import Augmentation, Batches, outputs
from pdl_utils.settings import bfloat16_is_faster, save_atomically
from pdl_utils.training import History, NonFiniteLoss, fit, run_file, sgd, warmup_cosine

Examples = tuple[Tensor, Tensor]  # uint8 images (N, 3, H, W) or features (N, D), and int64 labels (N,)


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum and one cosine cycle."""

    steps: int  # number of batches, however many images there are: every set of labels gets the same budget
    lr: float
    weight_decay: float
    batch_size: int = 50
    size: int | None = None  # side in pixels that images are resized to; None leaves them
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

    weight = 1 / labels.bincount().clamp(min=1)  # of each class, by the number of its images

    def loss(network: nn.Module, batch: Examples) -> Tensor:
        logits = network(batch[0]).float()
        absent = logits.shape[1] - len(weight)  # last classes that have no image
        return F.cross_entropy(logits, batch[1], F.pad(weight, (0, absent)))

    return fit(
        model, batches, loss, optimizer, epochs=epochs, scheduler=scheduler,
        autocast=bfloat16_is_faster(device), progress=False,
    )  # fmt: skip


def without_head(network: nn.Module) -> nn.Module:
    """A copy of a ResNet that gives the features its last layer `fc` would look at, in eval mode. Every batch norm
    is folded into the convolution before it, as the fixed affine map that it is in eval mode: that is faster, and
    a hundred images, which say too little about the statistics of activations, cannot change them."""
    encoder = copy.deepcopy(network)
    encoder.fc = nn.Identity()
    for block in list(encoder.modules()):
        for (name, layer), (after, norm) in pairwise(list(block.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(layer.eval(), norm.eval()))
                setattr(block, after, nn.Identity())
    return encoder.to(memory_format=torch.channels_last).eval()


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


def self_train(
    features: Tensor,
    labels: Tensor,
    unlabelled: Tensor,
    classes: int,
    C: float,
    rounds: int = 3,
    share: float = 0.05,
) -> nn.Linear:
    """A `linear_probe` that learns from its own guesses as well (pseudo-labels, Lee 2013). In each round, the
    guesses for `unlabelled`, (M, D), that it is surest of count as labels of the next fit: up to `share` · M of
    each class, or the classes that are easily recognised would crowd out the others."""
    probe = linear_probe(features, labels, classes, C)
    for _ in range(rounds):
        confidence, guesses = probe(unlabelled).softmax(1).max(1)
        order = confidence.argsort(descending=True)
        sure = torch.cat([order[guesses[order] == c][: int(share * len(order))] for c in range(classes)])
        pseudo = guesses[sure].to(labels.device)
        probe = linear_probe(torch.cat([features, unlabelled[sure]]), torch.cat([labels, pseudo]), classes, C)
    return probe


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
    """
    tuned = copy.deepcopy(encoder)
    tuned.fc = linear_probe(outputs(encoder, images, recipe.size), labels, classes, C)
    if rank is not None:
        torch.manual_seed(seed)  # of A
        add_lora(tuned, rank, 1.0, "layer*", scaling="rs")
    tuned.fc.requires_grad_(True)
    train_on(tuned, images, labels, recipe, seed)
    return tuned


@torch.no_grad()
def share_right(net: nn.Module, data: Examples) -> float:
    """Share of the images whose class has the largest output."""
    guesses = net(data[0]).argmax(1)
    return (guesses == data[1].to(guesses.device)).float().mean().item()


@dataclass(frozen=True)
class Outcome:
    """What a way of training reached on test images."""

    probabilities: Tensor  # (runs, images, classes)
    labels: Tensor
    seconds: float = 0.0  # of a run's training, on average

    @property
    def accuracy(self) -> list[float]:
        """Of each run."""
        return (self.probabilities.argmax(2) == self.labels).float().mean(1).tolist()


def digest(images: Tensor) -> str:
    """SHA-256 of the pixels of uint8 images."""
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()


Train = Callable[[Tensor, Tensor, Recipe, int], nn.Module]  # images, labels, recipe, seed → a model


def measure(
    train: Train, recipe: Recipe, sets: Sequence[Examples], test: Examples, keep: Mapping[str, Any] | None = None
) -> Outcome:  # fmt: skip
    """Train on each of the labelled `sets`, with its position as the seed, and look at the test images.

    With `keep`, what was trained once is not trained again: each run has a `run_file`, named by these settings
    (JSON values), the recipe and the images.
    """
    runs = []
    tests = None if keep is None else digest(test[0])
    for seed, (images, labels) in enumerate(sets):
        file = None
        if keep is not None:
            settings = {**keep, "recipe": asdict(recipe), "seed": seed, "images": digest(images), "tests": tests}
            file = run_file("few labels", **settings)
        if file is not None and file.exists():
            runs.append(torch.load(file, weights_only=True))
            continue
        started = time.perf_counter()
        model = train(images, labels, recipe, seed)
        seconds = time.perf_counter() - started
        probabilities = outputs(model, test[0], recipe.size).softmax(1).cpu()
        runs.append({"seconds": seconds, "probabilities": probabilities})
        if file is not None:
            save_atomically(partial(torch.save, runs[-1]), file)
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return Outcome(torch.stack([run["probabilities"] for run in runs]), test[1], seconds)


def recipe_scores(
    train: Train, recipes: Sequence[Recipe], sets: Sequence[Examples], judge: Examples,
    keep: Mapping[str, Any] | None = None,
) -> list[float]:  # fmt: skip
    """The mean accuracy on the images of `judge` that each recipe reaches, trained on each of `sets`; 0 for one
    whose loss became NaN or infinite."""
    scores = []
    for recipe in recipes:
        try:
            scores.append(sum(measure(train, recipe, sets, judge, keep).accuracy) / len(sets))
        except NonFiniteLoss:
            scores.append(0.0)
    return scores


def probe_scores(
    penalties: Sequence[float], sets: Sequence[Examples], judge: Examples, classes: int
) -> list[float]:
    """The same of linear probes with each penalty, on features."""
    probes = [[linear_probe(*labelled, classes, C) for labelled in sets] for C in penalties]
    return [sum(share_right(probe, judge) for probe in fitted) / len(sets) for fitted in probes]


def probe_outcome(
    labelled: Examples, test: Examples, classes: int, C: float, unlabelled: Tensor | None = None
) -> Outcome:
    """What a linear probe reaches on other features, or `self_train` if there are unlabelled ones. Nothing in
    either is random: one run."""
    started = time.perf_counter()
    if unlabelled is None:
        probe = linear_probe(*labelled, classes, C)
    else:
        probe = self_train(*labelled, unlabelled, classes, C)
    seconds = time.perf_counter() - started
    return Outcome(probe(test[0]).softmax(1)[None].cpu(), test[1], seconds)


# The digits 0 to 4 and then 5 to 9: a small network for LoRA to adapt.


def five_digits(
    data: LabelledImages, first: int, most: int, tests: int, device: torch.device
) -> tuple[Examples, Examples, Examples]:
    """The digits `first` to `first` + 4 for training, validation and testing. The last tenth of the training
    images is held out for validation; of the others at most `most` are trained on, and at most `tests` of the
    test images are used."""
    splits = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        mine = (labels >= first) & (labels < first + 5)
        pixels = (images[mine].flatten(1) / 255 - 0.1307) / 0.3081  # MNIST's mean and deviation
        splits.append((pixels.to(device), labels[mine].to(device) - first))
    (x, y), (test_x, test_y) = splits
    held_out = len(x) // 10
    some = min(most, len(x) - held_out)
    return (x[:some], y[:some]), (x[-held_out:], y[-held_out:]), (test_x[:tests], test_y[:tests])


def mlp(seed: int = 0) -> nn.Sequential:
    """784 → 1000 → 2000 → 5, with ReLU between."""
    torch.manual_seed(seed)
    hidden = nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(2000, 5))


def train_adam(
    net: nn.Module, data: Examples, *, lr: float, epochs: int, batch_size: int, seed: int = 0
) -> History:
    """Train what requires gradients with Adam and one cosine, in float32; leaves `net` in eval mode."""
    x, y = data
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)

    def batches(epoch: int) -> list[Examples]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return [(x[rows], y[rows]) for rows in order[: len(x) // batch_size * batch_size].split(batch_size)]

    steps = epochs * (len(x) // batch_size)
    return fit(
        net, batches, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), optimizer, epochs=epochs,
        scheduler=warmup_cosine(optimizer, steps, steps // 20), progress=False,
    )  # fmt: skip
