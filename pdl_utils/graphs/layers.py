"""Graph convolution and graph attention, from torch operations alone.

- `GCNConv`: Kipf & Welling, Semi-supervised classification with graph convolutional networks, 2017.
- `GATConv`: Veličković et al., SortedEdges attention networks, 2018.
- `GATv2Conv`: Brody et al., How attentive are graph attention networks?, 2022.

Parameters carry the names and shapes of torch_geometric's layers of the same names: `load_state_dict` takes
theirs, and outputs and gradients are the same. Every layer takes node features x (N, in_channels) and either
a `SortedEdges`, used as it is, or an edge_index (2, E): then features and edges are checked, and the edges sorted,
at every call. A `GraphNet` always checks its input for NaN, once for all of its layers.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdl_utils.graphs import edges as plain
from pdl_utils.graphs import fast_attention
from pdl_utils.graphs.edges import SortedEdges, check_features, edge_softmax


def as_graph(x: Tensor, edges: SortedEdges | Tensor, channels: int, self_loops: bool = True) -> SortedEdges:
    """`edges` as a `SortedEdges` over the rows of `x`; an edge_index is checked and so are the features.

    Raises:
        TypeError, ValueError: as `SortedEdges.from_edges` and `check_features`; or the graph has another number
            of nodes than `x`.
    """
    if not isinstance(edges, SortedEdges):
        check_features(x, channels)
        return SortedEdges.from_edges(edges, len(x), self_loops=self_loops)
    if x.shape != (edges.num_nodes, channels):
        raise ValueError(f"node features must have shape ({edges.num_nodes}, {channels}), not {tuple(x.shape)}")
    return edges


def attention_vector(heads: int, channels: int) -> nn.Parameter:
    """(1, heads, channels), drawn from Glorot's uniform distribution."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, channels)).unsqueeze(0))


def glorot_linear(in_channels: int, out_channels: int, bias: bool) -> nn.Linear:
    """A linear map with weights from Glorot's uniform distribution; its bias starts at zero."""
    linear = nn.Linear(in_channels, out_channels, bias=bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class GraphConv(nn.Module):
    """What the layers share: the choice of kernels, the residual and the bias.

    Args:
        in_channels, out_channels: features a node, before and after (a head).
        self_loops: give every node exactly one edge to itself, where an edge_index is passed.
        residual: add a linear map of the input.
        bias: add a learned constant.
        fast: use `fast_attention` where it applies.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *,
        self_loops: bool = True, residual: bool = False, bias: bool = True, fast: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.self_loops, self.fast = in_channels, self_loops, fast
        self.res = glorot_linear(in_channels, out_channels, bias=False) if residual else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def kernels(self, h: Tensor) -> ModuleType:
        """The module whose `weighted_sum` and `pair_scores` suit `h`."""
        return fast_attention if self.fast and fast_attention.applies_to(h) else plain

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the residual and the bias to `out` (N, out_channels)."""
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


class GCNConv(GraphConv):
    """x_i' = Σ_{j→i} (d_i d_j)^-½ W x_j, with d the number of incoming edges, self-loop included (eq. 2)."""

    def __init__(self, in_channels: int, out_channels: int, **options: bool) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.lin = glorot_linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor, edges: SortedEdges | Tensor) -> Tensor:
        graph = as_graph(x, edges, self.in_channels, self.self_loops)
        scale = graph.degree.to(x.dtype).pow(-0.5).masked_fill(graph.degree == 0, 0.0)
        weight = scale[graph.source] * scale[graph.target]  # (E,)
        h = self.lin(x).unsqueeze(1)  # (N, 1, C)
        out = self.kernels(h).weighted_sum(weight.unsqueeze(1).to(h.dtype), h, graph)
        return self.finish(out.squeeze(1), x)


class AttentionConv(GraphConv):
    """x_i' = ‖_heads Σ_{j→i} α_ij h_j with α_ij = softmax over the edges into i of e_ij; a subclass's
    `messages_and_scores` says what h and e are.

    Args:
        in_channels, out_channels: features a node before, and after in each head.
        heads: H.
        concat: put the heads side by side, H·C features out; otherwise their mean, C features.
        negative_slope: of the LeakyReLU in the scores.
        dropout: probability with which an edge's attention is dropped in training.
        options: `self_loops`, `residual`, `bias` and `fast` of `GraphConv`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, heads: int = 1, *, concat: bool = True,
        negative_slope: float = 0.2, dropout: float = 0.0, **options: bool,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels * (heads if concat else 1), **options)
        self.heads, self.out_channels, self.concat = heads, out_channels, concat
        self.negative_slope, self.dropout = negative_slope, dropout

    def split_heads(self, h: Tensor) -> Tensor:
        """(N, H·C) → (N, H, C)."""
        return h.view(len(h), self.heads, self.out_channels)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        """h (N, H, C) and e (E, H)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, edges: SortedEdges | Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, H·C), or (N, C) for the heads' mean. With `return_attention` also the edge_index (2, E) in the
        graph's order, self-loops included, and the attention (E, H) over it, before dropout."""
        graph = as_graph(x, edges, self.in_channels, self.self_loops)
        h, scores = self.messages_and_scores(x, graph)
        attention = edge_softmax(scores, graph)
        kept = F.dropout(attention, self.dropout, self.training).to(h.dtype)
        out = self.kernels(h).weighted_sum(kept, h, graph)
        out = self.finish(out.flatten(1) if self.concat else out.mean(1), x)
        return (out, (graph.edge_index, attention)) if return_attention else out


