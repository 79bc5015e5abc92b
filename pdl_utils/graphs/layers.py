"""Graph convolution (GCN: Kipf & Welling 2017) and graph attention (GAT: Veličković et al. 2018; GATv2: Brody et
al. 2022), from torch operations alone. Parameters, outputs and gradients are those of torch_geometric's layers.
Tensors (E, H, C), half a gigabyte for two PPI graphs at 1024 channels, are avoided: to move one takes longer than
the arithmetic. Shapes: N nodes, E edges, H heads, C channels a head."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
leaky_relu_backward = torch.ops.aten.leaky_relu_backward  # (gradient, input, slope, whether the input is a result)


class SortedEdges(NamedTuple):
    """Edges sorted by target: source, target int64 (E,); those into node i are rowptr[i] to rowptr[i+1]-1."""

    source: Tensor
    target: Tensor
    rowptr: Tensor  # int64 (N+1,)


def sort_edges(x: Tensor, edge_index: Tensor | SortedEdges, in_channels: int, self_loops: bool) -> SortedEdges:
    """Check a layer's inputs and sort the edges. Those that stand there twice count twice; with `self_loops` every
    node gets exactly one edge to itself. ValueError names what does not fit."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or x.shape[1] != in_channels:
        raise ValueError(f"x must be a float tensor of shape (N, {in_channels}), not {described(x)}")
    if isinstance(edge_index, SortedEdges):  # by `GraphNet`, once for all of its layers
        return edge_index
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in INTEGERS or edge_index.shape[:-1] != (2,):
        raise ValueError(f"edge_index must be an integer tensor of shape (2, E), not {described(edge_index)}")
    source, target = edges = edge_index.long()  # beside int8, a larger number of nodes would overflow
    if edges.numel() and not 0 <= edges.min() <= edges.max() < len(x):
        raise ValueError(f"edge_index names nodes {edges.min()} to {edges.max()}; x has {len(x)} rows")
    if self_loops:
        kept, nodes = source != target, torch.arange(len(x), device=source.device)
        source, target = torch.cat([source[kept], nodes]), torch.cat([target[kept], nodes])
    return by_target(source, target, len(x))[0]


def described(value: Any) -> str:
    return f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def by_target(source: Tensor, target: Tensor, num_nodes: int) -> tuple[SortedEdges, Tensor]:
    """Edges sorted by target, then by source, so that neighbours are read in order; and that order (E,)."""
    order = torch.argsort(target * num_nodes + source, stable=True)
    rowptr = F.pad(torch.bincount(target, minlength=num_nodes).cumsum(0), (1, 0))
    return SortedEdges(source[order], target[order], rowptr), order


def edge_softmax(scores: Tensor, graph: SortedEdges) -> Tensor:
    """Softmax over the edges into each target: scores (E, H) → attention (E, H), rows of a target sum to 1. Each
    target's own maximum is subtracted first: beside a global one whole neighbourhoods would underflow to 0/0."""
    index = graph.target.unsqueeze(1).expand_as(scores)
    shape = (len(graph.rowptr) - 1, scores.shape[1])
    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weight = (scores - top.index_select(0, graph.target)).exp()
    total = weight.new_zeros(shape).index_add(0, graph.target, weight)
    return weight / total.index_select(0, graph.target)


