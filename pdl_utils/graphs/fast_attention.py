"""Graph attention for the CPU: `weighted_sum` and `pair_scores` of `graph`, without (E, H, C) tensors.

At 1024 channels the messages of two PPI graphs are half a gigabyte, and moving them, not the arithmetic,
is where the time goes. A weighted sum over incoming edges is a bag of weighted embeddings, for which torch
has a kernel that reads each row where it lies. GATv2's scores have no such kernel: they are computed one
head and one tile of edges at a time, in buffers that stay in the cache, and computed again for the
gradient instead of being kept.

Values and gradients equal the plain versions'. Second derivatives raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from pdl_utils.graphs.edges import SortedEdges

TILE = 2**18  # numbers in a tile: 1 MB of float32, about a core's second-level cache


def applies_to(h: Tensor) -> bool:
    """Can this module work on `h`? On the CPU, in single or double precision."""
    return h.device.type == "cpu" and h.dtype in (torch.float32, torch.float64)


def weighted_sum(weight: Tensor, h: Tensor, graph: SortedEdges) -> Tensor:
    """out_i = Σ_{j→i} weight_ij h_j: weight (E, H) and h (N, H, C) → (N, H, C)."""
    return _WeightedSum.apply(weight, h, graph)


def pair_scores(h: Tensor, query: Tensor, att: Tensor, negative_slope: float, graph: SortedEdges) -> Tensor:
    """e_ij = attᵀ LeakyReLU(h_j + query_i) for every edge j → i: h, query (N, H, C), att (H, C) → (E, H)."""
    return _PairScores.apply(h, query, att, negative_slope, graph)


def _bags(weight: Tensor, rows: Tensor, bag: Tensor, pointers: Tensor) -> Tensor:
    """Σ_k weight_k rows[bag_k] over k in pointers[i]..pointers[i+1]-1, for every i and head: weight (E, H) and
    rows (H, N, C) → (N, H, C)."""
    heads = [
        F.embedding_bag(bag, r, pointers, mode="sum", per_sample_weights=w, include_last_offset=True)
        for w, r in zip(weight.t().contiguous(), rows, strict=True)
    ]
    return torch.stack(heads, dim=1)


def _tiles(num_edges: int, channels: int) -> Iterator[slice]:
    step = max(1, TILE // max(1, channels))
    return (slice(start, min(start + step, num_edges)) for start in range(0, num_edges, step))


def _by_head(x: Tensor) -> Tensor:
    """(N, H, C) → contiguous (H, N, C), so that a head's rows are rows of a matrix."""
    return x.transpose(0, 1).contiguous()


class _WeightedSum(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, h: Tensor, graph: SortedEdges) -> Tensor:
        ctx.save_for_backward(weight, h)
        ctx.graph = graph
        return _bags(weight, _by_head(h), graph.source, graph.rowptr)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, h = ctx.saved_tensors
        graph: SortedEdges = ctx.graph
        grad = _by_head(grad)
        grad_weight = grad_h = None
        if ctx.needs_input_grad[0]:
            grad_weight = _edge_products(_by_head(h), grad, graph).t()
        if ctx.needs_input_grad[1]:
            order, pointers = graph.by_source
            grad_h = _bags(weight[order], grad, graph.target[order], pointers)
        return grad_weight, grad_h, None


def _edge_products(h: Tensor, grad: Tensor, graph: SortedEdges) -> Tensor:
    """⟨h_j, grad_i⟩ for every edge j → i: h, grad (H, N, C) → (H, E)."""
    heads, _, channels = h.shape
    product = h.new_empty(heads, len(graph.source))
    ones = h.new_ones(channels)
    for tile in _tiles(len(graph.source), channels):
        left, right = h.new_empty(2, tile.stop - tile.start, channels)
        for k in range(heads):
            torch.index_select(h[k], 0, graph.source[tile], out=left)
            torch.index_select(grad[k], 0, graph.target[tile], out=right)
            torch.mv(left.mul_(right), ones, out=product[k, tile])
    return product


class _PairScores(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, h: Tensor, query: Tensor, att: Tensor, negative_slope: float, graph: SortedEdges
    ) -> Tensor:
        h, query = _by_head(h), _by_head(query)
        ctx.save_for_backward(h, query, att)
        ctx.graph, ctx.negative_slope = graph, negative_slope
        scores = h.new_empty(len(h), len(graph.source))
        for k, tile, pair, _ in _pairs(h, query, graph):
            torch.mv(F.leaky_relu_(pair, negative_slope), att[k], out=scores[k, tile])
        return scores.t().contiguous()  # dropout draws in memory's order: the plain version's, then

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, query, att = ctx.saved_tensors
        graph: SortedEdges = ctx.graph
        grad = grad.t().contiguous()
        grad_h, grad_query, grad_att = (torch.zeros_like(x) for x in (h, query, att))
        for k, tile, pair, spare in _pairs(h, query, graph):
            g = grad[k, tile]
            slope = torch.ops.aten.leaky_relu_backward.grad_input(
                g.unsqueeze(1).expand_as(pair), pair, ctx.negative_slope, False, grad_input=spare
            )
            grad_query[k].index_add_(0, graph.target[tile], slope)
            grad_h[k].index_add_(0, graph.source[tile], slope)
            grad_att[k] += torch.mv(F.leaky_relu_(pair, ctx.negative_slope).t(), g)
        # Each row's gradient carries the factor att: it is cheaper over nodes than over edges.
        for rows in (grad_h, grad_query):
            rows.mul_(att.unsqueeze(1))
        return grad_h.transpose(0, 1), grad_query.transpose(0, 1), grad_att, None, None


def _pairs(h: Tensor, query: Tensor, graph: SortedEdges) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Head by head and tile by tile: the head, the tile, h_j + query_i of its edges, and a spare buffer of
    the same shape. Both are overwritten by the next tile."""
    heads, _, channels = h.shape
    for tile in _tiles(len(graph.source), channels):
        pair, spare = h.new_empty(2, tile.stop - tile.start, channels)
        for k in range(heads):
            torch.index_select(h[k], 0, graph.source[tile], out=pair)
            torch.index_select(query[k], 0, graph.target[tile], out=spare)
            yield k, tile, pair.add_(spare), spare
