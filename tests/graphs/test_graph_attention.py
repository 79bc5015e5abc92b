"""Layers against torch_geometric's; what they do with edges, devices, precision and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric.utils import coalesce

from pdl_utils.datasets import ppi
from pdl_utils.graphs import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv, metrics
from pdl_utils.graphs.layers import SortedEdges
from pdl_utils.settings import data_root
from pdl_utils.weights import CHECKPOINTS, load_weights

NODES, CHANNELS = 12, 7
KINDS = ["mlp", "gcn", "gat", "gatv2", "uniform"]


def random_edges(edges: int = 60, nodes: int = NODES) -> Tensor:
    """Among all nodes but the last two, which stay isolated; a few edges stand there twice, a few are loops."""
    edge_index = torch.randint(nodes - 2, (2, edges), generator=torch.Generator().manual_seed(0))
    return torch.cat([edge_index, edge_index[:, :7]], dim=1)


MEAN = {"heads": 2, "concat": False, "residual": True, "negative_slope": 0.6}
LAYERS = {
    "gcn": (GCNConv, pyg.GCNConv, {}),
    "gat": (GATConv, pyg.GATConv, {"heads": 3}),
    "gat, the mean": (GATConv, pyg.GATConv, MEAN),
    "gat without bias": (GATConv, pyg.GATConv, {"heads": 2, "bias": False}),
    "gatv2": (GATv2Conv, pyg.GATv2Conv, {"heads": 3}),
    "gatv2, the mean": (GATv2Conv, pyg.GATv2Conv, MEAN),
    "gatv2 without bias, in tiles of 16 edges": (GATv2Conv, pyg.GATv2Conv, {"out_channels": 2**13, "bias": False}),
}
GRAPHS = {  # number of nodes, edges, whether the layers add loops
    "messy": (NODES, random_edges(), True),
    "messy, no loops added": (NODES, random_edges(), False),
    "one node with loops": (1, torch.zeros(2, 3, dtype=torch.long), True),
    "no edges": (5, torch.zeros(2, 0, dtype=torch.long), False),
}
MESSY, *OTHERS = GRAPHS
CASES = [(layer, MESSY) for layer in LAYERS]
CASES += [(layer, graph) for layer in ("gcn", "gat", "gatv2") for graph in OTHERS]


def outputs_and_gradients(layer: nn.Module, x: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x, edge_index)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)  # a different weight everywhere
    (out * probe).sum().backward()
    found = {"out": out.detach()}
    for name, leaf in [("x", x), *layer.named_parameters()]:
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


@pytest.mark.parametrize(("layer", "graph"), CASES)
def test_equals_torch_geometric(layer, graph):
    torch.manual_seed(0)
    (ours, theirs, options), (nodes, edges, self_loops) = LAYERS[layer], GRAPHS[graph]
    options = {"out_channels": 5, "add_self_loops": self_loops} | options
    peer, mine = theirs(CHANNELS, **options).double(), ours(CHANNELS, **options).double()
    for parameter in peer.parameters():  # biases start at zero, where a mistake would not show
        nn.init.normal_(parameter, std=0.5)
    mine.load_state_dict(peer.state_dict())
    x = torch.randn(nodes, CHANNELS, dtype=torch.float64)
    found, wanted = outputs_and_gradients(mine, x, edges), outputs_and_gradients(peer, x, edges)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    if ours is not GCNConv:
        (_, found), (_, wanted) = (each(x, edges, return_attention_weights=True) for each in (mine, peer))
        torch.testing.assert_close(coalesce(*found), coalesce(*wanted), rtol=1e-10, atol=1e-12)  # in one order


@pytest.mark.parametrize("layer", [GCNConv, GATConv, GATv2Conv])
def test_gradients_can_be_differentiated_again(layer):
    torch.manual_seed(0)
    x, edges = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), random_edges(9, 6)
    conv = layer(3, 2, heads=2).double()
    assert torch.autograd.gradgradcheck(lambda x, *_: conv(x, edges).sin(), (x, *conv.parameters()))


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_no_operation_makes_a_tensor_of_every_edge_head_and_channel(layer):
    edges = random_edges(edges=9000, nodes=100)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(CHANNELS, 512, heads=4)(torch.randn(100, CHANNELS), edges).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in seen.events()) / 4  # bytes a number
    assert 100 * 4 * 512 <= largest < edges.shape[1] * 4 * 512 / 5


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_attention_sums_to_one_beside_huge_scores(layer):
    """Scores of some thousands, far apart: one maximum for all targets would leave 0/0 at most of them."""
    torch.manual_seed(0)
    x, conv = 1e4 * torch.randn(NODES, CHANNELS), layer(CHANNELS, 5)
    _, (edges, alpha) = conv(x, random_edges(), return_attention_weights=True)
    torch.testing.assert_close(torch.zeros(NODES, 1).index_add(0, edges[1], alpha), torch.ones(NODES, 1))


def test_edges_are_sorted_every_node_gets_one_loop_and_uniform_attention_is_the_mean():
    layer, x = UniformConv(1, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    nn.init.ones_(layer.lin.weight)
    edges = torch.tensor([[0, 2, 1, 1, 2], [1, 1, 1, 0, 1]], dtype=torch.int32)
    out, (found, alpha) = layer(x, edges, return_attention_weights=True)
    assert found.tolist() == [[0, 1, 0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]]
    assert alpha[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1, 1]
    assert out[:, 0].tolist() == [1.5, 2.25, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_only_linear_maps_lose_precision(kind):
    """Also behind a linear map, which gives bfloat16 there."""
    torch.manual_seed(0)
    before, net = nn.Linear(CHANNELS, CHANNELS), GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    with torch.autocast("cpu", torch.bfloat16):
        logits, (_, alphas) = net(before(x), edges, return_attention_weights=True)
    assert {found.dtype for found in (logits, *alphas)} == {torch.float32}
    exact = net(before(x), edges)
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_net_is_its_layers_with_elu_between_and_gives_their_attention(kind):
    net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, depth=3)
    x, edges = torch.randn(NODES, CHANNELS), random_edges()
    logits, (_, alphas) = net(x, edges, return_attention_weights=True)
    assert torch.equal(logits, net(x, edges))
    assert [alpha.shape[1] for alpha in alphas] == {"mlp": [], "gcn": [1, 1, 1]}.get(kind, [2, 2, 3])
    for index, layer in enumerate(net.layers):
        given = (F.elu(x) if index else x, *([] if kind == "mlp" else [edges]))
        x = layer(*given)
        if alphas:
            torch.testing.assert_close(alphas[index], layer(*given, return_attention_weights=True)[1][1])
    torch.testing.assert_close(logits, x)


def test_attention_is_dropped_in_training_only():
    torch.manual_seed(0)
    net, x = GraphNet(CHANNELS, 4, "gat", hidden=5, heads=2, dropout=0.5), torch.randn(NODES, CHANNELS)
    assert not torch.equal(net(x, random_edges()), net(x, random_edges()))
    net.eval()
    assert torch.equal(net(x, random_edges()), net(x, random_edges()))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_the_device_of_its_inputs(kind):
    """On fake CUDA tensors, which need no GPU."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        ends, rowptr = torch.zeros(60, dtype=torch.long), torch.zeros(NODES + 1, dtype=torch.long)
        net = GraphNet(CHANNELS, 4, kind, hidden=5, heads=2, out_heads=3, dropout=0.5)
        graph = SortedEdges(ends, ends, rowptr)  # to sort and check edges needs real ones
        out, (edges, alphas) = net(torch.zeros(NODES, CHANNELS), graph, return_attention_weights=True)
        assert {x.device.type for x in (out, edges, *alphas)} == {"cuda"}


