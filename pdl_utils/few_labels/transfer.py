"""Learning from a handful of labelled images: from random weights, by a probe on frozen features, by fine-tuning;
and comparing what two ways reach on the same sets of labels."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from pdl_utils.images import Augmentation, Batches, Size, accuracy, outputs, share_right
from pdl_utils.resnet import cifar_resnet18
from pdl_utils.settings import has_bfloat16, pick_device
from pdl_utils.training import History, fit, sgd

PENALTIES = (1e-3, 3e-3, 1e-2)  # inverse strengths that a probe is tried with


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum and one cosine cycle."""

    steps: int  # number of batches, however many images there are: every set of labels gets the same budget
    lr: float
    weight_decay: float
    batch_size: int = 50
    size: Size | None = None  # that images are resized to; None leaves them
    augment: Augmentation = field(default_factory=Augmentation)


Way = Callable[[Tensor, Tensor, Recipe, int], nn.Module]  # images, labels, recipe, seed → a trained network


def train_on(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int = 0) -> History:
    """Train all weights that require gradients, in place, on uint8 images (N, C, H, W) and int64 labels (N,); the
    model is left in eval mode. In the loss every class counts the same, however many examples it has: a handful of
    labels is seldom balanced. `seed` is that of the order and of the augmentation."""
    device = next(model.parameters()).device
    images, labels = images.to(device), labels.to(device)
    batch_size = min(recipe.batch_size, len(images))
    epochs = -(-recipe.steps // (len(images) // batch_size))
    batches = Batches(
        images=images, labels=labels, augment=recipe.augment, batch_size=batch_size, seed=seed,
        sizes=[recipe.size] * epochs,
    )  # fmt: skip
    steps = epochs * len(batches)
    optimizer, scheduler = sgd(model, recipe.lr, recipe.weight_decay, steps, warmup=steps // 10)
    counts = labels.bincount()
    weight = len(labels) / ((counts > 0).sum() * counts.clamp(min=1))  # of an image by its class, 1 on average

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        each = F.cross_entropy(network(batch[0]).float(), batch[1], reduction="none")
        return (weight[batch[1]] * each).mean()  # divided by the batch's size, not by the sum of its weights

    how = {"epochs": epochs, "scheduler": scheduler, "autocast": has_bfloat16(device), "label": None}
    return fit(model, batches, loss, optimizer, **how)


def from_scratch(classes: int) -> Way:
    """Trains a narrow `cifar_resnet18` whose stem has stride 2 from random weights."""

    def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = cifar_resnet18(classes, width=16, stem_stride=2)
        network.to(pick_device(), memory_format=torch.channels_last)
        train_on(network, images, labels, recipe, seed)
        return network

    return train


def without_head(network: nn.Module) -> nn.Module:
    """A copy of a ResNet that gives the features its last layer `fc` would look at, in eval mode. Each batch norm
    is folded into the convolution before it, as the fixed affine map that it is in eval mode: that is faster, and
    a hundred images, which say too little about the statistics of activations, cannot change them."""
    encoder = copy.deepcopy(network).eval()
    encoder.get_submodule("fc")  # or an AttributeError: its last layer has another name
    encoder.fc = nn.Identity()
    return fuse(encoder).to(memory_format=torch.channels_last).eval()


def linear_probe(features: Tensor, labels: Tensor, classes: int, C: float = 0.01) -> nn.Linear:
    """A linear classifier on frozen features (N, D), (…, D) → (…, classes): scikit-learn's logistic regression
    with an L2 penalty of inverse strength `C` on standardised features, whose scale is folded into the weights.
    Every class counts the same; one without an example gets a score far below all others."""
    scaler = StandardScaler().fit(features.cpu().numpy())
    regression = LogisticRegression(C=C, class_weight="balanced", max_iter=1000, tol=1e-3)
    fitted = regression.fit(scaler.transform(features.cpu().numpy()), labels.cpu().numpy())
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(fitted.classes_) == 2:  # one row: the log-odds of the second class
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / torch.from_numpy(scaler.scale_)
    bias = bias - weight @ torch.from_numpy(scaler.mean_)
    probe, seen = nn.Linear(features.shape[1], classes), torch.from_numpy(fitted.classes_).long()
    if not 0 <= seen.min() <= seen.max() < classes:
        raise ValueError(f"labels are {seen.tolist()}, but there are {classes} classes, from 0 on")
    with torch.no_grad():
        probe.weight.zero_()
        probe.bias.fill_(-100.0)
        probe.weight[seen], probe.bias[seen] = weight.float(), bias.float()
    return probe.requires_grad_(False).to(features.device)


def self_train(
    features: Tensor, labels: Tensor, unlabelled: Tensor, classes: int, C: float, rounds: int = 3,
    share: float = 0.05,
) -> nn.Linear:  # fmt: skip
    """A `linear_probe` that learns from its own guesses as well (pseudo-labels, Lee 2013). In each round, the
    guesses for `unlabelled`, (M, D), that it is surest of count as labels of the next fit: up to `share` · M of
    each class, or the classes that are easily recognised would crowd out the others."""
    probe = linear_probe(features, labels, classes, C)
    for _ in range(rounds):
        confidence, guesses = probe(unlabelled).softmax(1).max(1)
        order = confidence.argsort(descending=True)
        sure = torch.cat([order[guesses[order] == c][: int(share * len(order))] for c in range(classes)])
        both = torch.cat([features, unlabelled[sure]]), torch.cat([labels, guesses[sure].to(labels.device)])
        probe = linear_probe(*both, classes, C)
    return probe


def fine_tune(encoder: nn.Module, classes: int, C: float) -> Way:
    """Trains a copy of `encoder` (see `without_head`) on a new task: first a linear probe with penalty `C`
    becomes its last layer `fc`, then all weights are trained. A random last layer would spoil the features before
    it has learned anything (Kumar et al. 2022, arXiv:2202.10054)."""

    def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> nn.Module:
        tuned = copy.deepcopy(encoder)
        tuned.fc = linear_probe(outputs(encoder, images, recipe.size), labels, classes, C)
        train_on(tuned.requires_grad_(True), images, labels, recipe, seed)
        return tuned

    return train


@dataclass(frozen=True)
class Trials:
    """What all methods are tried on: sets of labelled images, rows of `images`, and others that judge them."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    judges: Mapping[str, tuple[Tensor, Tensor]]  # "test" and "validation" → images and labels
    classes: int
    keep: Callable[..., float]  # keep(name, compute, *code, **settings) → what compute() gives, as `Run.once` does
    data: str  # where the images come from: of what is kept

    def features(
        self, encoder: nn.Module, count: int, size: Size | None = None, mirror: bool = False
    ) -> dict[str, Tensor]:
        """{"pool": (count, D) of the first images, "test": (M, D), …}; of mirror images if asked for."""
        parts = {"pool": self.images[:count]} | {name: images for name, (images, _) in self.judges.items()}
        seen = {name: part.flip(3) if mirror else part for name, part in parts.items()}
        return {name: outputs(encoder, part, size).cpu() for name, part in seen.items()}

    def probe(self, features: Mapping[str, Tensor], C: float, sets: Tensor, judge: str = "test") -> list[float]:
        """The accuracy of a `linear_probe` for each set, rows (S, n) of the pool."""
        probes = [linear_probe(features["pool"][rows], self.labels[rows], self.classes, C) for rows in sets]
        return [share_right(probe(features[judge]), self.judges[judge][1]) for probe in probes]

    def best_penalty(self, features: Mapping[str, Tensor], sets: Tensor) -> float:
        """The first of `PENALTIES` that ties with the best, on validation images."""
        return choose({C: self.probe(features, C, sets, "validation") for C in PENALTIES})

    def self_train(self, features: Mapping[str, Tensor], C: float, sets: Tensor) -> list[float]:
        """The test accuracy of `self_train` for each set; the rest of the pool are its unlabelled images."""
        scores, pool = [], features["pool"]
        for rows in sets:
            rest = torch.ones(len(pool), dtype=torch.bool).index_fill(0, rows, False)
            probe = self_train(pool[rows], self.labels[rows], pool[rest], self.classes, C)
            scores.append(share_right(probe(features["test"]), self.judges["test"][1]))
        return scores

    def train(self, name: str, way: Way, recipe: Recipe, sets: Tensor, judge: str = "test") -> list[float]:
        """The accuracy for each set of the network that `way(images, labels, recipe, seed)` trains. They are kept
        one by one; `name` says what decides about `way` besides its code: its encoder."""

        def score(seed: int, rows: Tensor) -> float:
            network = way(self.images[rows], self.labels[rows], recipe, seed)
            return accuracy(network, *self.judges[judge], recipe.size)

        scores = []
        for seed, rows in enumerate(sets):
            settings = {"recipe": str(recipe), "seed": seed, "rows": rows.tolist()}
            settings |= {"judge": judge, "judges": len(self.judges[judge][0]), "data": self.data}
            scores.append(self.keep(name, partial(score, seed, rows), way, **settings))
        return scores

    def tune(
        self, name: str, way: Way, options: Mapping[str, Recipe], choosing: Tensor, sets: Tensor
    ) -> tuple[Recipe, list[float], dict[str, list[float]]]:
        """The recipe that is best on validation images, trained on the sets `choosing`; the test accuracy that it
        reaches for each of `sets`; and what all recipes reached on validation images."""
        choice = options if len(options) > 1 else {}
        tried = {o: self.train(name, way, recipe, choosing, "validation") for o, recipe in choice.items()}
        best = options[max(options, key=lambda option: sum(tried.get(option, [])))]
        return best, self.train(name, way, best, sets), tried


def percent(values: Sequence[float]) -> str:
    """Mean and deviation over label sets or seeds: "65.6% ± 2.2"."""
    return f"{100 * np.mean(values):.1f}% ± {100 * np.std(values, ddof=1):.1f}"


@dataclass(frozen=True)
class Difference:
    """How much better one way is than another on the same label sets, with the 95% interval of the mean."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f"{100 * self.low:+.1f} to {100 * self.high:+.1f}" if self.low < self.high else "on every set"
        return f"{100 * self.mean:+.1f} points ({interval})"

    @property
    def tie(self) -> bool:
        """No difference is among what the interval allows."""
        return self.low <= 0 <= self.high


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one` minus `other`, two accuracies a label set, in the same order: what makes a set easy or hard for both
    cancels out. Student's t over the sets, of which there are two or more."""
    if len(one) != len(other) or len(one) < 2:
        raise ValueError(f"{len(one)} and {len(other)} accuracies; give the same two or more label sets to both")
    differences = np.subtract(one, other)
    if np.ptp(differences) < 1e-9:  # no spread: t is undefined
        return Difference(*[float(differences[0])] * 3)
    interval = ttest_rel(one, other).confidence_interval(0.95)
    return Difference(float(differences.mean()), float(interval.low), float(interval.high))


def choose(scores: Mapping[str, Sequence[float]]) -> str:
    """The first option that ties with the one of the best mean: name the cheapest options first."""
    best = max(scores, key=lambda name: np.mean(scores[name]))
    return next(name for name in scores if name == best or paired(scores[best], scores[name]).tie)


def against(scores: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Rows of a table: each method against the one before, on the label sets that both were tried on."""
    rows = []
    for name, before in pairs:
        count = min(len(scores[name]), len(scores[before]))
        gain = paired(scores[name][:count], scores[before][:count])
        rows.append([name, percent(scores[name]), before, f"{gain}{', a tie' if gain.tie else ''}", str(count)])
    return rows
