"""How right a multi-label prediction is, what can be looked up without a network, what attention looks at, and how
far node features have smoothed. Shapes: N nodes, L labels (0 or 1), E edges in edge_index (2, E), H heads, C
channels. Attention and edge_index are as a layer gives them on request, self-loops included."""

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import add_remaining_self_loops, degree, scatter

from pdl_utils.graphs.layers import GraphNet


def micro_f1(logits: Tensor, labels: Tensor) -> float:
    """F1 = 2TP / (2TP + FP + FN) over all nodes and labels pooled, both (N, L). A label is predicted where its
    logit is positive. 1 where nothing is to be found or was. ValueError: the shapes differ, or there is NaN."""
    if logits.shape != labels.shape or (logits + labels).isnan().any():
        shapes = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} must have the same shape, and no NaN")
    predicted, wanted = logits > 0, labels > 0.5
    total = int(predicted.sum() + wanted.sum())
    return 2 * int((predicted & wanted).sum()) / total if total else 1.0


def constant_guess(train_labels: Tensor, test_labels: Tensor) -> Tensor:
    """The best guess that is the same for every node, as logits (L,): the labels that more than a share t of the
    training nodes has, with the t from 0, 0.01, … 0.99 that suits the *test* labels best."""
    frequency = train_labels.float().mean(0)
    guesses = [frequency - share / 100 for share in range(100)]
    return max(guesses, key=lambda guess: micro_f1(guess.expand_as(test_labels), test_labels))


def neighbourhood_features(x: Tensor, edge_index: Tensor, hops: int) -> Tensor:
    """What a node and its neighbours look like: the features (N, C), their mean over each neighbourhood (the node
    included), the mean of these means, and so on for `hops` steps, side by side: (N, (hops + 1) C)."""
    (source, target), _ = add_remaining_self_loops(edge_index, num_nodes=len(x))
    seen = [x.float()]
    for _ in range(hops):
        seen.append(scatter(seen[-1][source], target, dim_size=len(x), reduce="mean"))
    return torch.cat(seen, dim=1)


def look_up(query: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """For each row of `query` (N, C) the labels (M, L) of the nearest row of `reference` (M, C): (N, L). Where
    several rows are equal (to four decimals) it is their mean, so that no order of rows decides."""
    rows, row = reference.mul(1e4).round().unique(dim=0, return_inverse=True)
    known = scatter(labels.float(), row, dim_size=len(rows), reduce="mean")
    parts = [torch.cdist(part, rows / 1e4).argmin(1) for part in query.split(512)]  # not all of (N, M) at once
    return known[torch.cat(parts)]


def attention_entropy(edge_index: Tensor, alpha: Tensor) -> Tensor:
    """Entropy of the attention over the edges into each node, divided by the logarithm of their number:
    (E, H) → (N, H), from 0 (all on one edge) to 1 (uniform); NaN for nodes with fewer than two edges."""
    entropy = scatter(-torch.special.xlogy(alpha, alpha), edge_index[1])
    count = degree(edge_index[1], dtype=alpha.dtype)
    return entropy / torch.where(count > 1, count, torch.nan).log().view(-1, *[1] * (alpha.ndim - 1))


def jaccard(labels: Tensor, edge_index: Tensor) -> Tensor:
    """Labels (N, L) that both ends of an edge have, divided by those that at least one has: (E,) in 0..1; 0 where
    neither has any."""
    count = labels.sum(1)
    parts = [(labels[source] * labels[target]).sum(1) for source, target in edge_index.split(2**16, dim=1)]
    both = torch.cat(parts)
    return both / (count[edge_index[0]] + count[edge_index[1]] - both).clamp_min(1)


def preference(edge_index: Tensor, alpha: Tensor, value: Tensor) -> Tensor:
    """Do edges of large attention (E, H) have a large value (E, K), among the edges into the same node? Both are
    replaced by their ranks within the neighbourhood, self-loops left out, and the ranks of all neighbourhoods are
    correlated together: float64 (H, K) in -1..1, NaN where one of the two never varies within a neighbourhood."""
    neighbours = edge_index[0] != edge_index[1]
    target = edge_index[1, neighbours].cpu().numpy()
    a, b = (_ranks_within(each[neighbours].detach().cpu().double().numpy(), target) for each in (alpha, value))
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)))


def _ranks_within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks of each column (E, K) within the groups of its rows, ties share theirs; scaled to -1..1 with mean 0 in
    every group: (K, E). NaN where a column holds NaN."""
    size = np.bincount(group)
    before = np.concatenate([[0], size.cumsum()[:-1]])
    ranks = rankdata(np.atleast_2d(values.T), axis=1)
    ranks = rankdata(group * len(group) + ranks, axis=1)  # first by group, then by value
    return (2 * (ranks - before[group]) - 1) / size[group] - 1


def attention_gain(edge_index: Tensor, alpha: Tensor, value: Tensor, shuffles: int = 0) -> Tensor:
    """A node's neighbours have a value on average, (E,), weighted by attention (E, H) or each the same. The first
    minus the second, mean over the nodes that have neighbours, self-loops left out: (1 + shuffles, H). In the rows
    after the first the attention is shuffled among each node's neighbours: what chance gives."""
    neighbours = edge_index[0] != edge_index[1]
    target, alpha, value = edge_index[1, neighbours], alpha[neighbours], value[neighbours, None].float()
    value, gains = value - scatter(value, target, reduce="mean")[target], []
    in_order, generator = target.argsort(stable=True), torch.Generator().manual_seed(0)
    for turn in range(1 + shuffles):
        if turn:
            order = target + torch.rand(len(target), dtype=torch.float64, generator=generator).to(target.device)
            alpha = torch.empty_like(alpha).index_copy(0, in_order, alpha[order.argsort()])
        gain = scatter(alpha * value, target) / scatter(alpha, target).clamp_min(1e-30)  # (N, H)
        gains.append(gain.sum(0) / len(target.unique()))
    return torch.stack(gains)


def compartment_auc(net: GraphNet, graph: Data) -> list[list[float]]:
    """How well each head of a network ranks the functional edges of a synthetic graph above the others, by its
    attention: the ROC-AUC (1 is perfect, 0.5 chance) among targets in one compartment, and in the other. Self-
    loops are left out; attention is multiplied by the number of edges into the target, so that 1 is uniform."""
    with torch.no_grad():
        _, (edge_index, alphas) = net(graph.x, graph.edge_index, return_attention_weights=True)
    source, target = edge_index
    weight = torch.cat(alphas, dim=1).T * degree(target)[target]  # (heads of all layers, E)
    functional, here = graph.complex[source] == graph.complex[target], graph.x[target, 0] > 0
    sides = [side & (source != target) for side in (here, ~here)]
    return [[float(roc_auc_score(functional[s].cpu(), head[s].cpu())) for s in sides] for head in weight]


def dirichlet_energy(x: Tensor, edge_index: Tensor) -> float:
    """How much features x (N, C) differ along edges: Σ_{j→i} ‖x_i - x_j‖² / Σ_i ‖x_i‖², 0 when neighbours are
    equal (Rusch et al. 2023, A survey on oversmoothing in graph neural networks, eq. 3, here relative to the
    squared norm, so that layers of different scale can be compared)."""
    # A block of channels at a time: all of them at once would be an (E, C) tensor.
    differences = (block[edge_index[0]] - block[edge_index[1]] for block in x.double().split(64, dim=1))
    energy, scale = sum(float(each.square().sum()) for each in differences), float(x.double().square().sum())
    return energy / scale if scale else 0.0