class GATConv(AttentionConv):
    """Attention as first published: e_ij = LeakyReLU(a_srcᵀ W x_j + a_dstᵀ W x_i) (Veličković et al., eq. 3)."""

    def __init__(self, in_channels: int, out_channels: int, heads: int = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, heads, **options)
        self.lin = glorot_linear(in_channels, heads * out_channels, bias=False)
        self.att_src, self.att_dst = (attention_vector(heads, out_channels) for _ in range(2))

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.split_heads(self.lin(x))
        from_source, from_target = (h * self.att_src).sum(-1), (h * self.att_dst).sum(-1)  # (N, H)
        pair = from_source.index_select(0, graph.source) + from_target.index_select(0, graph.target)
        return h, F.leaky_relu(pair, self.negative_slope)


class GATv2Conv(AttentionConv):
    """Dynamic attention: e_ij = aᵀ LeakyReLU(W_l x_j + W_r x_i) (Brody et al., eq. 7)."""

    def __init__(self, in_channels: int, out_channels: int, heads: int = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, heads, **options)
        width, bias = heads * out_channels, self.bias is not None
        self.lin_l, self.lin_r = (glorot_linear(in_channels, width, bias) for _ in range(2))
        self.att = attention_vector(heads, out_channels)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h, query = self.split_heads(self.lin_l(x)), self.split_heads(self.lin_r(x))
        kernels = self.kernels(h)
        return h, kernels.pair_scores(h, query, self.att.squeeze(0), self.negative_slope, graph)


class UniformConv(AttentionConv):
    """The control: as `GATConv`, with the attention held at 1 / (number of edges into the target)."""

    def __init__(self, in_channels: int, out_channels: int, heads: int = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, heads, **options)
        self.lin = glorot_linear(in_channels, heads * out_channels, bias=False)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.split_heads(self.lin(x))
        return h, h.new_zeros(len(graph.source), self.heads)


class Edgeless(nn.Linear):
    """The layer of an MLP: it sees no edges."""

    def forward(self, x: Tensor, graph: SortedEdges) -> Tensor:
        return super().forward(x)


ATTENTION = {"gat": GATConv, "gatv2": GATv2Conv, "uniform": UniformConv}


@dataclass
class Trace:
    """What a `GraphNet` computed on the way: `features`, its input and every layer's output after the
    activation; `attention`, (E, H) a layer, in the graph's order; empty where there is none."""

    features: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


class GraphNet(nn.Module):
    """A stack of layers of one kind with ELU between them, for multi-label node classification.

    Args:
        in_channels, num_labels: features and labels a node.
        conv: "gat", "gatv2", "uniform" (attention held uniform), "gcn" or "mlp" (no edges).
        hidden: channels a head in the layers before the last; "gcn" and "mlp" get heads·hidden.
        heads, out_heads: attention heads before the last layer (side by side) and in it (their mean).
        depth: number of layers.
        residual: a linear residual on every layer that has edges.
        dropout: probability of dropping an edge's attention.
        fast: use `fast_attention` where it applies.
    """

    def __init__(
        self, in_channels: int, num_labels: int, conv: str = "gatv2", *, hidden: int = 256, heads: int = 4,
        out_heads: int = 6, depth: int = 3, residual: bool = True, dropout: float = 0.0, fast: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if conv not in (*ATTENTION, "gcn", "mlp"):
            raise ValueError(f"conv={conv!r}: choose one of {', '.join([*ATTENTION, 'gcn', 'mlp'])}")
        if depth < 1:
            raise ValueError(f"depth={depth}: a network has at least one layer")
        self.in_channels = in_channels
        widths = [in_channels, *[heads * hidden] * (depth - 1), num_labels]
        options = {"residual": residual, "fast": fast}

        def layer(index: int) -> nn.Module:
            width, out, last = widths[index], widths[index + 1], index == depth - 1
            if conv == "mlp":
                return Edgeless(width, out)
            if conv == "gcn":
                return GCNConv(width, out, **options)
            channels, count = (out, out_heads) if last else (hidden, heads)
            return ATTENTION[conv](width, channels, count, concat=not last, dropout=dropout, **options)

        self.layers = nn.ModuleList(layer(index) for index in range(depth))

    def forward(
        self, x: Tensor, edges: SortedEdges | Tensor, *, return_trace: bool = False
    ) -> Tensor | tuple[Tensor, Trace]:
        """Logits (N, num_labels); a label is predicted where its logit is positive. With `return_trace`
        also what the layers computed on the way."""
        check_features(x, self.in_channels)
        graph = as_graph(x, edges, self.in_channels)
        trace = Trace([x])
        for index, layer in enumerate(self.layers):
            if return_trace and isinstance(layer, AttentionConv):
                x, (_, attention) = layer(x, graph, return_attention=True)
                trace.attention.append(attention)
            else:
                x = layer(x, graph)
            if index < len(self.layers) - 1:
                x = F.elu(x)
            trace.features.append(x)
        return (x, trace) if return_trace else x
