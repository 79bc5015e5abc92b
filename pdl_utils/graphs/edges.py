"""The edges of a batch, sorted once, and the three operations that graph attention is made of.

None of the three holds an (E, H, C) tensor, which for two PPI graphs at 1024 channels is half a gigabyte: to move
it takes longer than the arithmetic.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, eq=False)
class SortedEdges:
    """Directed edges sorted by target. Build it with `from_edges`, once a batch; every layer and every epoch
    reuses it.

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
            ValueError: the shape is not (2, E), there are no integers in it, or a node id lies outside 0..N-1.
        """
        if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.is_floating_point():
            shape = tuple(edge_index.shape)
            raise ValueError(f"edge_index must hold integers of shape (2, E), not {edge_index.dtype} of {shape}")
        if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
            low, high = (int(end) for end in edge_index.aminmax())
            raise ValueError(f"edge_index names nodes {low} to {high}, but there are only 0 to {num_nodes - 1}")
        source, target = edge_index.long()
        origin = torch.arange(len(source), device=source.device)
        if self_loops:
            kept = (source != target).nonzero().squeeze(1)
            nodes = torch.arange(num_nodes, device=source.device)
            source, target = torch.cat([source[kept], nodes]), torch.cat([target[kept], nodes])
            origin = torch.cat([kept, torch.full_like(nodes, -1)])
        # Sources ascend among the edges into a node too: neighbours in memory are read together.
        order = torch.argsort(target * num_nodes + source, stable=True)
        rowptr = F.pad(torch.bincount(target, minlength=num_nodes).cumsum(0), (1, 0))
        return cls(num_nodes, source[order], target[order], rowptr, origin[order])

    @property
    def edge_index(self) -> Tensor:
        """int64 (2, E), in the sorted order."""
        return torch.stack([self.source, self.target])

    @cached_property
    def degree(self) -> Tensor:
        """int64 (N,), the number of edges into each node."""
        return self.rowptr.diff()


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
    """out_i = Σ_{j→i} weight_ij h_j: weight (E, H) and h (N, H, C) → (N, H, C).

    This is a bag of weighted embeddings: the bag of node i holds its sources. torch's kernel for it reads each
    row of h where it lies, in the gradient too.
    """
    heads = [
        F.embedding_bag(
            graph.source, rows, graph.rowptr, mode="sum", per_sample_weights=w, include_last_offset=True
        )
        for w, rows in zip(weight.t().contiguous(), h.transpose(0, 1).contiguous(), strict=True)
    ]
    return torch.stack(heads, dim=1)


def pair_scores(h: Tensor, query: Tensor, att: Tensor, negative_slope: float, graph: SortedEdges) -> Tensor:
    """e_ij = attᵀ LeakyReLU(h_j + query_i) for every edge j → i: h, query (N, H, C), att (H, C) → (E, H).

    One head and a tile of edges at a time. Each tile is computed again for the gradient instead of being kept, so
    that the memory needed is that of one tile: 8 MB in float32 on a CPU, which is soon reused, more on a GPU.
    """

    def tile_scores(h: Tensor, query: Tensor, att: Tensor, source: Tensor, target: Tensor) -> Tensor:
        pair = h.index_select(0, source) + query.index_select(0, target)  # (tile, C)
        with torch.autocast(h.device.type, enabled=False):  # it would round the factors of the product
            return F.leaky_relu(pair, negative_slope) @ att

    size = max(1, (2**21 if h.device.type == "cpu" else 2**26) // h.shape[2])
    tiles = list(zip(graph.source.split(size), graph.target.split(size), strict=True))
    by_head = (x.transpose(0, 1).contiguous() for x in (h, query))
    heads = []
    for head in zip(*by_head, att, strict=True):
        scores = [checkpoint(tile_scores, *head, *tile, use_reentrant=False) for tile in tiles]
        heads.append(torch.cat(scores))
    return torch.stack(heads, dim=1)
