"""What a network makes of images, and how good that is: outputs, accuracy, neighbours, a linear probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from pdl_utils.images import normalize, resize


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, size: int | None = None, batch: int = 250) -> Tensor:
    """What a network in eval mode gives for uint8 images (N, 3, H, W): logits, or the features of an encoder,
    float32 (N, D), on the model's device.

    Args:
        size: resize the images to this side in pixels first.
        batch: how many images to look at in one go; it does not change the result.

    Raises:
        ValueError: the model is in train mode, where its outputs would depend on the rest of the batch.
    """
    if model.training:
        raise ValueError("the model is in train mode, batch norm would look at the batch; call model.eval() first")
    device = next(model.parameters()).device
    parts = []
    for some in images.split(batch):
        x = normalize(resize(some.to(device), size or some.shape[-1]) / 255)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(model(x).float())
    return torch.cat(parts)


def top1(model: nn.Module, images: Tensor, labels: Tensor, size: int | None = None) -> float:
    """Share of uint8 images (N, 3, H, W) whose most probable class is their label (N,)."""
    guesses = outputs(model, images, size).argmax(1)
    return (guesses == labels.to(guesses.device)).float().mean().item()


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries whose class has the largest weight among the k most similar features of the bank,
    weighted by exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978, sec. 3.4).

    Args:
        bank, queries: features (N, D) and (M, D).
        bank_labels, labels: int64 (N,) and (M,).
        k: number of neighbours; all N where there are fewer.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # (M, N)
    similarity, nearest = similarity.topk(min(k, len(bank)))
    votes = similarity.new_zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
    return (votes.argmax(1) == labels).float().mean().item()


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
    return probe
