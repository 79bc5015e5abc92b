"""How right a multi-label prediction is, what can be looked up without a network, what attention looks at, and
how far node features have smoothed.

Shapes: N nodes, L labels (0 or 1), E edges, H heads, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pdl_utils.graphs.layers import SortedEdges

# --- How right is a prediction? ---


def micro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 = 2TP / (2TP + FP + FN) over all nodes and labels pooled, both (N, L). A label is predicted where its
    logit is positive. 1 where nothing is to be found or was."""
    predicted, wanted = logits > 0, labels > 0.5
    found = int((predicted & wanted).sum())
    total = int(predicted.sum() + wanted.sum())
    return 2 * found / total if total else 1.0


def label_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """F1 of every label by itself, float64 (L,); NaN where a label is neither there nor predicted."""
    predicted, wanted = logits > 0, labels > 0.5
    return 2 * (predicted & wanted).sum(0).double() / (predicted.sum(0) + wanted.sum(0))


def f1_by_rank(logits: Tensor, labels: Tensor, order_by: Tensor, groups: int) -> list[float]:
    """Micro-F1 of `groups` equally large groups of nodes: those with the smallest `order_by` (N,) first."""
    return [micro_f1(logits[nodes], labels[nodes]) for nodes in order_by.argsort(stable=True).chunk(groups)]


def constant_guess(train_labels: Tensor, test_labels: Tensor) -> float:
    """Micro-F1 of the best guess that is the same for every node: the labels that more than a share t of the
    training nodes has, with the t from 0, 0.01, … 0.99 that suits the *test* labels best."""
    frequency = train_labels.float().mean(0)
    shares = torch.arange(100, device=frequency.device) / 100
    return max(micro_f1((frequency > t).float().expand_as(test_labels), test_labels) for t in shares)


# --- What can be looked up without a network? ---


def look_up_rows(query: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """The share of each label (M, L) among the reference nodes (M, C) whose features equal the query's (N, C):
    (N, L). A query that equals none gets the mean of all labels."""
    _, row = torch.cat([query, reference]).unique(dim=0, return_inverse=True)
    asked, known = row[: len(query)], row[len(query) :]
    count = torch.bincount(known, minlength=int(row.max()) + 1).to(labels.dtype).unsqueeze(1)
    total = labels.new_zeros(len(count), labels.shape[1]).index_add(0, known, labels)
    return torch.where(count > 0, total / count.clamp_min(1), labels.mean(0))[asked]


def surroundings(x: Tensor, graph: SortedEdges, hops: int) -> Tensor:
    """What a node and its neighbours look like: the features (N, C), their mean over each neighbourhood, the mean
    of these means, and so on for `hops` steps, side by side: (N, (hops + 1) C). Nothing is learned."""
    seen = [x]
    for _ in range(hops):
        total = torch.zeros_like(x).index_add(0, graph.target, seen[-1].index_select(0, graph.source))
        seen.append(total / graph.degree.clamp_min(1).unsqueeze(1))
    return torch.cat(seen, dim=1)


def nearest(query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `query` (N, C) the Euclidean distance to the nearest row of `reference` (M, C), and which
    row that is: (N,) and int64 (N,)."""
    parts = [torch.cdist(rows, reference).min(1) for rows in query.split(512)]  # not all of (N, M) at once
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


# --- What does attention look at? ---


def attention_entropy(attention: Tensor, graph: SortedEdges) -> Tensor:
    """Entropy of the attention over the edges into each node, divided by the logarithm of their number:
    (E, H) → (N, H), from 0 (all on one edge) to 1 (uniform); NaN for nodes with fewer than two edges."""
    each = -torch.special.xlogy(attention, attention)
    entropy = attention.new_zeros(graph.num_nodes, attention.shape[1]).index_add(0, graph.target, each)
    choice = torch.where(graph.degree > 1, graph.degree, torch.nan).to(entropy.dtype)
    return entropy / choice.log().unsqueeze(1)


def shared_labels(labels: Tensor, graph: SortedEdges) -> Tensor:
    """Jaccard similarity of the labels (N, L) at both ends of every edge, (E,) in 0..1: the number of labels that
    both have, divided by the number that at least one has; 0 where neither has any."""
    count = labels.sum(1)
    ends = zip(graph.source.split(2**16), graph.target.split(2**16), strict=True)  # not all of (E, L) at once
    both = torch.cat([(labels[source] * labels[target]).sum(1) for source, target in ends])
    either = count[graph.source] + count[graph.target] - both
    return both / either.clamp_min(1)


def preference(weight: Tensor, value: Tensor, graph: SortedEdges) -> Tensor:
    """Do edges of large weight (E, H) have a large value (E, K), among the edges into the same node? Both are
    replaced by their ranks within the neighbourhood, self-loops left out, and the ranks of all neighbourhoods are
    correlated together: float64 (H, K) in -1..1, NaN where one of the two never varies within a neighbourhood."""
    neighbours = graph.source != graph.target
    target = graph.target[neighbours].cpu().numpy()
    a, b = (_ranks_within(each[neighbours].cpu().numpy(), target) for each in (weight, value))
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(a.T @ b / np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0)))


def _ranks_within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks of each column (E, K) within the groups of its rows, ties share theirs; scaled to -1..1 with mean 0 in
    every group."""
    size = np.bincount(group)
    before = np.concatenate([[0], size.cumsum()[:-1]])
    ranks = np.empty(values.shape)
    for column in range(values.shape[1]):
        distinct, code = np.unique(values[:, column], return_inverse=True)
        rank = rankdata(group * len(distinct) + code)  # first by group, then by value
        ranks[:, column] = (2 * (rank - before[group]) - 1) / size[group] - 1
    return ranks


def edge_auc(weight: Tensor, wanted: Tensor, graph: SortedEdges, targets: Tensor | None = None) -> float:
    """ROC-AUC of ranking edges by `weight` (E,) where `wanted` (E,) are the right ones: 1 is perfect, 0.5 chance.
    Self-loops are left out, and with `targets`, bool (N,), edges into other nodes."""
    counted = graph.source != graph.target
    if targets is not None:
        counted = counted & targets[graph.target]
    return float(roc_auc_score(wanted[counted].cpu(), weight[counted].cpu()))


# --- How far have features smoothed? ---


def dirichlet_energy(x: Tensor, graph: SortedEdges) -> float:
    """How much features x (N, C) differ along edges: Σ_{j→i} ‖x_i - x_j‖² / Σ_i ‖x_i‖²; 0 when neighbours are
    equal (Rusch et al. 2023, A survey on oversmoothing in graph neural networks, eq. 3, here relative to the
    squared norm, so that layers of different scale can be compared)."""
    # A block of channels at a time: all of them at once would be an (E, C) tensor.
    energy = sum(
        float((block[graph.source] - block[graph.target]).square().sum(dtype=torch.float64))
        for block in x.split(64, dim=1)
    )
    scale = float(x.square().sum(dtype=torch.float64))
    return energy / scale if scale else 0.0


def mean_average_distance(x: Tensor) -> float:
    """Mean cosine distance 1 - cos(x_i, x_j) between any two of at least two nodes, x (N, C) (Chen et al. 2020,
    Measuring and relieving the over-smoothing problem, eq. 1-4): 0 when all point the same way, 1 when they are
    orthogonal on average. A zero vector is at distance 1 from everything."""
    direction = F.normalize(x.double(), dim=1)
    cosines = direction @ direction.sum(0) - direction.square().sum(1)
    return float(1 - cosines.mean() / (len(x) - 1))
