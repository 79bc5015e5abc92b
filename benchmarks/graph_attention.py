"""GAT and GATv2 layers of this project beside torch_geometric's, on the CPU.

    python benchmarks/graph_attention.py [--json FILE]

Forward and backward of one layer, `in_channels` → 4 heads of 256, on two graphs of PPI's average size; the
same weights and edges on both sides. Runs alternate (theirs, ours, theirs, …), each pair gives one ratio, and
the table shows the median ratio with its range. The floor is what no implementation can avoid, the matrix
products alone. Much of the peer's time is page faults on half-gigabyte temporaries, so that everything is
also measured with a C allocator told to keep its memory (glibc). Takes about four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_geometric
import torch_geometric.nn as pyg
from torch import Tensor, nn

from pdl_utils.graph import Graph
from pdl_utils.graph_attention import GATConv, GATv2Conv

NODES, DEGREE = 2373, 29  # of one PPI graph, on average
HEADS, CHANNELS = 4, 256
LAYERS = {"GAT": (GATConv, pyg.GATConv), "GATv2": (GATv2Conv, pyg.GATv2Conv)}
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**24)},
}
PAIRS = 3
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


def step(layer: nn.Module, x: Tensor, edges: Tensor | Graph) -> Tensor:
    layer.zero_grad()
    x.grad = None
    out = layer(x, edges)
    out.square().mean().backward()
    return out.detach()


def matrix_products(layer: nn.Module, x: Tensor) -> None:
    """Forward and both backward products of every linear map in the layer."""
    for module in layer.modules():
        if isinstance(module, (nn.Linear, pyg.Linear)):
            h = x.detach() @ module.weight.detach().t()
            h.t() @ x.detach()
            h @ module.weight.detach()


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_time(name: str, in_channels: int, thread_counts: list[int]) -> list[dict[str, Any]]:
    """One row of numbers for each number of threads."""
    torch.manual_seed(0)
    nodes, edge_index = two_graphs()
    x = torch.randn(nodes, in_channels, requires_grad=True)
    ours, theirs = layer_pair(name, in_channels)
    graph = Graph.from_edges(edge_index, nodes)
    expected = step(theirs, x, edge_index)  # the comparison also warms both up
    difference = float((step(ours, x, graph) - expected).abs().max() / expected.abs().max())
    rows = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        pairs = [
            (seconds(lambda: step(theirs, x, edge_index)), seconds(lambda: step(ours, x, graph)))
            for _ in range(PAIRS)
        ]
        ratios = [mine / peer for peer, mine in pairs]
        rows.append(
            {
                "threads": threads,
                "theirs_s": statistics.median(peer for peer, _ in pairs),
                "ours_s": statistics.median(mine for _, mine in pairs),
                "floor_s": min(seconds(lambda: matrix_products(ours, x)) for _ in range(PAIRS)),
                "sorting_s": seconds(lambda: Graph.from_edges(edge_index, nodes).by_source),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "difference": difference,
            }
        )
    return rows


def measure_memory(name: str, in_channels: int, side: str) -> dict[str, float]:
    """How far one forward and backward pass raises the process's peak, in MB."""
    torch.manual_seed(0)
    nodes, edge_index = two_graphs()
    x = torch.randn(nodes, in_channels, requires_grad=True)
    ours, theirs = layer_pair(name, in_channels)
    layer, edges = (ours, Graph.from_edges(edge_index, nodes)) if side == "ours" else (theirs, edge_index)
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


def compare(thread_counts: list[int]) -> list[dict[str, Any]]:
    print(f"torch {torch.__version__}, torch_geometric {torch_geometric.__version__}; ratio = ours / theirs\n")
    print(f"{'layer':6} {'in':>5} {'threads':>7} {'allocator':>9} {'theirs':>8} {'ours':>8} {'floor':>8}"
          f" {'ratio':>6} {'range':>13} {'peak MB, theirs':>16} {'ours':>5} {'ratio':>6}")  # fmt: skip
    rows = []
    for name in LAYERS:
        for in_channels in (1024, 50):
            peak = {
                side: in_fresh_process("default", "memory", name, in_channels, side)["peak_mb"]
                for side in ("theirs", "ours")
            }
            for allocator in ALLOCATORS:
                for measured in in_fresh_process(allocator, "time", name, in_channels, thread_counts):
                    row = {
                        "layer": name, "in_channels": in_channels, "allocator": allocator, **measured,
                        "theirs_peak_mb": peak["theirs"], "ours_peak_mb": peak["ours"],
                        "peak_ratio": peak["ours"] / peak["theirs"],
                    }  # fmt: skip
                    rows.append(row)
                    print(format_row(row), flush=True)
    print(f"\nlargest relative difference of the outputs: {max(row['difference'] for row in rows):.1e}")
    print(f"checking and sorting the edges, once a batch: {max(row['sorting_s'] for row in rows) * 1e3:.0f} ms")
    return rows


def format_row(row: dict[str, Any]) -> str:
    low, high = row["ratio_range"]
    return (
        f"{row['layer']:6} {row['in_channels']:5} {row['threads']:7} {row['allocator']:>9}"
        f" {row['theirs_s']:7.2f}s {row['ours_s']:7.2f}s {row['floor_s']:7.2f}s {row['ratio']:6.2f}"
        f" {f'{low:.2f} to {high:.2f}':>13} {row['theirs_peak_mb']:16.0f} {row['ours_peak_mb']:5.0f}"
        f" {row['peak_ratio']:6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, *arguments = json.loads(args.worker)
        print(json.dumps({"time": measure_time, "memory": measure_memory}[what](*arguments)))
        return
    rows = compare(args.threads)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