X, E = torch.zeros(4, CHANNELS), torch.zeros(2, 3, dtype=torch.long)
MALFORMED = [
    (X, E.bool(), r"edge_index must be an integer tensor of shape \(2, E\), not torch.bool of \(2, 3\)$"),
    (X, E.T, r"not torch.int64 of \(3, 2\)$"),
    (X, E.numpy(), "not a ndarray$"),
    (X, E + 4, "names nodes 4 to 4; x has 4 rows"),
    (X, E - 1, "names nodes -1 to -1"),
    (X.long(), E, r"x must be a float tensor of shape \(N, 7\), not torch.int64 of \(4, 7\)$"),
    (X[:, None], E, r"not torch.float32 of \(4, 1, 7\)$"),
]


@pytest.mark.parametrize(("x", "edges", "says"), MALFORMED)
def test_malformed_inputs_are_named(x, edges, says):
    for layer in (GraphNet(CHANNELS, 5, "mlp"), GATConv(CHANNELS, 5), GCNConv(CHANNELS, 5)):
        with pytest.raises(ValueError, match=says):
            layer(x, edges)


def test_net_names_its_choices():
    with pytest.raises(ValueError, match="'gta': choose one of gat, gatv2, uniform, gcn, mlp"):
        GraphNet(3, 2, "gta")
    with pytest.raises(ValueError, match="depth=0: each must be at least 1"):
        GraphNet(3, 2, depth=0)


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
