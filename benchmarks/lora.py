"""LoRA of this project beside peft's and beside the plain network, on the CPU.

    python benchmarks/lora.py [--rounds 30] [--threads 1] [--json FILE]

A training step (forward, backward, SGD) with the same A and B on both sides, and inference with the update
merged. Contestants run in turn, round after round, so that a busy moment of the machine meets them all; ratios
are taken within a round, and the table shows their median with the quartiles and the range. By default the
process's CPU time is compared, which other programs on the machine disturb less than the clock on the wall
(`--clock wall`). Takes about five minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from pdl_utils.lora import LoRA, add_lora, merge_lora
from pdl_utils.settings import save_atomically

RANKS = (1, 8, 64)
ALPHA = 12
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
Calls = dict[str, Callable[[], None]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 5))


def conv_net() -> nn.Module:
    """Two convolutions as in a ResNet's second stage."""
    first, second = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP, batch 128": (mlp, (128, 784)),
    "MLP, batch 256": (mlp, (256, 784)),
    "3×3, 16×64×16×16": (conv_net, (16, 64, 16, 16)),
}


def model_pair(plain: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """The network with our LoRA and with peft's on every layer, with the same A and B, none of them zero."""
    layers = [name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=layers)
    ours, theirs = copy.deepcopy(plain), peft.inject_adapter_in_model(config, copy.deepcopy(plain))
    add_lora(ours, rank, ALPHA)
    updates = [module for module in ours.modules() if isinstance(module, LoRA)]
    for name, update in zip(layers, updates, strict=True):
        peer = theirs.get_submodule(name)
        nn.init.normal_(update.B, std=0.01)
        for mine, yours in ((update.A, peer.lora_A["default"]), (update.B, peer.lora_B["default"])):
            yours.weight.data.copy_(mine.detach().view_as(yours.weight))
    return ours, theirs


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step of all that learns in the model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def call() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return call


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.eval()

    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def measure(calls: Calls, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two rounds to warm up; every other round runs backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            started = clock()
            calls[name]()
            if number >= 0:
                seconds[name].append(clock() - started)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, quartiles, least and largest of the ratios of two calls within a round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartiles": [low, high], "range": [min(values), max(values)]}


def compare(case: str, rank: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """One row: the ratios of a network at a rank."""
    torch.manual_seed(0)
    build, shape = CASES[case]
    plain, x = build(), torch.randn(shape)
    ours, theirs = model_pair(plain, rank)
    with torch.no_grad():
        expected = theirs(x)
        difference = float((ours(x) - expected).norm() / expected.norm())
    training = measure({"plain": step(plain, x), "peft": step(theirs, x), "ours": step(ours, x)}, rounds, clock)
    merge_lora(ours)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    calls = {"plain": inference(plain, x), "peft": inference(theirs, x), "ours": inference(ours, x)}
    merged = measure(calls, 3 * rounds, clock)
    return {
        "case": case,
        "rank": rank,
        "difference": difference,
        "step_ms": statistics.median(training["ours"]) * 1e3,
        "step / peft": ratio(training["ours"], training["peft"]),
        "step / plain": ratio(training["ours"], training["plain"]),
        "merged / plain": ratio(merged["ours"], merged["plain"]),
        "merged / peft": ratio(merged["ours"], merged["peft"]),
    }


RATIOS = ("step / peft", "step / plain", "merged / plain", "merged / peft")


def format_row(row: dict[str, Any]) -> str:
    cells = []
    for name in RATIOS:
        r = row[name]
        spread = "{:.2f}–{:.2f}, {:.2f}–{:.2f}".format(*r["quartiles"], *r["range"])
        cells.append(f"{r['median']:5.3f} ({spread})")
    return f"{row['case']:18} {row['rank']:4} {row['step_ms']:6.1f}  " + "  ".join(f"{cell:30}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, peft {peft.__version__}, threads {args.threads}, {args.clock} time")
    print("ratio of our time to the other: median (quartiles, range)\n")
    print(f"{'network':18} rank     ms  " + "  ".join(f"{name:30}" for name in RATIOS))
    rows = []
    for case in CASES:
        for rank in RANKS:
            rows.append(compare(case, rank, args.rounds, CLOCKS[args.clock]))
            print(format_row(rows[-1]), flush=True)
    print(f"\nlargest relative difference of the outputs to peft's: {max(row['difference'] for row in rows):.1e}")
    if args.json:
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        save_atomically(lambda partial: partial.write_text(text, encoding="utf-8"), args.json)


if __name__ == "__main__":
    main()