class WeightedSum(torch.autograd.Function):
    """out_i = Σ_{j→i} weight_ij h_j: weight (E, H) and h (H, N, C) → (H, N, C). A node's sum is a bag of weighted
    embeddings, whose kernel reads each row of h where it lies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, h: Tensor, graph: SortedEdges) -> Tensor:
        ctx.save_for_backward(weight, h)
        ctx.graph = graph
        how = {"offsets": graph.rowptr, "mode": "sum", "include_last_offset": True}
        heads = zip(h, weight.t().contiguous(), strict=True)
        return torch.stack([F.embedding_bag(graph.source, x, per_sample_weights=w, **how) for x, w in heads])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight, h), graph, grad = ctx.saved_tensors, ctx.graph, grad.contiguous()
        turned, order = by_target(graph.target, graph.source, h.shape[1])  # gradients go from target to source
        grad_weight = edge_products(grad, h, graph) if ctx.needs_input_grad[0] else None
        return grad_weight, WeightedSum.apply(weight[order], grad, turned), None


def edge_products(a: Tensor, b: Tensor, graph: SortedEdges) -> Tensor:
    """a_i · b_j for every edge j → i: a, b (H, N, C) → (E, H)."""
    # No sparse matrix can hold so many repeated edges, or half precision.
    if len(graph.source) > a.shape[1] ** 2 or a.element_size() < 4:
        return (a[:, graph.target] * b[:, graph.source]).sum(2).t()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        parts = graph.rowptr, graph.source, a.new_zeros(len(graph.source)), (a.shape[1], a.shape[1])
        edges = torch.sparse_csr_tensor(*parts, check_invariants=False)
    products = [torch.sparse.sampled_addmm(edges, x, y.t()).values() for x, y in zip(a, b, strict=True)]
    return torch.stack(products, dim=1)


class PairScores(torch.autograd.Function):
    """e_ij = attᵀ LeakyReLU(h_j + query_i) for every edge j → i: h, query (H, N, C), att (H, C) → (E, H). One head
    and one tile of edges at a time; what a tile holds is computed again for the gradient."""

    @staticmethod
    def tiles(h: Tensor, query: Tensor, graph: SortedEdges, per_edge: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of one head: sources, targets, part of a tensor (E,), and h_j + query_i (tile, C), kept in cache."""
        size = max(1, (2**17 if h.device.type == "cpu" else 2**26) // h.shape[1])
        parts = (x.split(size) for x in (graph.source, graph.target, per_edge))
        for source, target, part in zip(*parts, strict=True):
            yield source, target, part, h.index_select(0, source).add_(query.index_select(0, target))

    @staticmethod
    def forward(ctx: Any, h: Tensor, query: Tensor, att: Tensor, slope: float, graph: SortedEdges) -> Tensor:
        ctx.save_for_backward(h, query, att)
        ctx.slope, ctx.graph = slope, graph
        scores = h.new_empty(len(h), len(graph.source))
        for one_h, one_query, one_att, out in zip(h, query, att, scores, strict=True):
            for _, _, part, pair in PairScores.tiles(one_h, one_query, graph, out):
                torch.mv(F.leaky_relu_(pair, slope), one_att, out=part)
        return scores.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads = zip(*ctx.saved_tensors, grad.t().contiguous(), strict=True)
        slope, into_att, grads = ctx.slope, torch.zeros_like(ctx.saved_tensors[2]), []
        for head, (h, query, att, up) in enumerate(heads):
            into_h, into_query = torch.zeros_like(h), torch.zeros_like(query)
            for source, target, part, pair in PairScores.tiles(h, query, ctx.graph, up):
                into_pair = leaky_relu_backward(torch.outer(part, att), pair, slope, False)
                into_h.index_add_(0, source, into_pair)
                into_query.index_add_(0, target, into_pair)
                into_att[head].addmv_(F.leaky_relu(pair, slope).t(), part)  # double backward needs `pair` as it is
            grads.append((into_h, into_query))
        return *(torch.stack(each) for each in zip(*grads, strict=True)), into_att, None, None


def glorot_linear(in_channels: int, out_channels: int, bias: bool = False) -> nn.Linear:
    """A linear map with weights from Glorot's uniform distribution; its bias starts at zero."""
    linear = nn.Linear(in_channels, out_channels, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class GraphConv(nn.Module):
    """x_i' = ‖_heads Σ_{j→i} α_ij h_j, where a subclass gives messages h (H, N, C) and weights α (E, H).

    `out_channels` is C. `concat` puts the heads side by side, H·C features; otherwise their mean is taken.
    `dropout` is the probability with which an α is dropped in training. `residual` adds a linear map of x, `bias`
    a learned constant. With `add_self_loops` every node has exactly one edge to itself."""

    def __init__(
        self, in_channels: int, out_channels: int, heads: int = 1, *, concat: bool = True,
        negative_slope: float = 0.2, dropout: float = 0.0, residual: bool = False, bias: bool = True,
        add_self_loops: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.heads, self.concat = in_channels, out_channels, heads, concat
        self.negative_slope, self.dropout, self.add_self_loops = negative_slope, dropout, add_self_loops
        width = heads * out_channels if concat else out_channels
        self.res = glorot_linear(in_channels, width) if residual else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.build(in_channels, heads * out_channels, bias)

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        self.lin = glorot_linear(in_channels, width)

    def attention_vector(self) -> nn.Parameter:
        return nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.heads, self.out_channels)).unsqueeze(0))

    def by_head(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """W x as (H, N, C), in the dtype of the weights: only linear maps are in autocast's lower precision."""
        h = linear(x).to(next(self.parameters()).dtype).view(len(x), self.heads, self.out_channels)
        return h.transpose(0, 1).contiguous()

    def forward(self, x: Tensor, edge_index: Tensor, *, return_attention_weights: bool = False) -> Tensor | tuple:
        """x float (N, in_channels), edge_index integer (2, E), sources first → out (N, H·C or C), or on request
        (out, (edge_index, alpha)): the layer's edges in its order, self-loops included, and α before dropout."""
        graph = sort_edges(x, edge_index, self.in_channels, self.add_self_loops)
        h, alpha = self.messages_and_weights(x, graph)
        out = WeightedSum.apply(F.dropout(alpha, self.dropout, self.training), h, graph)
        out = out.transpose(0, 1).flatten(1) if self.concat else out.mean(0)
        out = out if self.res is None else out + self.res(x)
        out = out if self.bias is None else out + self.bias
        return (out, (torch.stack(graph[:2]), alpha)) if return_attention_weights else out


class GCNConv(GraphConv):
    """α_ij = (d_i d_j)^-½, with d the number of incoming edges, self-loop included (Kipf & Welling, eq. 2)."""

    def messages_and_weights(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h, degree = self.by_head(self.lin, x), graph.rowptr.diff()
        scale = degree.to(h.dtype).pow(-0.5).masked_fill(degree == 0, 0.0)
        return h, (scale[graph.source] * scale[graph.target]).unsqueeze(1).expand(-1, self.heads)


class GATConv(GraphConv):
    """α_ij = softmax over the edges into i of LeakyReLU(a_srcᵀ W x_j + a_dstᵀ W x_i) (Veličković, eq. 3)."""

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        super().build(in_channels, width, bias)
        self.att_src, self.att_dst = self.attention_vector(), self.attention_vector()

    def messages_and_weights(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.by_head(self.lin, x)
        both = ((h * att.transpose(0, 1)).sum(2).t().contiguous() for att in (self.att_src, self.att_dst))
        from_source, from_target = both  # (N, H)
        pair = from_source.index_select(0, graph.source) + from_target.index_select(0, graph.target)
        return h, edge_softmax(F.leaky_relu(pair, self.negative_slope), graph)


class GATv2Conv(GraphConv):
    """α_ij = softmax over the edges into i of aᵀ LeakyReLU(W_l x_j + W_r x_i) (Brody et al., eq. 7)."""

    def build(self, in_channels: int, width: int, bias: bool) -> None:
        self.lin_l, self.lin_r = glorot_linear(in_channels, width, bias), glorot_linear(in_channels, width, bias)
        self.att = self.attention_vector()

    def messages_and_weights(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h, query = self.by_head(self.lin_l, x), self.by_head(self.lin_r, x)
        return h, edge_softmax(PairScores.apply(h, query, self.att.squeeze(0), self.negative_slope, graph), graph)


class UniformConv(GraphConv):
    """The control: as `GATConv`, with the attention held at 1 / (number of edges into the target)."""

    def messages_and_weights(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.by_head(self.lin, x)
        return h, edge_softmax(h.new_zeros(len(graph.source), self.heads), graph)


KINDS = {"gat": GATConv, "gatv2": GATv2Conv, "uniform": UniformConv, "gcn": GCNConv, "mlp": nn.Linear}


class GraphNet(nn.Module):
    """Layers of one kind with ELU between them, for multi-label node classification. `conv` is "gat", "gatv2",
    "uniform" (attention held uniform), "gcn" or "mlp" (no edges). `heads` of `hidden` channels side by side before
    the last layer (heads·hidden channels for "gcn" and "mlp"), the mean of `out_heads` in it. `residual` adds a
    linear map of its input to every layer that has edges."""

    def __init__(
        self, in_channels: int, num_labels: int, conv: str = "gatv2", *, hidden: int = 256, heads: int = 4,
        out_heads: int = 6, depth: int = 3, residual: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if conv not in KINDS:
            raise ValueError(f"conv={conv!r}: choose one of {', '.join(KINDS)}")
        if min(hidden, heads, out_heads, depth) < 1:
            raise ValueError(f"{hidden=}, {heads=}, {out_heads=}, {depth=}: each must be at least 1")
        if conv == "gcn":  # one head, as wide as the others' heads together
            hidden, heads, out_heads = heads * hidden, 1, 1
        self.in_channels, self.layers = in_channels, nn.ModuleList()
        widths = [in_channels, *[heads * hidden] * (depth - 1), num_labels]
        for index in range(depth):
            width, out, last = widths[index], widths[index + 1], index == depth - 1
            size = (num_labels, out_heads) if last else (hidden, heads)
            options = {"concat": not last, "residual": residual, "dropout": dropout}
            self.layers.append(nn.Linear(width, out) if conv == "mlp" else KINDS[conv](width, *size, **options))

    def forward(self, x: Tensor, edge_index: Tensor, *, return_attention_weights: bool = False) -> Tensor | tuple:
        """Logits (N, num_labels); a label is predicted where its logit is positive. On request (logits,
        (edge_index, alphas)) with the weights (E, H) of every layer that has edges."""
        graph, alphas = sort_edges(x, edge_index, self.in_channels, self_loops=True), []
        for index, layer in enumerate(self.layers):
            x = F.elu(x) if index else x
            if isinstance(layer, GraphConv):
                x, (_, alpha) = layer(x, graph, return_attention_weights=True)
                alphas.append(alpha)
            else:
                x = layer(x).to(next(layer.parameters()).dtype)
        return (x, (torch.stack(graph[:2]), alphas)) if return_attention_weights else x
