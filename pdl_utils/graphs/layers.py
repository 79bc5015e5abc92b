"""Graph convolution (GCN: Kipf & Welling 2017) and graph attention (GAT: Veličković et al. 2018; GATv2: Brody et
al. 2022), from torch operations alone.

Every layer takes node features x, float (N, in_channels), and edge_index, integer (2, E), sources in its first row
and targets in its second, as torch_geometric's layers of the same names do. Parameters have their names and shapes
too: `load_state_dict` takes theirs, and outputs and gradients are the same.

Neither `WeightedSum` nor `PairScores` holds an (E, H, C) tensor, which for two PPI graphs at 1024 channels is half
a gigabyte: to move it takes longer than the arithmetic. Only where a gradient is to be differentiated again is one
made. Under autocast only linear maps are computed in lower precision; all else has the dtype of the weights.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

leaky_relu_backward = torch.ops.aten.leaky_relu_backward  # (gradient, input, slope, whether the input is a result)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class SortedEdges:
    """Edges sorted by target, as the layers need them: `GraphNet` sorts once for all of its layers.

    source, target: int64 (E,), `target` ascends. rowptr: int64 (N+1,); the edges into node i are rowptr[i] to
    rowptr[i+1]-1.
    """

    num_nodes: int
    source: Tensor
    target: Tensor
    rowptr: Tensor

    @property
    def degree(self) -> Tensor:
        """int64 (N,), the number of edges into each node."""
        return self.rowptr.diff()


def sort_edges(
    x: Tensor, edge_index: Tensor | SortedEdges, in_channels: int, self_loops: bool = True
) -> SortedEdges:
    """Check a layer's inputs and sort the edges. Those that stand there twice count twice; with `self_loops` every
    node gets exactly one edge to itself. ValueError names what does not fit."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or x.shape[1] != in_channels:
        raise ValueError(f"x must be a float tensor of shape (N, {in_channels}), not {described(x)}")
    if isinstance(edge_index, SortedEdges):
        return edge_index
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in INTEGERS or edge_index.shape[:-1] != (2,):
        raise ValueError(f"edge_index must be an integer tensor of shape (2, E), not {described(edge_index)}")
    if edge_index.numel() and not 0 <= edge_index.min() <= edge_index.max() < len(x):
        low, high = int(edge_index.min()), int(edge_index.max())
        raise ValueError(f"edge_index names nodes {low} to {high}, but x has rows for 0 to {len(x) - 1}")
    source, target = edge_index.long()
    if self_loops:
        kept, nodes = source != target, torch.arange(len(x), device=source.device)
        source, target = torch.cat([source[kept], nodes]), torch.cat([target[kept], nodes])
    order = torch.argsort(target * len(x) + source, stable=True)  # by source too: neighbours are read in order
    return SortedEdges(len(x), source[order], target[order], row_pointers(target, len(x)))


def described(value: Any) -> str:
    return f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def row_pointers(nodes: Tensor, num_nodes: int) -> Tensor:
    """Where the edges of each node begin, once they are sorted by node: int64 (N+1,)."""
    return F.pad(torch.bincount(nodes, minlength=num_nodes).cumsum(0), (1, 0))


def edge_softmax(scores: Tensor, graph: SortedEdges) -> Tensor:
    """Softmax over the edges into each target: scores (E, H) → attention (E, H), rows of a target sum to 1. Each
    target's own maximum is subtracted first: beside a global one whole neighbourhoods would underflow to 0/0."""
    index = graph.target.unsqueeze(1).expand_as(scores)
    shape = (graph.num_nodes, scores.shape[1])
    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weight = (scores - top.index_select(0, graph.target)).exp()
    total = weight.new_zeros(shape).index_add(0, graph.target, weight)
    return weight / total.index_select(0, graph.target)


