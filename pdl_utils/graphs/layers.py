"""Graph convolution and graph attention, from torch operations alone.

- `GCNConv`: Kipf & Welling, Semi-supervised classification with graph convolutional networks, 2017.
- `GATConv`: Veličković et al., Graph attention networks, 2018.
- `GATv2Conv`: Brody et al., How attentive are graph attention networks?, 2022.

Parameters carry the names and shapes of torch_geometric's layers of the same names: `load_state_dict` takes
theirs, and outputs and gradients are the same. Every layer takes node features x (N, in_channels) and either
a `SortedEdges`, used as it is, or an edge_index (2, E), which is checked and sorted, with self-loops, at every
call. Under autocast only the linear maps are computed in lower precision; what follows has the dtype of x.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdl_utils.graphs.edges import SortedEdges, edge_softmax, pair_scores, weighted_sum


def as_sorted_edges(x: Tensor, edges: SortedEdges | Tensor) -> SortedEdges:
    """`edges` as `SortedEdges` between the rows of `x` (N, C).

    Raises:
        ValueError: they are edges between another number of nodes, or as `SortedEdges.from_edges`.
    """
    if not isinstance(edges, SortedEdges):
        return SortedEdges.from_edges(edges, len(x))
    if len(x) != edges.num_nodes:
        raise ValueError(f"features of {len(x)} nodes, but edges between {edges.num_nodes}")
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
    """What the layers share: the residual and the bias.

    Args:
        in_channels, out_channels: features a node, before and after (all heads together).
        residual: add a linear map of the input.
        bias: add a learned constant.
    """

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.res = glorot_linear(in_channels, out_channels, bias=False) if residual else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

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
        graph = as_sorted_edges(x, edges)
        scale = graph.degree.to(x.dtype).pow(-0.5).masked_fill(graph.degree == 0, 0.0)
        weight = scale[graph.source] * scale[graph.target]  # (E,)
        h = self.lin(x).to(x.dtype)
        out = weighted_sum(weight.unsqueeze(1), h.unsqueeze(1), graph)
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
        options: `residual` and `bias` of `GraphConv`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, heads: int = 1, *, concat: bool = True,
        negative_slope: float = 0.2, dropout: float = 0.0, **options: bool,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels * (heads if concat else 1), **options)
        self.heads, self.out_channels, self.concat = heads, out_channels, concat
        self.negative_slope, self.dropout = negative_slope, dropout

    def heads_of(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """The linear map of x, split: (N, in_channels) → (N, H, C)."""
        return linear(x).to(x.dtype).view(len(x), self.heads, self.out_channels)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        """h (N, H, C) and e (E, H)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, edges: SortedEdges | Tensor, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, H·C), or (N, C) for the heads' mean. With `return_attention` also the edge_index (2, E) in the
        sorted order, self-loops included, and the attention (E, H) over it, before dropout."""
        graph = as_sorted_edges(x, edges)
        h, scores = self.messages_and_scores(x, graph)
        attention = edge_softmax(scores, graph)
        out = weighted_sum(F.dropout(attention, self.dropout, self.training), h, graph)
        out = self.finish(out.flatten(1) if self.concat else out.mean(1), x)
        return (out, (graph.edge_index, attention)) if return_attention else out


class GATConv(AttentionConv):
    """Attention as first published: e_ij = LeakyReLU(a_srcᵀ W x_j + a_dstᵀ W x_i) (Veličković et al., eq. 3)."""

    def __init__(self, in_channels: int, out_channels: int, heads: int = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, heads, **options)
        self.lin = glorot_linear(in_channels, heads * out_channels, bias=False)
        self.att_src, self.att_dst = (attention_vector(heads, out_channels) for _ in range(2))

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.heads_of(self.lin, x)
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
        h, query = self.heads_of(self.lin_l, x), self.heads_of(self.lin_r, x)
        return h, pair_scores(h, query, self.att.squeeze(0), self.negative_slope, graph)


class UniformConv(AttentionConv):
    """The control: as `GATConv`, with the attention held at 1 / (number of edges into the target)."""

    def __init__(self, in_channels: int, out_channels: int, heads: int = 1, **options: Any) -> None:
        super().__init__(in_channels, out_channels, heads, **options)
        self.lin = glorot_linear(in_channels, heads * out_channels, bias=False)

    def messages_and_scores(self, x: Tensor, graph: SortedEdges) -> tuple[Tensor, Tensor]:
        h = self.heads_of(self.lin, x)
        return h, h.new_zeros(len(graph.source), self.heads)


class Edgeless(nn.Linear):
    """The layer of an MLP: it sees no edges."""

    def forward(self, x: Tensor, graph: SortedEdges) -> Tensor:
        return super().forward(x).to(x.dtype)


ATTENTION = {"gat": GATConv, "gatv2": GATv2Conv, "uniform": UniformConv}


@dataclass
class Trace:
    """What a `GraphNet` computed on the way: `features`, its input and every layer's output after the
    activation; `attention`, (E, H) a layer, in the order of the sorted edges; empty where there is none."""

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
    """

    def __init__(
        self, in_channels: int, num_labels: int, conv: str = "gatv2", *, hidden: int = 256, heads: int = 4,
        out_heads: int = 6, depth: int = 3, residual: bool = True, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if conv not in (*ATTENTION, "gcn", "mlp"):
            raise ValueError(f"conv={conv!r}: choose one of {', '.join([*ATTENTION, 'gcn', 'mlp'])}")
        if depth < 1:
            raise ValueError(f"depth={depth}: a network has at least one layer")
        self.in_channels = in_channels
        widths = [in_channels, *[heads * hidden] * (depth - 1), num_labels]

        def layer(index: int) -> nn.Module:
            width, out, last = widths[index], widths[index + 1], index == depth - 1
            if conv == "mlp":
                return Edgeless(width, out)
            if conv == "gcn":
                return GCNConv(width, out, residual=residual)
            channels, count = (out, out_heads) if last else (hidden, heads)
            options = {"concat": not last, "residual": residual, "dropout": dropout}
            return ATTENTION[conv](width, channels, count, **options)

        self.layers = nn.ModuleList(layer(index) for index in range(depth))

    def forward(
        self, x: Tensor, edges: SortedEdges | Tensor, *, return_trace: bool = False
    ) -> Tensor | tuple[Tensor, Trace]:
        """Logits (N, num_labels); a label is predicted where its logit is positive. With `return_trace`
        also what the layers computed on the way."""
        graph = as_sorted_edges(x, edges)
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
