"""GAT and GATv2 layers of this project beside torch_geometric's, on the CPU.

    python benchmarks/graph_attention.py [--rounds 4] [--threads 1 2] [--json FILE]

Forward and backward of one layer, `in_channels` → 4 heads of 256, on two graphs of PPI's average size; the
same weights and edges on both sides. Much of the peer's time is page faults on half-gigabyte temporaries, so
that the large case is also measured with a C allocator told to keep its memory (glibc).

The limit is what no implementation can avoid, in time: the matrix products, and the memory traffic of the
edges. Every edge's row of 4·256 numbers is read at least once in the forward pass (the messages' sum) and once
in the backward pass (their gradient's), and its 4 scores are read and written in each. Nobody has to write
(edges, heads, channels) tensors, and a row's products with the attention cost less than its way from memory:
neither counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric
import torch_geometric.nn as pyg
from side_by_side import LIMIT, measure, report
from torch import Tensor, nn

from pdl_utils.graphs.edges import SortedEdges
from pdl_utils.graphs.layers import GATConv, GATv2Conv

NODES, DEGREE = 2373, 29  # of one PPI graph, on average
HEADS, CHANNELS = 4, 256
LAYERS = {"GAT": (GATConv, pyg.GATConv), "GATv2": (GATv2Conv, pyg.GATv2Conv)}
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**24)},
}
CASES = [(1024, "default"), (1024, "tuned"), (50, "default")]  # in_channels, allocator
LARGE = CASES[0][0]
MEGABYTE = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def two_graphs() -> tuple[int, Tensor]:
    """Number of nodes and edge_index of two random graphs side by side."""
    edges = torch.randint(0, NODES, (2, NODES * DEGREE))
    return 2 * NODES, torch.cat([edges, edges.flip(1) + NODES], dim=1)


def layer_pair(name: str, in_channels: int) -> tuple[nn.Module, nn.Module]:
    ours, theirs = LAYERS[name]
    mine, peer = ours(in_channels, CHANNELS, HEADS), theirs(in_channels, CHANNELS, HEADS)
    mine.load_state_dict(peer.state_dict())
    return mine, peer


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


def edge_traffic(rows: Tensor, scores: Tensor, graph: SortedEdges) -> None:
    """Forward and backward: the edges' rows (N, H·C), read where they lie and summed up; their scores (E, H),
    read and written."""
    order, pointers = graph.by_source
    for bag, offsets in ((graph.source, graph.rowptr), (graph.target[order], pointers)):
        F.embedding_bag(bag, rows, offsets, mode="sum", include_last_offset=True)
        scores.clone()


def measure_time(name: str, in_channels: int, rounds: int, thread_counts: list[int]) -> list[dict[str, Any]]:
    """Seconds of ours, theirs and the limit in each round, for each number of threads."""
    torch.manual_seed(0)
    nodes, edge_index = two_graphs()
    x = torch.randn(nodes, in_channels, requires_grad=True)
    ours, theirs = layer_pair(name, in_channels)
    graph = SortedEdges.from_edges(edge_index, nodes)
    rows, scores = torch.randn(nodes, HEADS * CHANNELS), torch.randn(len(graph.source), HEADS)

    def limit() -> None:
        matrix_products(ours, x)
        edge_traffic(rows, scores, graph)

    calls = {
        "theirs": lambda: step(theirs, x, edge_index),
        "ours": lambda: step(ours, x, graph),
        "limit": limit,
        "sorting": lambda: SortedEdges.from_edges(edge_index, nodes).by_source,
    }
    expected = step(theirs, x, edge_index)
    difference = float((step(ours, x, graph) - expected).abs().max() / expected.abs().max())
    limit()  # the comparison has warmed up the others
    found = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        found.append({"threads": threads, "difference": difference, "seconds": measure(calls, rounds, warmup=0)})
    return found


def measure_memory(name: str, in_channels: int, side: str) -> dict[str, float]:
    """How far one forward and backward pass raises the process's peak, in MB."""
    torch.manual_seed(0)
    nodes, edge_index = two_graphs()
    x = torch.randn(nodes, in_channels, requires_grad=True)
    ours, theirs = layer_pair(name, in_channels)
    layer, edges = (ours, SortedEdges.from_edges(edge_index, nodes)) if side == "ours" else (theirs, edge_index)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(layer, x, edges)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mb": (after - before) * RSS_UNIT / MEGABYTE}


def in_fresh_process(allocator: str, what: str, *arguments: Any) -> Any:
    """Run `measure_{what}(*arguments)` in a process of its own, whose C allocator and peak are its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | ALLOCATORS[allocator]
    command = [sys.executable, __file__, "--worker", json.dumps([what, *arguments])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(rounds: int, thread_counts: list[int], file: Path | None) -> None:
    print(f"{'layer':6} {'in':>5} {'threads':>7} {'allocator':>9} {'theirs':>8} {'ours':>8} {'limit':>8}")
    rows, pairs = [], {}
    for name in LAYERS:
        for in_channels, allocator in CASES:
            counts = thread_counts if in_channels == LARGE else thread_counts[-1:]
            for measured in in_fresh_process(allocator, "time", name, in_channels, rounds, counts):
                threads, seconds = measured["threads"], measured.pop("seconds")
                row = {"layer": name, "in_channels": in_channels, "allocator": allocator, **measured}
                row |= {f"{who}_s": round(statistics.median(values), 4) for who, values in seconds.items()}
                rows.append(row)
                print(
                    f"{name:6} {in_channels:5} {threads:7} {allocator:>9}"
                    f" {row['theirs_s']:7.2f}s {row['ours_s']:7.2f}s {row['limit_s']:7.2f}s",
                    flush=True,
                )
                case = f"{name}, {in_channels} in, {threads} thread{'s' if threads > 1 else ''}"
                case += "" if allocator == "default" else f", {allocator} allocator"
                pairs[f"{case}: ours / PyG"] = seconds["ours"], seconds["theirs"]
                if allocator == "default":
                    limit = f"{case}: ours / products and edges {LIMIT}"
                    pairs[limit] = seconds["ours"], seconds["limit"]
    print(f"\nlargest relative difference of the outputs: {max(row['difference'] for row in rows):.1e}")
    print(f"checking and sorting the edges, once a batch: {max(row['sorting_s'] for row in rows) * 1e3:.0f} ms")
    peaks = {}
    for name in LAYERS:
        sides = {side: in_fresh_process("default", "memory", name, LARGE, side) for side in ("ours", "theirs")}
        peaks[name] = {side: round(measured["peak_mb"]) for side, measured in sides.items()}
        print(f"{name}, {LARGE} in: memory's peak {peaks[name]['ours']} MB, theirs {peaks[name]['theirs']} MB")
    title = f"Graph attention, forward and backward, PyG {torch_geometric.__version__}"
    report(title, pairs, torch.device("cpu"), file, rows=rows, peak_mb=peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, *arguments = json.loads(args.worker)
        print(json.dumps({"time": measure_time, "memory": measure_memory}[what](*arguments)))
        return
    compare(args.rounds, args.threads, args.json)


if __name__ == "__main__":
    main()
