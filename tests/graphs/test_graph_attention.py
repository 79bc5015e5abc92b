"""Layers against torch_geometric's; what they do with edges, devices, precision and memory."""

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_geometric.utils import coalesce

from pdl_utils.datasets import ppi
from pdl_utils.graphs import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv, metrics
from pdl_utils.graphs.layers import SortedEdges
from pdl_utils.settings import data_root
from pdl_utils.weights import CHECKPOINTS, load_weights

EDGES = torch.randint(10, (2, 60), generator=torch.Generator().manual_seed(0))
EDGES = torch.cat([EDGES, EDGES[:, :7]], dim=1)  # some stand there twice, some are loops
X = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))  # of the nodes the last two have no edges
SMALL = {"hidden": 5, "heads": 2, "out_heads": 3}
KINDS = ["mlp", "gcn", "gat", "gatv2", "uniform"]
LAYERS = {"gcn": (GCNConv, pyg.GCNConv), "gat": (GATConv, pyg.GATConv), "gatv2": (GATv2Conv, pyg.GATv2Conv)}
MEAN = {"heads": 2, "concat": False, "residual": True, "negative_slope": 0.6}
TILES = {"out_channels": 2**13, "bias": False}  # so many that a tile has 16 edges
GRAPHS = {"messy": (X, EDGES), "one node, repeated loops": (X[:1], 0 * EDGES), "no edges": (X[:5], EDGES[:, :0])}
GRAPHS["two nodes, repeated edges"] = X[:2], EDGES % 2
LOOPS = {"add_self_loops": True}, {"add_self_loops": False}
CASES = [(kind, graph, options) for kind in LAYERS for graph in GRAPHS for options in LOOPS]
CASES += [(kind, "messy", options) for kind in ("gat", "gatv2") for options in ({"heads": 3}, MEAN, TILES)]


@pytest.mark.parametrize(("kind", "graph", "options"), CASES)
def test_equals_torch_geometric(kind, graph, options):
    torch.manual_seed(0)
    mine, peer = (layer(7, **{"out_channels": 5} | options).double() for layer in LAYERS[kind])
    for parameter in peer.parameters():  # biases start at zero, where a mistake would not show
        nn.init.normal_(parameter, std=0.5)
    mine.load_state_dict(peer.state_dict())
    (x, edges), found = GRAPHS[graph], []
    for layer in (mine, peer):
        given = x.double().requires_grad_()
        out = layer(given, edges)
        leaves = {"x": given, **dict(layer.named_parameters())}
        probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)  # a different weight everywhere
        grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()), materialize_grads=True)
        found.append({"out": out, **dict(zip(leaves, grads, strict=True))})
        if kind != "gcn":
            _, attention = layer(given, edges, return_attention_weights=True)
            found[-1]["attention"] = coalesce(*attention)  # in one order
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [GCNConv, GATConv, GATv2Conv])
def test_gradients_can_be_differentiated_again(layer):
    torch.manual_seed(0)
    x, edges, conv = X[:6, :3].double().requires_grad_(), EDGES[:, 51:] % 4, layer(3, 2, heads=2).double()
    assert torch.autograd.gradgradcheck(lambda x, *_: conv(x, edges).sin(), (x, *conv.parameters()))


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_no_operation_makes_a_tensor_of_every_edge_head_and_channel(layer):
    edges = torch.randint(100, (2, 9000), generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(7, 512, heads=4)(torch.randn(100, 7), edges).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in seen.events()) / 4  # bytes a number
    assert 100 * 4 * 512 <= largest < edges.shape[1] * 4 * 512 / 5


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_attention_sums_to_one_beside_huge_scores(layer):
    """Scores of some thousands, far apart: one maximum for all targets would leave 0/0 at most of them."""
    torch.manual_seed(0)
    _, (edges, alpha) = layer(7, 5)(1e4 * X, EDGES, return_attention_weights=True)
    torch.testing.assert_close(torch.zeros(12, 1).index_add(0, edges[1], alpha), torch.ones(12, 1))