class WeightedSum(torch.autograd.Function):
    """out_i = Σ_{j→i} weight_ij h_j: weight (E, H) and h (N, H, C) → (N, H, C)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, h: Tensor, graph: SortedEdges) -> Tensor:
        ctx.save_for_backward(weight, h)
        ctx.graph = graph
        return bags(weight, h, graph.source, graph.rowptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, h), graph = ctx.saved_tensors, ctx.graph
        source, target = graph.source, graph.target
        if torch.is_grad_enabled():  # create_graph=True
            grad_h = torch.zeros_like(h).index_add(0, source, weight.unsqueeze(2) * grad[target])
            return (h[source] * grad[target]).sum(2), grad_h, None
        grad_weight = grad_h = None
        if ctx.needs_input_grad[0]:  # (E, H): products of rows at the edges alone
            by_head = zip(grad.transpose(0, 1).contiguous(), h.transpose(0, 1).contiguous(), strict=True)
            grad_weight = torch.stack([products_at_edges(up, rows, graph) for up, rows in by_head], dim=1)
        if ctx.needs_input_grad[1]:  # the same sum, along edges turned around
            order = torch.argsort(source, stable=True)
            grad_h = bags(weight[order], grad, target[order], row_pointers(source, graph.num_nodes))
        return grad_weight, grad_h, None


def bags(weight: Tensor, h: Tensor, index: Tensor, rowptr: Tensor) -> Tensor:
    """Each node's sum is a bag of weighted embeddings, whose kernel reads each row of h where it lies."""
    heads = [
        F.embedding_bag(index, rows, rowptr, mode="sum", per_sample_weights=w, include_last_offset=True)
        for w, rows in zip(weight.t().contiguous(), h.transpose(0, 1).contiguous(), strict=True)
    ]
    return torch.stack(heads, dim=1)


