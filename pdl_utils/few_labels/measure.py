"""What a way of training reaches on test images, over several runs; and which recipe does best."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pdl_utils.few_labels.transfer import Recipe, linear_probe
from pdl_utils.images import outputs
from pdl_utils.settings import save_atomically
from pdl_utils.training import NonFiniteLoss, run_file

LabelledSet = tuple[Tensor, Tensor]  # uint8 (N, 3, H, W) and int64 (N,)


@dataclass(frozen=True)
class Outcome:
    """What a way of training reached on test images.

    Attributes:
        probabilities: (runs, images, classes).
        accuracy: of each run.
        seconds: of a run's training, on average.
    """

    probabilities: Tensor
    labels: Tensor
    seconds: float = 0.0

    @property
    def accuracy(self) -> list[float]:
        return (self.probabilities.argmax(2) == self.labels).float().mean(1).tolist()


def digest(images: Tensor) -> str:
    """SHA-256 of the pixels of uint8 images."""
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()


Train = Callable[[Tensor, Tensor, Recipe, int], nn.Module]  # images, labels, recipe, seed → a model


def measure(
    train: Train, recipe: Recipe, sets: Sequence[LabelledSet], test: LabelledSet,
    keep: Mapping[str, Any] | None = None,
) -> Outcome:  # fmt: skip
    """Train on each of the labelled `sets`, with its position as the seed, and look at the test images.

    Args:
        keep: remember the outcome of each run in a `run_file`, named by these settings (JSON values), the recipe
            and the images: what was trained once is not trained again. None: always train.
    """
    probabilities, seconds = [], []
    tests = None if keep is None else digest(test[0])
    for seed, (images, labels) in enumerate(sets):
        file = None
        if keep is not None:
            settings = {**keep, "recipe": asdict(recipe), "seed": seed, "images": digest(images), "tests": tests}
            file = run_file("few labels", **settings)
        if file is None or not file.exists():
            started = time.perf_counter()
            model = train(images, labels, recipe, seed)
            spent = time.perf_counter() - started
            run = {"seconds": spent, "probabilities": outputs(model, test[0], recipe.size).softmax(1).cpu()}
            if file is not None:
                save_atomically(lambda path, run=run: torch.save(run, path), file)
        else:
            run = torch.load(file, weights_only=True)
        probabilities.append(run["probabilities"])
        seconds.append(run["seconds"])
    return Outcome(torch.stack(probabilities), test[1], sum(seconds) / len(seconds))


def recipe_scores(
    train: Train, recipes: Sequence[Recipe], sets: Sequence[LabelledSet], judge: LabelledSet,
    keep: Mapping[str, Any] | None = None,
) -> list[float]:  # fmt: skip
    """The mean accuracy on the images of `judge` that each recipe reaches, trained on each of `sets`; 0 for one
    whose loss became NaN or infinite."""
    scores = []
    for recipe in recipes:
        try:
            accuracy = measure(train, recipe, sets, judge, keep).accuracy
            scores.append(sum(accuracy) / len(accuracy))
        except NonFiniteLoss:
            scores.append(0.0)
    return scores


def probe_scores(
    penalties: Sequence[float], sets: Sequence[LabelledSet], judge: LabelledSet, classes: int
) -> list[float]:
    """The mean accuracy on `judge` that a linear probe reaches with each penalty, fitted on each of `sets`; here
    a set is (features, labels)."""
    scores = []
    for C in penalties:
        probes = [linear_probe(features, labels, classes, C) for features, labels in sets]
        right = [(probe(judge[0]).argmax(1) == judge[1].to(judge[0].device)).float().mean() for probe in probes]
        scores.append(float(torch.stack(right).mean()))
    return scores


def probe_outcome(labelled: LabelledSet, test: LabelledSet, classes: int, C: float) -> Outcome:
    """What a linear probe reaches, fitted on (features, labels) and measured on others. Nothing in it is random:
    one run."""
    started = time.perf_counter()
    probe = linear_probe(*labelled, classes, C)
    seconds = time.perf_counter() - started
    return Outcome(probe(test[0]).softmax(1)[None].cpu(), test[1], seconds)
