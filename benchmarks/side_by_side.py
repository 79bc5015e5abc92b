"""What the benchmarks share: contestants that run in turn, ratios within a round, and a report."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pdl_utils.settings import device_name, save_text

LIMIT = "(limit)"  # ends the name of a ratio to what nobody can avoid, rather than to a peer
Pairs = Mapping[str, tuple[list[float], list[float]]]  # what is compared → seconds of ours, seconds of the other


def arguments(description: str | None, rounds: int) -> argparse.Namespace:
    """The options of every benchmark; `rounds` is its own number of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"at most; by default {rounds}")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def measure(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    budget: float = 90.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after some rounds to warm up. All contestants run in turn, every
    other round backwards, so that a busy moment of the machine meets them all. On a slow machine the rounds
    end when `budget` seconds are spent, but not before there are three."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for number in range(-warmup, rounds):
        if number >= 3 and time.perf_counter() - begun > budget:
            break
        for name in list(calls)[:: -1 if number % 2 else 1]:
            started = clock()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - started)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of two calls within a round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(title: str, pairs: Pairs, device: torch.device, file: Path | None, **details: Any) -> dict[str, Any]:
    """Print the ratio of every pair of contestants, ours / theirs, and write them to a JSON file if one is given:
    {"title", "device", "torch", "ratios": {name: {"median", "min", "max"}}} and the `details`."""
    where = device_name(device)
    if device.type == "cpu":
        where += f" with {torch.backends.cpu.get_cpu_capability()}"
    found = {"title": title, "device": where, "torch": torch.__version__, "ratios": {}, **details}
    print(f"\n{title}\n{where}, torch {torch.__version__}\n")
    print(f"{'ratio of times, ours / theirs':65} median  (range)")
    for name, (ours, theirs) in pairs.items():
        found["ratios"][name] = r = {key: round(value, 4) for key, value in ratio(ours, theirs).items()}
        print(f"{name:65} {r['median']:6.2f}  ({r['min']:.2f}–{r['max']:.2f})  {len(ours)} rounds")
    if file:
        save_json(found, file)
    return found


def save_json(content: Any, file: Path) -> None:
    save_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", file)