def products_at_edges(a: Tensor, b: Tensor, graph: SortedEdges) -> Tensor:
    """a_target · b_source for every edge: a, b (N, C) → (E,)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        edges = graph.rowptr, graph.source, a.new_zeros(len(graph.source)), (len(a), len(b))
        matrix = torch.sparse_csr_tensor(*edges, check_invariants=False)
    return torch.sparse.sampled_addmm(matrix, a, b.t()).values()


class PairScores(torch.autograd.Function):
    """e_ij = attᵀ LeakyReLU(h_j + query_i) for every edge j → i: h, query (N, H, C), att (H, C) → (E, H). One head
    and one tile of edges at a time; what a tile holds is computed again for the gradient."""

    @staticmethod
    def tiles(h: Tensor, graph: SortedEdges, per_edge: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sources, targets and (tile,) of a tensor (E,): on a processor a tile of (tile, C) stays in its cache."""
        size = max(1, (2**17 if h.device.type == "cpu" else 2**26) // h.shape[2])
        return list(zip(graph.source.split(size), graph.target.split(size), per_edge.split(size), strict=True))

    @staticmethod
    def forward(ctx: Any, h: Tensor, query: Tensor, att: Tensor, slope: float, graph: SortedEdges) -> Tensor:
        ctx.save_for_backward(h, query, att)
        ctx.slope, ctx.graph = slope, graph
        scores = h.new_empty(h.shape[1], len(graph.source))
        by_head = (x.transpose(0, 1).contiguous() for x in (h, query))
        for one_h, one_query, one_att, out in zip(*by_head, att, scores, strict=True):
            for source, target, part in PairScores.tiles(h, graph, out):
                pair = one_h.index_select(0, source).add_(one_query.index_select(0, target))  # (tile, C)
                torch.mv(F.leaky_relu_(pair, slope), one_att, out=part)
        return scores.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (h, query, att), slope, graph = ctx.saved_tensors, ctx.slope, ctx.graph
        if torch.is_grad_enabled():  # create_graph=True
            pair, up = h[graph.source] + query[graph.target], grad.unsqueeze(2)  # (E, H, C), (E, H, 1)
            into_pair, zeros = leaky_relu_backward(up * att, pair, slope, False), torch.zeros_like(h)
            into_h, into_query = (zeros.index_add(0, ends, into_pair) for ends in (graph.source, graph.target))
            return into_h, into_query, (up * F.leaky_relu(pair, slope)).sum(0), None, None
        by_head = [x.transpose(0, 1).contiguous() for x in (h, query)]
        grads = [torch.zeros_like(x) for x in (*by_head, att)]
        for one_h, one_query, one_att, up, *into in zip(*by_head, att, grad.t().contiguous(), *grads, strict=True):
            for source, target, part in PairScores.tiles(h, graph, up):
                pair = one_h.index_select(0, source).add_(one_query.index_select(0, target))
                into_pair = leaky_relu_backward(torch.outer(part, one_att), pair, slope, False)
                into[0].index_add_(0, source, into_pair)
                into[1].index_add_(0, target, into_pair)
                into[2].addmv_(F.leaky_relu_(pair, slope).t(), part)
        return grads[0].transpose(0, 1), grads[1].transpose(0, 1), grads[2], None, None


def glorot_linear(in_channels: int, out_channels: int, bias: bool = False) -> nn.Linear:
    """A linear map with weights from Glorot's uniform distribution; its bias starts at zero."""
    linear = nn.Linear(in_channels, out_channels, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class GraphConv(nn.Module):
    """What the layers share: with `residual` a linear map of the input is added to the output, with `bias` a
    learned constant, and with `add_self_loops` every node has exactly one edge to itself."""

    def __init__(self, in_channels: int, width: int, residual: bool, bias: bool, add_self_loops: bool) -> None:
        super().__init__()
        self.in_channels, self.add_self_loops = in_channels, add_self_loops
        self.res = glorot_linear(in_channels, width) if residual else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        out = out if self.res is None else out + self.res(x)
        return out if self.bias is None else out + self.bias


class GCNConv(GraphConv):
    """x_i' = Σ_{j→i} (d_i d_j)^-½ W x_j, with d the number of incoming edges, self-loop included (eq. 2)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, residual: bool = False, bias: bool = True,
        add_self_loops: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, residual, bias, add_self_loops)
        self.lin = glorot_linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        graph = sort_edges(x, edge_index, self.in_channels, self.add_self_loops)
        h = self.lin(x).to(self.lin.weight.dtype)
        scale = graph.degree.to(h.dtype).pow(-0.5).masked_fill(graph.degree == 0, 0.0)
        weight = scale[graph.source] * scale[graph.target]  # (E,)
        return self.finish(WeightedSum.apply(weight.unsqueeze(1), h.unsqueeze(1), graph).squeeze(1), x)


class AttentionConv(GraphConv):
    """x_i' = ‖_heads Σ_{j→i} α_ij h_j with α_ij = softmax over the edges into i of e_ij. A subclass makes its
    parameters in `build`, and the messages h (N, H, C) and scores e (E, H) in `messages_and_scores`.

    `out_channels` is C; `concat` puts the heads side by side, H·C features, otherwise their mean is taken;
    `dropout` is the probability with which an edge's attention is dropped in training.
    """

    def __init__(
        self, in_channels: int, out_channels: int, heads: int = 1, *, concat: bool = True,
        negative_slope: float = 0.2, dropout: float = 0.0, residual: bool = False, bias: bool = True,
        add_self_loops: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels * (heads if concat else 1), residual, bias, add_self_loops)
        self.heads, self.out_channels, self.concat = heads, out_channels, concat
        self.negative_slope, self.dropout = negative_slope, dropout
        self.build(in_channels, heads * out_channels, bias)

    def attention_vector(self) -> nn.Parameter:
        return nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.heads, self.out_channels)).unsqueeze(0))

    def by_head(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return linear(x).to(linear.weight.dtype).view(len(x), self.heads, self.out_channels)

    def forward(
        self, x: Tensor, edge_index: Tensor, return_attention_weights: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """out (N, H·C or C), or (out, (edge_index, alpha)): the edges, self-loops included, in the layer's own
        order, and the attention (E, H) over them, before dropout."""
        graph = sort_edges(x, edge_index, self.in_channels, self.add_self_loops)
        h, scores = self.messages_and_scores(x, graph)
        alpha = edge_softmax(scores, graph)
        out = WeightedSum.apply(F.dropout(alpha, self.dropout, self.training), h, graph)
        out = self.finish(out.flatten(1) if self.concat else out.mean(1), x)
        return (out, (torch.stack([graph.source, graph.target]), alpha)) if return_attention_weights else out


class GATConv(AttentionConv):
    """Attention as first published: e_ij = LeakyReLU(a_srcᵀ W x_j + a_dstᵀ W x_i) (Veličković et al., eq. 3)."""

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        self.lin = glorot_linear(in_channels, width)
        self.att_src, self.att_dst = self.attention_vector(), self.attention_vector()

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.by_head(self.lin, x)
        from_source, from_target = (h * self.att_src).sum(-1), (h * self.att_dst).sum(-1)  # (N, H)
        pair = from_source.index_select(0, graph.source) + from_target.index_select(0, graph.target)
        return h, F.leaky_relu(pair, self.negative_slope)


class GATv2Conv(AttentionConv):
    """Dynamic attention: e_ij = aᵀ LeakyReLU(W_l x_j + W_r x_i) (Brody et al., eq. 7)."""

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        self.lin_l, self.lin_r = glorot_linear(in_channels, width, bias), glorot_linear(in_channels, width, bias)
        self.att = self.attention_vector()

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h, query = self.by_head(self.lin_l, x), self.by_head(self.lin_r, x)
        return h, PairScores.apply(h, query, self.att.squeeze(0), self.negative_slope, graph)


class UniformConv(AttentionConv):
    """The control: as `GATConv`, with the attention held at 1 / (number of edges into the target)."""

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        self.lin = glorot_linear(in_channels, width)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.by_head(self.lin, x)
        return h, h.new_zeros(len(graph.source), self.heads)


ATTENTION = {"gat": GATConv, "gatv2": GATv2Conv, "uniform": UniformConv}


class GraphNet(nn.Module):
    """Layers of one kind with ELU between them, for multi-label node classification.

    conv: "gat", "gatv2", "uniform" (attention held uniform), "gcn" or "mlp" (no edges). `heads` of `hidden`
    channels side by side before the last layer (heads·hidden channels for "gcn" and "mlp"), the mean of
    `out_heads` in it. `residual` adds a linear map of its input to every layer that has edges.
    """

    def __init__(
        self, in_channels: int, num_labels: int, conv: str = "gatv2", *, hidden: int = 256, heads: int = 4,
        out_heads: int = 6, depth: int = 3, residual: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if conv not in (*ATTENTION, "gcn", "mlp"):
            raise ValueError(f"conv={conv!r}: choose one of {', '.join([*ATTENTION, 'gcn', 'mlp'])}")
        if min(hidden, heads, out_heads, depth) < 1:
            raise ValueError(f"{hidden=}, {heads=}, {out_heads=}, {depth=}: each must be at least 1")
        self.in_channels = in_channels
        widths = [in_channels, *[heads * hidden] * (depth - 1), num_labels]

        def layer(index: int) -> nn.Module:
            width, out, last = widths[index], widths[index + 1], index == depth - 1
            if conv == "mlp":
                return nn.Linear(width, out)
            if conv == "gcn":
                return GCNConv(width, out, residual=residual)
            channels, count = (out, out_heads) if last else (hidden, heads)
            return ATTENTION[conv](width, channels, count, concat=not last, residual=residual, dropout=dropout)

        self.layers = nn.ModuleList(layer(index) for index in range(depth))

    def forward(
        self, x: Tensor, edge_index: Tensor, return_attention_weights: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        """Logits (N, num_labels); a label is predicted where its logit is positive. On request (logits,
        (edge_index, alphas)) with the attention (E, H) of every layer that has it."""
        graph, alphas = sort_edges(x, edge_index, self.in_channels), []
        for index, layer in enumerate(self.layers):
            x = x if index == 0 else F.elu(x)
            if isinstance(layer, nn.Linear):
                x = layer(x).to(layer.weight.dtype)
            elif return_attention_weights and isinstance(layer, AttentionConv):
                x, (_, alpha) = layer(x, graph, return_attention_weights=True)
                alphas.append(alpha)
            else:
                x = layer(x, graph)
        return (x, (torch.stack([graph.source, graph.target]), alphas)) if return_attention_weights else x
