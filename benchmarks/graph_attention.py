"""GAT and GATv2 layers beside torch_geometric's, on the processor.

    python benchmarks/graph_attention.py [--rounds 4] [--json FILE]

Forward and backward pass of one layer, from 1024 or 50 inputs to 4 heads of 256, on two graphs of PPI's average
size; the same weights and edges on both sides, and the outputs agree. torch_geometric makes tensors of (edges,
heads, channels), half a gigabyte each. Much of its time is the system's handing out of that memory; so the large
case is also measured with a C allocator that keeps its memory ("tuned", glibc only). The memory's peak is measured
in processes of their own.

The limit is what no implementation can avoid: the matrix products, and the way of each edge's row of 4·256
numbers from memory, once in the forward pass (the messages' sum) and once in the backward pass (their gradient's).
With 50 inputs there is hardly a product, and the limit is far.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric
import torch_geometric.nn as pyg
from side_by_side import LIMIT, arguments, measure, report
from torch import Tensor, nn

from pdl_utils.graphs import GATConv, GATv2Conv, SortedEdges

NODES, DEGREE = 2373, 29  # of one PPI graph, on average
HEADS, CHANNELS = 4, 256
LAYERS = {"GAT": (GATConv, pyg.GATConv), "GATv2": (GATv2Conv, pyg.GATv2Conv)}
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**24)},
}
CASES = [(1024, "default"), (1024, "tuned"), (50, "default")]  # in_channels, allocator
LARGE = CASES[0][0]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def contestants(name: str, in_channels: int) -> tuple[dict[str, nn.Module], Tensor, dict[str, Any]]:
    """Both layers with the same weights, the input, and the edges as each of them wants them."""
    torch.manual_seed(0)
    one = torch.randint(0, NODES, (2, NODES * DEGREE))
    edge_index = torch.cat([one, one.flip(1) + NODES], dim=1)
    ours, theirs = LAYERS[name]
    layers = {"ours": ours(in_channels, CHANNELS, HEADS), "PyG": theirs(in_channels, CHANNELS, HEADS)}
    layers["ours"].load_state_dict(layers["PyG"].state_dict())
    edges = {"ours": SortedEdges.from_edges(edge_index, 2 * NODES), "PyG": edge_index}
    return layers, torch.randn(2 * NODES, in_channels, requires_grad=True), edges


def step(layer: nn.Module, x: Tensor, edges: Tensor | SortedEdges) -> Tensor:
    layer.zero_grad()
    x.grad = None
    out = layer(x, edges)
    out.square().mean().backward()
    return out.detach()


def matrix_products(layer: nn.Module, x: Tensor) -> None:
    """Forward and both backward products of every linear map in the layer."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            h = x.detach() @ module.weight.detach().t()
            h.t() @ x.detach()
            h @ module.weight.detach()


def measure_time(name: str, in_channels: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of ours, theirs and the limit in each round."""
    layers, x, edges = contestants(name, in_channels)
    graph = edges["ours"]
    backward = SortedEdges.from_edges(graph.edge_index.flip(0), graph.num_nodes)
    rows = torch.randn(graph.num_nodes, HEADS * CHANNELS)

    def limit() -> None:
        matrix_products(layers["ours"], x)
        for way in (graph, backward):  # the edges' rows, read where they lie and summed up
            F.embedding_bag(way.source, rows, way.rowptr, mode="sum", include_last_offset=True)

    calls = {who: lambda who=who: step(layers[who], x, edges[who]) for who in layers}
    torch.testing.assert_close(calls["ours"](), calls["PyG"](), rtol=1e-4, atol=1e-5)
    return measure(calls | {"limit": limit}, rounds, budget=30)


def measure_memory(name: str, in_channels: int, who: str) -> float:
    """How far one forward and backward pass raises the process's peak, in MB."""
    layers, x, edges = contestants(name, in_channels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(layers[who], x, edges[who])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * RSS_UNIT / 2**20


def in_fresh_process(allocator: str, what: str, *arguments: Any) -> Any:
    """Run `measure_{what}(*arguments)` in a process of its own, whose C allocator and peak are its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | ALLOCATORS[allocator]
    command = [sys.executable, __file__, json.dumps([what, *arguments])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments(__doc__, rounds=4)
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    peaks: dict[str, dict[str, int]] = {}
    for name in LAYERS:
        for in_channels, allocator in CASES:
            seconds = in_fresh_process(allocator, "time", name, in_channels, args.rounds)
            case = f"{name}, {in_channels} in" + ("" if allocator == "default" else f", {allocator} allocator")
            pairs[f"{case}: ours / PyG"] = seconds["ours"], seconds["PyG"]
            if allocator == "default":
                pairs[f"{case}: ours / products and edges {LIMIT}"] = seconds["ours"], seconds["limit"]
        peaks[name] = {
            who: round(in_fresh_process("default", "memory", name, LARGE, who)) for who in ("ours", "PyG")
        }
    title = f"Graph attention, forward and backward, PyG {torch_geometric.__version__}"
    report(title, pairs, torch.device("cpu"), args.json, peak_mb=peaks)
    for name, peak in peaks.items():
        print(
            f"{name}, {LARGE} in: the memory's peak is {peak['ours'] / peak['PyG']:.2f} of PyG's {peak['PyG']} MB"
        )


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("["):  # a process of `in_fresh_process`
        what, *rest = json.loads(sys.argv[1])
        print(json.dumps({"time": measure_time, "memory": measure_memory}[what](*rest)))
    else:
        main()
