"""Layers against torch_geometric's; what they do with edges, devices, precision and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_utils.datasets import ppi
from pdl_utils.graphs import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv, metrics
from pdl_utils.graphs.layers import SortedEdges, edge_softmax, sort_edges
from pdl_utils.settings import data_root
from pdl_utils.weights import CHECKPOINTS, load_weights

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
    "gatv2 in tiles of 16 edges": (GATv2Conv, pyg.GATv2Conv, {"heads": 2, "out_channels": 2**13}),
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


def outputs_and_gradients(layer: nn.Module, x: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, edge_index)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)  # a different weight everywhere
    (out * probe).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


@pytest.mark.parametrize(("layer", "graph", "self_loops"), CASES)
def test_equals_torch_geometric(layer, graph, self_loops):
    torch.manual_seed(0)
    ours, theirs, options = LAYERS[layer]
    options = {"out_channels": 5, "add_self_loops": self_loops} | options
    nodes, edges = GRAPHS[graph]()
    peer, mine = theirs(CHANNELS, **options).double(), ours(CHANNELS, **options).double()
    for parameter in peer.parameters():  # biases start at zero, where a mistake would not show
        nn.init.normal_(parameter, std=0.5)
    mine.load_state_dict(peer.state_dict())
    x = torch.randn(nodes, CHANNELS, dtype=torch.float64)
    expected = outputs_and_gradients(peer, x, edges)
    for name, value in outputs_and_gradients(mine, x, edges).items():
        reference = torch.zeros_like(value) if expected[name] is None else expected[name]
        assert relative_error(value, reference) < 1e-10, name
    if ours is not GCNConv:
        (_, found), (_, wanted) = (each(x, edges, return_attention_weights=True) for each in (mine, peer))
        torch.testing.assert_close(dense(nodes, *found), dense(nodes, *wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [GCNConv, GATConv, GATv2Conv, UniformConv])
def test_gradients_can_be_differentiated_again(layer):
    torch.manual_seed(0)
    x, edges, conv = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), random_edges(9, 6), layer(3, 2)
    assert torch.autograd.gradgradcheck(lambda x: conv.double()(x, edges).sin(), x)


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
    edges = random_edges(edges=9000, nodes=100)
    with LargestTensor() as seen:
        layer(CHANNELS, 512, heads=4)(torch.randn(100, CHANNELS), edges).sum().backward()
    assert 100 * 4 * 512 <= seen.numel < edges.shape[1] * 4 * 512 / 5


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_reaches_only_the_linear_maps(kind):
    """Also behind a linear map, which gives bfloat16 under autocast."""
    torch.manual_seed(0)
    net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3)
    before = nn.Linear(CHANNELS, CHANNELS)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    full = net(before(x), edges)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(before(x), edges)
    assert found.dtype == torch.float32
    assert not torch.equal(found, full)

    def rounded(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.bfloat16()
        return F.linear(inputs[0].bfloat16(), linear.weight.bfloat16(), bias).float()

    for module in (before, *net.modules()):
        if isinstance(module, nn.Linear):
            module.register_forward_hook(rounded)
    torch.testing.assert_close(found, net(before(x), edges), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_the_device_of_its_inputs(kind):
    """On fake CUDA tensors, which need no GPU."""
    real = sort_edges(torch.zeros(NODES, CHANNELS), random_edges(), CHANNELS)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        fields = (torch.empty(x.shape, dtype=torch.long) for x in (real.source, real.target, real.rowptr))
        net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, dropout=0.5)
        graph = SortedEdges(NODES, *fields)
        out, (edges, alphas) = net(torch.empty(NODES, CHANNELS), graph, return_attention_weights=True)
        assert {x.device.type for x in (out, edges, *alphas)} == {"cuda"}


def test_attention_is_dropped_in_training_only():
    torch.manual_seed(0)
    net = GraphNet(CHANNELS, 4, "gat", hidden=5, heads=2, dropout=0.5)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    assert not torch.equal(net(x, edges), net(x, edges))
    net.eval()
    assert torch.equal(net(x, edges), net(x, edges))


def test_attention_rows_sum_to_one_beside_huge_scores():
    """Scores of 1e4 in one neighbourhood and -1e4 in another: a shared maximum would underflow the second."""
    torch.manual_seed(0)
    graph = sort_edges(torch.zeros(NODES, 1), random_edges(), 1)
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
    edges = torch.tensor([[0, 2, 1, 1, 2], [1, 1, 1, 0, 1]], dtype=torch.int32)
    _, (found, alpha) = UniformConv(1, 1)(torch.zeros(4, 1), edges, return_attention_weights=True)
    assert found.tolist() == [[0, 1, 0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]]
    assert alpha[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1, 1]


X, E = torch.zeros(4, CHANNELS), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "edges", "says"),
    [
        (X, E.float(), r"edge_index must be an integer tensor of shape \(2, E\), not torch.float32 of \(2, 3\)$"),
        (X, E.bool(), "edge_index must be an integer tensor .* not torch.bool of"),
        (X, E.T, r"not torch.int64 of \(3, 2\)$"),
        (X, E[0], r"not torch.int64 of \(3,\)$"),
        (X, E.numpy(), "edge_index must be an integer tensor .* not a ndarray$"),
        (X, E.tolist(), "not a list$"),
        (X, E + 4, "names nodes 4 to 4, but x has rows for 0 to 3"),
        (X, E - 1, "names nodes -1 to -1"),
        (X.long(), E, r"x must be a float tensor of shape \(N, 7\), not torch.int64 of \(4, 7\)$"),
        (X[:, None], E, r"not torch.float32 of \(4, 1, 7\)$"),
        (X[:, :3], E, r"not torch.float32 of \(4, 3\)$"),
        (np.zeros((4, 7)), E, "x must be a float tensor .* not a ndarray$"),
    ],
)
@pytest.mark.parametrize(
    "net", [GraphNet(CHANNELS, 5, "mlp", hidden=3), GATConv(CHANNELS, 5), GCNConv(CHANNELS, 5)]
)
def test_malformed_inputs_are_named(net, x, edges, says):
    with pytest.raises(ValueError, match=says):
        net(x, edges)


def test_net_names_its_choices():
    with pytest.raises(ValueError, match="'gta': choose one of gat, gatv2, uniform, gcn, mlp"):
        GraphNet(3, 2, "gta")
    with pytest.raises(ValueError, match="depth=0: each must be at least 1"):
        GraphNet(3, 2, depth=0)


@pytest.mark.parametrize(("kind", "depth"), [("mlp", 3), ("gcn", 3), ("gat", 3), ("gatv2", 1), ("uniform", 2)])
def test_net_gives_the_attention_of_every_layer(kind, depth):
    net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, depth=depth)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    logits, (found, alphas) = net(x, edges, return_attention_weights=True)
    assert logits.shape == (NODES, 4)
    torch.testing.assert_close(logits, net(x, edges))
    assert [alpha.shape[1] for alpha in alphas] == ([] if kind in ("mlp", "gcn") else [2] * (depth - 1) + [3])
    for layer, alpha in zip(net.layers, alphas, strict=True) if alphas else ():
        again, (_, weights) = layer(x, edges, return_attention_weights=True)
        torch.testing.assert_close(alpha, weights)
        x = F.elu(again)
    assert found.shape[1] == sum(edges[0] != edges[1]) + NODES


@pytest.mark.parametrize(("kind", "floor"), [("gat", 0.985), ("gatv2", 0.987)])
def test_networks_that_ship(kind, floor):
    state, facts = load_weights(CHECKPOINTS / f"{kind}_ppi.safetensors")
    net = GraphNet(50, 121, kind, **facts["sizes"]).eval()
    net.load_state_dict(state)
    assert facts["micro_f1"] >= floor
    if (data_root() / "ppi").is_dir():
        graphs = ppi().test
        with torch.no_grad():
            logits = torch.cat([net(graph.x, graph.edge_index) for graph in graphs])
        score = metrics.micro_f1(logits, torch.cat([graph.y for graph in graphs]))
        assert score == pytest.approx(facts["micro_f1"], abs=5e-4)