def test_edges_are_sorted_every_node_gets_one_loop_and_uniform_attention_is_the_mean():
    layer, x = UniformConv(1, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    nn.init.ones_(layer.lin.weight)
    edges = torch.tensor([[0, 2, 1, 1, 2], [1, 1, 1, 0, 1]], dtype=torch.int8)
    out, (found, alpha) = layer(x, edges, return_attention_weights=True)
    assert found.tolist() == [[0, 1, 0, 1, 2, 2, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]]
    assert alpha[:, 0].tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1, 1]
    assert out[:, 0].tolist() == [1.5, 2.25, 3, 4]
    assert layer(torch.ones(200, 1), edges).shape == (200, 1)  # more nodes than int8 can count


@pytest.mark.parametrize("layer", [GATConv, GATv2Conv])
def test_half_precision_has_gradients(layer):
    conv = layer(7, 5, heads=2)
    wide = torch.autograd.grad(conv(X, EDGES).square().sum(), conv.bias)
    half = torch.autograd.grad(conv.bfloat16()(X.bfloat16(), EDGES).square().sum(), conv.bias)
    torch.testing.assert_close(half[0].float(), wide[0], rtol=0.05, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_only_linear_maps_lose_precision(kind):
    """Also behind a linear map, which gives bfloat16 there."""
    torch.manual_seed(0)
    before, net = nn.Linear(7, 7), GraphNet(7, 4, kind, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        logits, (_, alphas) = net(before(X), EDGES, return_attention_weights=True)
    assert {found.dtype for found in (logits, *alphas)} == {torch.float32}
    exact = net(before(X), EDGES)
    assert not torch.equal(logits, exact)
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_net_is_its_layers_with_elu_between_gives_their_attention_and_drops_it_in_training_only(kind):
    net, x = GraphNet(7, 4, kind, **SMALL, depth=3, dropout=0.5), X
    assert torch.equal(net(X, EDGES), net(X, EDGES)) == (kind == "mlp")
    net.eval()
    logits, (_, alphas) = net(X, EDGES, return_attention_weights=True)
    assert [alpha.shape[1] for alpha in alphas] == {"mlp": [], "gcn": [1, 1, 1]}.get(kind, [2, 2, 3])
    for index, layer in enumerate(net.layers):
        given = (F.elu(x) if index else x, *([] if kind == "mlp" else [EDGES]))
        x = layer(*given)
        if alphas:
            torch.testing.assert_close(alphas[index], layer(*given, return_attention_weights=True)[1][1])
    assert torch.equal(logits, net(X, EDGES))
    torch.testing.assert_close(logits, x)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_the_device_of_its_inputs(kind):
    """On fake CUDA tensors, which need no GPU."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        ends, rowptr = torch.zeros(60, dtype=torch.long), torch.zeros(13, dtype=torch.long)
        graph = SortedEdges(ends, ends, rowptr)  # to sort and check edges needs real ones
        net = GraphNet(7, 4, kind, **SMALL, dropout=0.5)
        out, (edges, alphas) = net(torch.zeros(12, 7), graph, return_attention_weights=True)
        assert {x.device.type for x in (out, edges, *alphas)} == {"cuda"}


MALFORMED = [
    (X, EDGES.bool(), r"edge_index must be an integer tensor of shape \(2, E\), not torch.bool of \(2, 67\)$"),
    (X, EDGES.T, r"not torch.int64 of \(67, 2\)$"),
    (X, EDGES.numpy(), "not a ndarray$"),
    (X, EDGES + 9, "names nodes 9 to 18; x has 12 rows"),
    (X, EDGES - 1, "names nodes -1 to 8"),
    (X.long(), EDGES, r"x must be a float tensor of shape \(N, 7\), not torch.int64 of \(12, 7\)$"),
    (X[:, None], EDGES, r"not torch.float32 of \(12, 1, 7\)$"),
]


@pytest.mark.parametrize(("x", "edges", "says"), MALFORMED)
def test_malformed_inputs_are_named(x, edges, says):
    for layer in (GraphNet(7, 5, "mlp"), GATConv(7, 5), GCNConv(7, 5)):
        with pytest.raises(ValueError, match=says):
            layer(x, edges)


def test_net_names_its_choices():
    with pytest.raises(TypeError, match="positional"):  # PyG's third argument, the weights of edges
        GCNConv(7, 5)(X, EDGES, torch.ones(EDGES.shape[1]))
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
