"""Layers against torch_geometric's, the fast path against the plain one, and both against the definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_utils.graphs import edges as plain
from pdl_utils.graphs import fast_attention
from pdl_utils.graphs.edges import SortedEdges, edge_softmax
from pdl_utils.graphs.layers import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv
from pdl_utils.graphs.metrics import (
    attention_entropy,
    dirichlet_energy,
    label_f1,
    mean_average_distance,
    micro_f1,
    relative_attention,
)  # fmt: skip

NODES, CHANNELS = 12, 7


def random_edges(edges: int = 60, nodes: int = NODES) -> Tensor:
    """Among all nodes but the last two, which stay isolated; a few edges stand there twice."""
    edge_index = torch.randint(0, nodes - 2, (2, edges))
    return torch.cat([edge_index, edge_index[:, :7]], dim=1)


GRAPHS = {
    "isolated nodes, duplicates, some loops": lambda: (NODES, random_edges()),
    "loops everywhere": lambda: (NODES, torch.cat([random_edges(), torch.arange(NODES).repeat(2, 1)], 1)),
    "single node": lambda: (1, torch.zeros(2, 0, dtype=torch.long)),
    "single node with loops": lambda: (1, torch.zeros(2, 3, dtype=torch.long)),
    "no edges": lambda: (5, torch.zeros(2, 0, dtype=torch.long)),
    "one edge": lambda: (3, torch.tensor([[2], [0]])),
}

LAYERS = {
    "gcn": (GCNConv, pyg.GCNConv, {}),
    "gat": (GATConv, pyg.GATConv, {"heads": 3}),
    "gat mean residual": (GATConv, pyg.GATConv, {"heads": 2, "concat": False, "residual": True}),
    "gat slope": (GATConv, pyg.GATConv, {"heads": 2, "negative_slope": 0.6, "bias": False}),
    "gatv2": (GATv2Conv, pyg.GATv2Conv, {"heads": 3}),
    "gatv2 mean residual": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "concat": False, "residual": True}),
    "gatv2 slope": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "negative_slope": 0.6, "bias": False}),
}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Against the largest number, or 1: a softmax ignores a shift, so that some gradients are rounding alone."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))


def outputs_and_gradients(layer: nn.Module, x: Tensor, edges: Tensor | SortedEdges) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, edges)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)  # a different weight everywhere
    (out * probe).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_torch_geometric(layer, graph, fast, self_loops, dtype, tolerance):
    torch.manual_seed(0)
    ours, theirs, options = LAYERS[layer]
    nodes, edges = GRAPHS[graph]()
    peer = theirs(CHANNELS, 5, add_self_loops=self_loops, **options).to(dtype)
    for parameter in peer.parameters():  # biases start at zero, where a mistake would not show
        nn.init.normal_(parameter, std=0.5)
    mine = ours(CHANNELS, 5, self_loops=self_loops, fast=fast, **options).to(dtype)
    mine.load_state_dict(peer.state_dict())
    x = torch.randn(nodes, CHANNELS, dtype=dtype)
    expected = outputs_and_gradients(peer, x, edges)
    for name, value in outputs_and_gradients(mine, x, edges).items():
        reference = torch.zeros_like(value) if expected[name] is None else expected[name]
        assert relative_error(value, reference) < tolerance, name


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_attention_equals_torch_geometric(layer):
    torch.manual_seed(0)
    peer = getattr(pyg, layer.__name__)(CHANNELS, 5, heads=3).double()
    mine = layer(CHANNELS, 5, heads=3).double()
    mine.load_state_dict(peer.state_dict())
    x, edges = torch.randn(NODES, CHANNELS, dtype=torch.float64), random_edges()

    def dense(edge_index: Tensor, attention: Tensor) -> Tensor:
        return torch.zeros(NODES, NODES, 3).double().index_put(tuple(edge_index), attention, accumulate=True)

    _, expected = peer(x, edges, return_attention_weights=True)
    _, found = mine(x, edges, return_attention=True)
    torch.testing.assert_close(dense(*found), dense(*expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 40, 2**18])
@pytest.mark.parametrize("conv", ["gcn", "gat", "gatv2", "uniform"])
def test_fast_path_equals_plain(conv, tile, monkeypatch):
    """Over tiles of one edge, of several, and all edges in one; attention dropout included."""
    monkeypatch.setattr(fast_attention, "TILE", tile)
    torch.manual_seed(0)
    net = GraphNet(CHANNELS, 4, conv, hidden=5, heads=2, out_heads=3, dropout=0.5).double()
    slow = copy.deepcopy(net)
    for layer in slow.layers:
        layer.fast = False
    x, graph = torch.randn(NODES, CHANNELS, dtype=torch.float64), SortedEdges.from_edges(random_edges(), NODES)
    torch.manual_seed(1)
    found = outputs_and_gradients(net, x, graph)
    torch.manual_seed(1)
    expected = outputs_and_gradients(slow, x, graph)
    for name, value in found.items():
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("fast", [True, False])
def test_attention_is_dropped_in_training_only(fast):
    torch.manual_seed(0)
    net, graph = (
        GraphNet(CHANNELS, 4, "gat", hidden=5, heads=2, dropout=0.5),
        SortedEdges.from_edges(random_edges(), NODES),
    )
    for layer in net.layers:
        layer.fast = fast
    x = torch.randn(NODES, CHANNELS)
    assert not torch.equal(net(x, graph), net(x, graph))
    net.eval()
    assert torch.equal(net(x, graph), net(x, graph))


@pytest.mark.parametrize("graph", GRAPHS)
def test_gradients_against_finite_differences(graph):
    torch.manual_seed(0)
    nodes, edges = GRAPHS[graph]()
    graph = SortedEdges.from_edges(edges, nodes, self_loops=False)
    h, query = (torch.randn(nodes, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    att = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(graph.source), 2, dtype=torch.float64, requires_grad=True)
    for module in (plain, fast_attention):
        assert torch.autograd.gradcheck(lambda w, h, m=module: m.weighted_sum(w, h, graph), (weight, h))
        assert torch.autograd.gradcheck(
            lambda h, q, a, m=module: m.pair_scores(h, q, a, 0.2, graph), (h, query, att)
        )
    assert torch.autograd.gradcheck(lambda e: edge_softmax(e, graph), (weight,))


def test_fast_path_refuses_second_derivatives():
    graph = SortedEdges.from_edges(random_edges(), NODES)
    weight = torch.rand(len(graph.source), 1, requires_grad=True)
    h = torch.randn(NODES, 1, 3, requires_grad=True)
    (first,) = torch.autograd.grad(
        fast_attention.weighted_sum(weight, h, graph).square().sum(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_fast_path_never_holds_a_message_for_every_edge(layer, monkeypatch):
    monkeypatch.setattr(fast_attention, "TILE", 2**12)
    graph = SortedEdges.from_edges(random_edges(edges=3000, nodes=100), 100)
    x, messages = torch.randn(100, CHANNELS), len(graph.source) * 4 * 16
    largest = {}
    for fast in (True, False):
        with LargestTensor() as seen:
            layer(CHANNELS, 16, heads=4, fast=fast)(x, graph).sum().backward()
        largest[fast] = seen.numel
    assert largest[False] == messages
    assert largest[True] < messages / 10


def test_half_precision_takes_the_plain_path():
    layer = GATv2Conv(CHANNELS, 5, heads=2)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, edges)
    torch.testing.assert_close(out.float(), layer(x, edges), rtol=0.05, atol=0.05)


def test_attention_rows_sum_to_one_beside_huge_scores():
    """Scores of 1e4 in one neighbourhood and -1e4 in another: a shared maximum would underflow the second."""
    torch.manual_seed(0)
    graph = SortedEdges.from_edges(random_edges(), NODES)
    scores = torch.randn(len(graph.source), 4)
    scores[graph.target % 3 == 0] += 1e4
    scores[graph.target % 3 == 1] -= 1e4
    attention = edge_softmax(scores, graph)
    total = torch.zeros(NODES, 4).index_add(0, graph.target, attention)
    torch.testing.assert_close(total, torch.ones(NODES, 4))
    by_hand = torch.cat([scores[graph.target == node].softmax(0) for node in range(NODES)])
    torch.testing.assert_close(attention, by_hand)


def test_uniform_attention_is_the_mean_of_the_neighbourhood():
    layer = UniformConv(CHANNELS, CHANNELS, bias=False)
    nn.init.eye_(layer.lin.weight)
    x, edges = torch.randn(4, CHANNELS), torch.tensor([[0, 1, 2], [3, 3, 3]])
    torch.testing.assert_close(layer(x, edges)[3], x.mean(0))


def test_static_and_dynamic_attention():
    """GAT ranks the sources alike for every target (Brody et al., theorem 1). GATv2 need not: with these
    weights it scores -0.8 |x_j - x_i|, and every node attends to itself most."""
    torch.manual_seed(0)
    x = torch.randn(6, 1)
    edges = torch.cartesian_prod(torch.arange(6), torch.arange(6)).t()

    def favourites(layer: nn.Module) -> list[int]:
        _, ((source, target), attention) = layer(x, edges, return_attention=True)
        return torch.zeros(6, 6).index_put((target, source), attention[:, 0]).argmax(1).tolist()

    assert len(set(favourites(GATConv(1, 5)))) == 1
    layer = GATv2Conv(1, 2)
    with torch.no_grad():
        layer.lin_l.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        layer.lin_r.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        layer.att.fill_(-1)
    assert favourites(layer) == list(range(6))


def test_graph_keeps_track_of_its_edges():
    edges = torch.tensor([[0, 2, 1, 1, 2], [1, 1, 1, 0, 1]])
    graph = SortedEdges.from_edges(edges, 4)
    assert graph.edge_index.tolist() == [[0, 1, 0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]]
    assert graph.degree.tolist() == [2, 4, 1, 1]
    given = graph.origin >= 0
    assert torch.equal(edges[:, graph.origin[given]], graph.edge_index[:, given])
    assert (graph.source[~given] == graph.target[~given]).all()
    order, pointers = graph.by_source
    assert graph.source[order].diff().min() >= 0
    assert pointers.diff().tolist() == torch.bincount(graph.source, minlength=4).tolist()


@pytest.mark.parametrize(
    ("edges", "error", "says"),
    [
        ([[0, 1], [1, 0]], TypeError, "must be a tensor"),
        (torch.zeros(2, 3), TypeError, "must hold integers, not torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "must hold integers, not torch.bool"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"shape \(2, E\), not \(3,\)$"),
        (torch.zeros(5, 2, dtype=torch.long), ValueError, r"not \(5, 2\); transpose it"),
        (torch.tensor([[0], [4]]), ValueError, "names node 4, but there are 4 nodes"),
        (torch.tensor([[-1], [0]]), ValueError, "names node -1, but there are 4 nodes"),
    ],
)
@pytest.mark.parametrize("layer", [GCNConv, GATConv, GATv2Conv])
def test_malformed_edges(layer, edges, error, says):
    with pytest.raises(error, match=says):
        layer(CHANNELS, 5)(torch.randn(4, CHANNELS), edges)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(4, CHANNELS, dtype=torch.long), TypeError, "floating-point numbers, not torch.int64"),
        (torch.zeros(4, CHANNELS + 1), ValueError, r"shape \(N, 7\), not \(4, 8\)"),
        (torch.zeros(CHANNELS), ValueError, r"shape \(N, 7\), not \(7,\)"),
        (torch.zeros(4, CHANNELS).index_fill(0, torch.tensor([2]), math.nan), ValueError, "node 2 hold NaN"),
        (
            torch.zeros(4, CHANNELS).index_fill(0, torch.tensor([1]), math.inf),
            ValueError,
            "node 1 hold NaN or inf",
        ),
    ],
)
@pytest.mark.parametrize("layer", [GCNConv, GATConv, GATv2Conv])
def test_malformed_features(layer, x, error, says):
    with pytest.raises(error, match=says):
        layer(CHANNELS, 5)(x, torch.tensor([[0], [1]]))


def test_graph_of_another_size():
    graph = SortedEdges.from_edges(torch.tensor([[0], [1]]), 3)
    with pytest.raises(ValueError, match=r"shape \(3, 7\), not \(4, 7\)"):
        GATConv(CHANNELS, 5)(torch.randn(4, CHANNELS), graph)


def test_net_checks_features_where_the_graph_is_already_made():
    graph = SortedEdges.from_edges(torch.tensor([[0], [1]]), 3)
    with pytest.raises(ValueError, match="features of node 0 hold NaN"):
        GraphNet(CHANNELS, 4, hidden=5)(torch.full((3, CHANNELS), math.nan), graph)


def test_net_names_its_choices():
    with pytest.raises(ValueError, match="'gta': choose one of gat, gatv2, uniform, gcn, mlp"):
        GraphNet(3, 2, "gta")
    with pytest.raises(ValueError, match="at least one layer"):
        GraphNet(3, 2, depth=0)


@pytest.mark.parametrize("conv", ["mlp", "gcn", "gat", "gatv2", "uniform"])
@pytest.mark.parametrize("depth", [1, 3])
def test_net_traces_every_layer(conv, depth):
    net = GraphNet(CHANNELS, 4, conv, hidden=5, heads=2, out_heads=3, depth=depth)
    logits, trace = net(torch.randn(NODES, CHANNELS), random_edges(), return_trace=True)
    widths = [CHANNELS, *[10] * (depth - 1), 4]
    assert [features.shape for features in trace.features] == [(NODES, width) for width in widths]
    assert logits is trace.features[-1]
    heads = [2] * (depth - 1) + [3] if conv in ("gat", "gatv2", "uniform") else []
    assert [attention.shape[1] for attention in trace.attention] == heads


def test_mlp_sees_no_edges():
    net, x = GraphNet(CHANNELS, 4, "mlp", hidden=5), torch.randn(NODES, CHANNELS)
    assert torch.equal(net(x, random_edges()), net(x, torch.zeros(2, 0, dtype=torch.long)))


def test_micro_f1():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, -1.0, 0.5]])  # 2 right, 1 too many, 1 missed
    assert micro_f1(logits, labels) == pytest.approx(2 * 2 / (3 + 3))
    assert micro_f1(torch.zeros(2, 3), labels) == 0  # a logit of 0 predicts nothing
    assert micro_f1(-torch.ones(2, 3), torch.zeros(2, 3)) == 1
    torch.testing.assert_close(label_f1(logits, labels).nan_to_num(-1), torch.tensor([1.0, 0.0, 2 / 3]).double())


def test_attention_entropy():
    graph = SortedEdges.from_edges(
        torch.tensor([[1, 2], [0, 0]]), 3
    )  # node 0 has three edges, the others their loop
    attention = torch.tensor([[1 / 3, 0.5], [1 / 3, 0.5], [1 / 3, 0.0], [1.0, 1.0], [1.0, 1.0]])
    found = attention_entropy(attention, graph)
    torch.testing.assert_close(found, torch.tensor([[math.log(3), math.log(2)], [0, 0], [0, 0]]))
    share = attention_entropy(attention, graph, relative=True)
    torch.testing.assert_close(share[0], torch.tensor([1, math.log(2) / math.log(3)]))
    assert share[1:].isnan().all()
    torch.testing.assert_close(relative_attention(attention, graph)[:, 0], torch.ones(5))


def test_dirichlet_energy():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    graph = SortedEdges.from_edges(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 3)
    assert dirichlet_energy(x, graph) == pytest.approx(2 * (25 + 18) / 3)
    assert dirichlet_energy(x, graph, relative=True) == pytest.approx(2 * (25 + 18) / 26)
    assert dirichlet_energy(5 * x, graph, relative=True) == pytest.approx(2 * (25 + 18) / 26)
    assert dirichlet_energy(torch.ones(3, 70), graph) == 0
    assert dirichlet_energy(torch.zeros(3, 2), graph, relative=True) == 0


def test_mean_average_distance():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    diagonal = 1 - math.sqrt(0.5)
    assert mean_average_distance(x) == pytest.approx((1 + 2 * diagonal) / 3)
    assert mean_average_distance(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert mean_average_distance(x[:1]) == 0
