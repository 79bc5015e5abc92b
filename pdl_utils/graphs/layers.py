"""Graph convolution (GCN: Kipf & Welling 2017) and graph attention (GAT: Veličković et al. 2018; GATv2: Brody et
al. 2022), from torch operations alone.

The layers are made of three operations over sorted edges: `edge_softmax`, `weighted_sum` and `pair_scores`. None
of the three holds an (E, H, C) tensor, which for two PPI graphs at 1024 channels is half a gigabyte: to move it
takes longer than the arithmetic.

Parameters carry the names and shapes of torch_geometric's layers of the same names: `load_state_dict` takes
theirs, and outputs and gradients are the same. Every layer takes node features x (N, in_channels) and either
a `SortedEdges`, used as it is, or an edge_index (2, E), which is checked and sorted, with self-loops, at every
call. Under autocast only the linear maps are computed in lower precision; what follows has the dtype of x.

Shapes: N nodes, E edges, H heads, C channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, eq=False)
class SortedEdges:
    """Directed edges sorted by target. Build it with `from_edges`, once a batch; every layer and epoch reuses it.

    Attributes:
        num_nodes: N; node ids are 0..N-1.
        source, target: int64 (E,); messages flow source → target; `target` ascends.
        rowptr: int64 (N+1,); the edges into node i are rowptr[i]..rowptr[i+1]-1.
    """

    num_nodes: int
    source: Tensor
    target: Tensor
    rowptr: Tensor

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
        low, high = (int(end) for end in edge_index.aminmax()) if edge_index.numel() else (0, -1)
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index names nodes {low} to {high}, but there are only 0 to {num_nodes - 1}")
        source, target = edge_index.long()
        if self_loops:
            kept, nodes = source != target, torch.arange(num_nodes, device=source.device)
            source, target = torch.cat([source[kept], nodes]), torch.cat([target[kept], nodes])
        # Sources ascend among the edges into a node too: neighbours in memory are read together.
        order = torch.argsort(target * num_nodes + source, stable=True)
        rowptr = F.pad(torch.bincount(target, minlength=num_nodes).cumsum(0), (1, 0))
        return cls(num_nodes, source[order], target[order], rowptr)

    @property
    def edge_index(self) -> Tensor:
        """int64 (2, E), in the sorted order."""
        return torch.stack([self.source, self.target])

    @property
    def degree(self) -> Tensor:
        """int64 (N,), the number of edges into each node."""
        return self.rowptr.diff()


def as_sorted_edges(x: Tensor, edges: SortedEdges | Tensor) -> SortedEdges:
    """`edges` as `SortedEdges` between the rows of x (N, C); ValueError if they are not between these."""
    if not isinstance(edges, SortedEdges):
        return SortedEdges.from_edges(edges, len(x))
    if len(x) != edges.num_nodes:
        raise ValueError(f"features of {len(x)} nodes, but edges between {edges.num_nodes}")
    return edges


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
    options = {"mode": "sum", "include_last_offset": True}
    heads = [
        F.embedding_bag(graph.source, rows, graph.rowptr, per_sample_weights=w, **options)
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
    """What the layers share: with `residual` a linear map of the input is added to the output, with `bias` a
    learned constant. `out_channels` counts all heads together."""

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.res = glorot_linear(in_channels, out_channels, bias=False) if residual else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Add the residual and the bias to `out` (N, out_channels)."""
        out = out if self.res is None else out + self.res(x)
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
    """x_i' = ‖_heads Σ_{j→i} α_ij h_j with α_ij = softmax over the edges into i of e_ij. The messages h (N, H, C)
    and the scores e (E, H) come from `messages_and_scores(x, graph)` of the subclass.

    Args:
        in_channels, out_channels, heads: features a node before, and after in each of the H heads.
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


ATTENTION = {"gat": GATConv, "gatv2": GATv2Conv, "uniform": UniformConv}


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
        self.in_channels = in_channels
        widths = [in_channels, *[heads * hidden] * (depth - 1), num_labels]

        def layer(index: int) -> nn.Module:
            width, out, last = widths[index], widths[index + 1], index == depth - 1
            if conv == "mlp":
                return nn.Linear(width, out)
            if conv == "gcn":
                return GCNConv(width, out, residual=residual)
            channels, count = (out, out_heads) if last else (hidden, heads)
            options = {"concat": not last, "residual": residual, "dropout": dropout}
            return ATTENTION[conv](width, channels, count, **options)

        self.layers = nn.ModuleList(layer(index) for index in range(depth))

    def forward(
        self, x: Tensor, edges: SortedEdges | Tensor, *, return_trace: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (N, num_labels); a label is predicted where its logit is positive. With `return_trace` also the
        features, x and every layer's output after the activation, and the attention (E, H) of every layer that
        has it, in the order of the sorted edges."""
        graph = as_sorted_edges(x, edges)
        features, attention = [x], []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                x = layer(x).to(x.dtype)
            elif return_trace and isinstance(layer, AttentionConv):
                x, (_, weights) = layer(x, graph, return_attention=True)
                attention.append(weights)
            else:
                x = layer(x, graph)
            if index < len(self.layers) - 1:
                x = F.elu(x)
            features.append(x)
        return (x, features, attention) if return_trace else x
