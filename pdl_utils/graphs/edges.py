"""The edges of a batch, checked and sorted once, and the three operations that graph attention is made of.

These are the plain versions, any device and dtype; `fast_attention` holds the same `weighted_sum` and
`pair_scores` for the CPU.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SortedEdges:
    """Directed edges sorted by target (compressed rows). Build it with `from_edges`, once a batch; every
    layer and every epoch reuses it.

    Attributes:
        num_nodes: N; node ids are 0..N-1.
        source, target: int64 (E,); messages flow source → target; `target` ascends.
        rowptr: int64 (N+1,); the edges into node i are rowptr[i]..rowptr[i+1]-1.
        origin: int64 (E,); each edge's column in the given `edge_index`, -1 for an added self-loop.
    """

    num_nodes: int
    source: Tensor
    target: Tensor
    rowptr: Tensor
    origin: Tensor

    @classmethod
    def from_edges(cls, edge_index: Tensor, num_nodes: int, *, self_loops: bool = True) -> SortedEdges:
        """Check and sort `edge_index`, integer (2, E), row 0 the sources and row 1 the targets.

        Duplicate edges stay, and count as often as they stand there. With `self_loops` every node gets
        exactly one edge to itself, whatever loops were there before.

        Raises:
            TypeError: `edge_index` is not a tensor of integers.
            ValueError: its shape is not (2, E), or a node id lies outside 0..N-1.
        """
        _check_edges(edge_index, num_nodes)
        source, target = edge_index.long()
        origin = torch.arange(len(source), device=source.device)
        if self_loops:
            kept = (source != target).nonzero().squeeze(1)
            nodes = torch.arange(num_nodes, device=source.device)
            source, target = torch.cat([source[kept], nodes]), torch.cat([target[kept], nodes])
            origin = torch.cat([kept, torch.full_like(nodes, -1)])
        # Sources ascend within a row too: neighbours in memory are read together.
        order = torch.argsort(target * num_nodes + source, stable=True)
        target = target[order]
        return cls(num_nodes, source[order], target, _row_pointers(target, num_nodes), origin[order])

    @property
    def edge_index(self) -> Tensor:
        """int64 (2, E), in this graph's order."""
        return torch.stack([self.source, self.target])

    @cached_property
    def degree(self) -> Tensor:
        """int64 (N,), the number of edges into each node."""
        return self.rowptr.diff()

    @cached_property
    def by_source(self) -> tuple[Tensor, Tensor]:
        """The same edges sorted by source: their positions in this graph (E,), and row pointers (N+1,)."""
        order = torch.argsort(self.source, stable=True)
        return order, _row_pointers(self.source, self.num_nodes)


def _row_pointers(nodes: Tensor, num_nodes: int) -> Tensor:
    return F.pad(torch.bincount(nodes, minlength=num_nodes).cumsum(0), (1, 0))


def _check_edges(edge_index: Tensor, num_nodes: int) -> None:
    if not isinstance(edge_index, Tensor):
        raise TypeError(f"edge_index must be a tensor of integers, not {type(edge_index).__name__}")
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        raise TypeError(f"edge_index must hold integers, not {edge_index.dtype}")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        hint = "; transpose it" if edge_index.ndim == 2 and edge_index.shape[1] == 2 else ""
        raise ValueError(f"edge_index must have shape (2, E), not {tuple(edge_index.shape)}{hint}")
    if edge_index.numel():
        low, high = (int(end) for end in edge_index.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"edge_index names node {low if low < 0 else high}, but there are {num_nodes} nodes, "
                "numbered from 0"
            )


def check_features(x: Tensor, channels: int) -> None:
    """Are these node features, float (N, channels) and finite?

    Raises:
        TypeError: `x` is not a tensor of real floating-point numbers.
        ValueError: `x` has another shape, or holds NaN or infinity; the message names the first such node.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"node features must be floating-point numbers, not {kind}")
    if x.ndim != 2 or x.shape[1] != channels:
        raise ValueError(f"node features must have shape (N, {channels}), not {tuple(x.shape)}")
    finite = x.detach().isfinite().all(dim=1)
    if not finite.all():
        node = int((~finite).nonzero()[0])
        raise ValueError(f"the features of node {node} hold NaN or infinity ({int((~finite).sum())} such nodes)")


def edge_softmax(scores: Tensor, graph: SortedEdges) -> Tensor:
    """Softmax over the edges into each target: scores (E, H) → attention (E, H), rows of a target sum to 1.

    Each target's own maximum is subtracted first. A global one would underflow whole neighbourhoods
    whose scores lie far below the largest in the batch, and divide 0 by 0.
    """
    index = graph.target.unsqueeze(1).expand_as(scores)
    shape = (graph.num_nodes, scores.shape[1])
    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weight = (scores - top.index_select(0, graph.target)).exp()
    total = weight.new_zeros(shape).index_add(0, graph.target, weight)
    return weight / total.index_select(0, graph.target)


def weighted_sum(weight: Tensor, h: Tensor, graph: SortedEdges) -> Tensor:
    """out_i = Σ_{j→i} weight_ij h_j: weight (E, H) and h (N, H, C) → (N, H, C)."""
    messages = weight.unsqueeze(-1) * h.index_select(0, graph.source)
    return torch.zeros_like(h).index_add(0, graph.target, messages)


def pair_scores(h: Tensor, query: Tensor, att: Tensor, negative_slope: float, graph: SortedEdges) -> Tensor:
    """e_ij = attᵀ LeakyReLU(h_j + query_i) for every edge j → i: h, query (N, H, C), att (H, C) → (E, H)."""
    pair = h.index_select(0, graph.source) + query.index_select(0, graph.target)
    return (F.leaky_relu(pair, negative_slope) * att).sum(-1)
