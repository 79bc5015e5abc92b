"""Layers against torch_geometric's; what they do with edges, devices, precision and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_utils.graphs import GATConv, GATv2Conv, GCNConv, GraphNet, SortedEdges, UniformConv
from pdl_utils.graphs.layers import edge_softmax

NODES, CHANNELS = 12, 7
KINDS = ["mlp", "gcn", "gat", "gatv2", "uniform"]


def random_edges(edges: int = 60, nodes: int = NODES) -> Tensor:
    """Among all nodes but the last two, which stay isolated; a few edges stand there twice."""
    edge_index = torch.randint(0, nodes - 2, (2, edges))
    return torch.cat([edge_index, edge_index[:, :7]], dim=1)


GRAPHS = {
    "isolated nodes, duplicates, some loops": lambda: (NODES, random_edges()),
    "loops everywhere": lambda: (NODES, torch.cat([random_edges(), torch.arange(NODES).repeat(2, 1)], 1)),
    "single node with loops": lambda: (1, torch.zeros(2, 3, dtype=torch.long)),
    "no edges": lambda: (5, torch.zeros(2, 0, dtype=torch.long)),
}
LAYERS = {
    "gcn": (GCNConv, pyg.GCNConv, {}),
    "gat": (GATConv, pyg.GATConv, {"heads": 3}),
    "gat mean residual": (GATConv, pyg.GATConv, {"heads": 2, "concat": False, "residual": True}),
    "gat slope": (GATConv, pyg.GATConv, {"heads": 2, "negative_slope": 0.6, "bias": False}),
    "gatv2": (GATv2Conv, pyg.GATv2Conv, {"heads": 3}),
    "gatv2 mean residual": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "concat": False, "residual": True}),
    "gatv2 slope": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "negative_slope": 0.6, "bias": False}),
    "gatv2 in tiles of 16 edges": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "out_channels": 2**17}),
}
MESSY, *OTHERS = GRAPHS
CASES = [
    *[(layer, MESSY, True) for layer in LAYERS],
    *[(layer, graph, True) for layer in ("gcn", "gat", "gatv2") for graph in OTHERS],
    *[(layer, graph, False) for layer in ("gcn", "gat", "gatv2") for graph in (MESSY, "no edges")],
]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Against the largest number, or 1: a softmax ignores a shift, so that some gradients are rounding alone."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))


def dense(nodes: int, edge_index: Tensor, attention: Tensor) -> Tensor:
    """(N, N, H): the attention from each node to each, whatever the order of the edges."""
    matrix = attention.new_zeros(nodes, nodes, attention.shape[1])
    return matrix.index_put(tuple(edge_index), attention, accumulate=True)


def outputs_and_gradients(layer: nn.Module, x: Tensor, edges: Tensor | SortedEdges) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, edges)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)  # a different weight everywhere
    (out * probe).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize(("layer", "graph", "self_loops"), CASES)
def test_equals_torch_geometric(layer, graph, self_loops):
    torch.manual_seed(0)
    ours, theirs, options = LAYERS[layer]
    options = {"out_channels": 5} | options
    nodes, edges = GRAPHS[graph]()
    peer = theirs(CHANNELS, add_self_loops=self_loops, **options).double()
    for parameter in peer.parameters():  # biases start at zero, where a mistake would not show
        nn.init.normal_(parameter, std=0.5)
    mine = ours(CHANNELS, **options).double()
    mine.load_state_dict(peer.state_dict())
    x = torch.randn(nodes, CHANNELS, dtype=torch.float64)
    expected = outputs_and_gradients(peer, x, edges)
    given = edges if self_loops else SortedEdges.from_edges(edges, nodes, self_loops=False)
    for name, value in outputs_and_gradients(mine, x, given).items():
        reference = torch.zeros_like(value) if expected[name] is None else expected[name]
        assert relative_error(value, reference) < 1e-10, name
    if ours is not GCNConv:
        _, found = mine(x, given, return_attention=True)
        _, wanted = peer(x, edges, return_attention_weights=True)
        torch.testing.assert_close(dense(nodes, *found), dense(nodes, *wanted), rtol=1e-10, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_no_tensor_holds_a_message_for_every_edge_and_head(layer):
    graph = SortedEdges.from_edges(random_edges(edges=9000, nodes=100), 100)
    with LargestTensor() as seen:
        layer(CHANNELS, 512, heads=4)(torch.randn(100, CHANNELS), graph).sum().backward()
    assert 100 * 4 * 512 <= seen.numel < len(graph.source) * 4 * 512 / 5


@pytest.mark.parametrize("kind", ["gcn", "gat", "gatv2", "uniform"])
def test_autocast_reaches_only_the_linear_maps(kind):
    torch.manual_seed(0)
    net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3)
    x, graph = torch.randn(NODES, CHANNELS), SortedEdges.from_edges(random_edges(), NODES)
    full = net(x, graph)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, graph)
    assert found.dtype == torch.float32
    assert not torch.equal(found, full)

    def rounded(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.bfloat16()
        return F.linear(inputs[0].bfloat16(), linear.weight.bfloat16(), bias).float()

    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(rounded)
    torch.testing.assert_close(found, net(x, graph), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_the_device_of_its_inputs(kind):
    """On fake CUDA tensors, which need no GPU."""
    real = SortedEdges.from_edges(random_edges(), NODES)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        fields = (torch.empty(x.shape, dtype=torch.long) for x in (real.source, real.target, real.rowptr))
        net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, dropout=0.5)
        _, features, attention = net(torch.empty(NODES, CHANNELS), SortedEdges(NODES, *fields), return_trace=True)
        assert {x.device.type for x in (*features, *attention)} == {"cuda"}  # the last features are the answer


def test_attention_is_dropped_in_training_only():
    torch.manual_seed(0)
    net = GraphNet(CHANNELS, 4, "gat", hidden=5, heads=2, dropout=0.5)
    x, graph = torch.randn(NODES, CHANNELS), SortedEdges.from_edges(random_edges(), NODES)
    assert not torch.equal(net(x, graph), net(x, graph))
    net.eval()
    assert torch.equal(net(x, graph), net(x, graph))


def test_attention_rows_sum_to_one_beside_huge_scores():
    """Scores of 1e4 in one neighbourhood and -1e4 in another: a shared maximum would underflow the second."""
    torch.manual_seed(0)
    graph = SortedEdges.from_edges(random_edges(), NODES)
    scores = torch.randn(len(graph.source), 4)
    scores[graph.target % 3 == 0] += 1e4
    scores[graph.target % 3 == 1] -= 1e4
    by_hand = torch.cat([scores[graph.target == node].softmax(0) for node in range(NODES)])
    torch.testing.assert_close(edge_softmax(scores, graph), by_hand)


def test_uniform_attention_is_the_mean_of_the_neighbourhood():
    layer = UniformConv(CHANNELS, CHANNELS, bias=False)
    nn.init.eye_(layer.lin.weight)
    x, edges = torch.randn(4, CHANNELS), torch.tensor([[0, 1, 2], [3, 3, 3]])
    torch.testing.assert_close(layer(x, edges)[3], x.mean(0))


def test_edges_are_sorted_and_every_node_gets_one_loop():
    graph = SortedEdges.from_edges(torch.tensor([[0, 2, 1, 1, 2], [1, 1, 1, 0, 1]]), 4)
    assert graph.edge_index.tolist() == [[0, 1, 0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]]
    assert graph.degree.tolist() == [2, 4, 1, 1]


@pytest.mark.parametrize(
    ("edges", "says"),
    [
        (torch.zeros(2, 3), "must hold integers"),
        (torch.zeros(5, 2, dtype=torch.long), r"shape \(2, E\), not torch.int64 of \(5, 2\)$"),
        (torch.tensor([[0], [4]]), "names nodes 0 to 4, but there are only 0 to 3"),
        (torch.tensor([[-1], [0]]), "names nodes -1 to 0"),
        (SortedEdges.from_edges(torch.tensor([[0], [1]]), 3), "features of 4 nodes, but edges between 3"),
    ],
)
def test_malformed_edges(edges, says):
    with pytest.raises(ValueError, match=says):
        GraphNet(CHANNELS, 5, hidden=3)(torch.randn(4, CHANNELS), edges)


def test_net_names_its_choices():
    with pytest.raises(ValueError, match="'gta': choose one of gat, gatv2, uniform, gcn, mlp"):
        GraphNet(3, 2, "gta")


@pytest.mark.parametrize(("kind", "depth"), [("mlp", 3), ("gcn", 3), ("gat", 3), ("gatv2", 1), ("uniform", 2)])
def test_net_traces_every_layer(kind, depth):
    net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, depth=depth)
    logits, features, attention = net(torch.randn(NODES, CHANNELS), random_edges(), return_trace=True)
    widths = [CHANNELS, *[10] * (depth - 1), 4]
    assert [each.shape for each in features] == [(NODES, width) for width in widths]
    assert logits is features[-1]
    heads = [] if kind in ("mlp", "gcn") else [2] * (depth - 1) + [3]
    assert [each.shape[1] for each in attention] == heads
