"""How right a multi-label prediction is, what attention looks at, and how far node features have smoothed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdl_utils.graphs.edges import SortedEdges


def micro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 = 2TP / (2TP + FP + FN) over all nodes and labels pooled; 1 where nothing is to be found or was.

    Args:
        logits: (N, L); a label is predicted where its logit is positive.
        labels: (N, L) of 0 and 1.
    """
    predicted, wanted = logits > 0, labels > 0.5
    found = int((predicted & wanted).sum())
    total = int(predicted.sum() + wanted.sum())
    return 2 * found / total if total else 1.0


def label_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """F1 of every label by itself, float64 (L,); NaN where a label is neither there nor predicted."""
    predicted, wanted = logits > 0, labels > 0.5
    return 2 * (predicted & wanted).sum(0).double() / (predicted.sum(0) + wanted.sum(0))


def attention_entropy(attention: Tensor, graph: SortedEdges, *, relative: bool = False) -> Tensor:
    """Entropy of the attention over the edges into each node: (E, H) → (N, H).

    H_i = -Σ_{j→i} α_ij ln α_ij, in nats, from 0 (all on one edge) to ln(degree) (uniform). `relative` divides
    by ln(degree): 0..1, NaN for nodes with fewer than two edges, which have nothing to choose from.
    """
    each = -torch.special.xlogy(attention, attention)
    entropy = attention.new_zeros(graph.num_nodes, attention.shape[1]).index_add(0, graph.target, each)
    if not relative:
        return entropy
    choice = torch.where(graph.degree > 1, graph.degree, torch.nan).to(entropy.dtype)
    return entropy / choice.log().unsqueeze(1)


def relative_attention(attention: Tensor, graph: SortedEdges) -> Tensor:
    """α_ij · degree_i, (E, H): 1 where attention is uniform, whatever the neighbourhood's size."""
    return attention * graph.degree.index_select(0, graph.target).unsqueeze(1)


def dirichlet_energy(x: Tensor, graph: SortedEdges, *, relative: bool = False) -> float:
    """How much features differ along edges: 1/N Σ_{j→i} ‖x_i - x_j‖² (Rusch et al. 2023, A survey on
    oversmoothing in graph neural networks, eq. 3); 0 when neighbours are equal.

    Args:
        x: (N, C).
        relative: divide by the mean of ‖x_i‖², so that layers of different scale can be compared.
    """
    # A block of channels at a time: all of them at once would be an (E, C) tensor.
    energy = sum(
        float((block[graph.source] - block[graph.target]).square().sum(dtype=torch.float64))
        for block in x.split(64, dim=1)
    )
    scale = float(x.square().sum(dtype=torch.float64)) if relative else graph.num_nodes
    return energy / scale if scale else 0.0


def mean_average_distance(x: Tensor) -> float:
    """Mean cosine distance 1 - cos(x_i, x_j) between any two nodes of x (N, C) (Chen et al. 2020, Measuring and
    relieving the over-smoothing problem, eq. 1-4): 0 when all point the same way, 1 when they are orthogonal on
    average. A zero vector is at distance 1 from everything."""
    direction = F.normalize(x.double(), dim=1)
    if len(x) < 2:
        return 0.0
    cosines = direction @ direction.sum(0) - direction.square().sum(1)
    return float(1 - cosines.mean() / (len(x) - 1))
