"""LoRA of this project beside peft's and beside the plain network, on the CPU.

    python benchmarks/lora.py [--rounds 30] [--threads 1] [--json FILE]

A training step (forward, backward, SGD) with the same A and B on both sides, and inference with the update
merged. No step can do without the frozen layers' outputs and the gradients of their inputs, the first layer's
excepted: that is its limit. By default the process's CPU time is compared, which other programs on the machine
disturb less than the clock on the wall (`--clock wall`).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from side_by_side import LIMIT, measure, report
from torch import Tensor, nn

from pdl_utils.few_labels.lora import LoRA, add_lora, merge_lora

ALPHA = 12
CLOCKS = {"cpu": ("CPU time", time.process_time), "wall": ("wall time", time.perf_counter)}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 5))


def conv_net() -> nn.Sequential:
    """Two convolutions as in a ResNet's second stage."""
    first, second = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


# Name → network, shape of its input, rank.
CASES: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "MLP, batch 128, rank 8": (mlp, (128, 784), 8),
    "MLP, batch 128, rank 64": (mlp, (128, 784), 64),
    "3×3 on 16×64×16×16, rank 8": (conv_net, (16, 64, 16, 16), 8),
}


def model_pair(plain: nn.Sequential, rank: int) -> tuple[nn.Module, nn.Module]:
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


def frozen_step(model: nn.Sequential, x: Tensor) -> Callable[[], None]:
    """What is left of a step if nothing learns."""
    frozen = copy.deepcopy(model).requires_grad_(False)

    def call() -> None:
        frozen[1:](frozen[0](x).requires_grad_()).square().mean().backward()

    return call


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.eval()

    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def compare(case: str, rounds: int, clock: Callable[[], float]) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of ours and of theirs in each round, for the ratios of a case."""
    torch.manual_seed(0)
    build, shape, rank = CASES[case]
    plain, x = build(), torch.randn(shape)
    ours, theirs = model_pair(plain, rank)
    with torch.no_grad():
        expected = theirs(x)
        difference = float((ours(x) - expected).norm() / expected.norm())
    print(f"{case}: relative difference of the outputs to peft's {difference:.1e}", flush=True)
    calls = {
        "plain": step(plain, x),
        "frozen": frozen_step(plain, x),
        "peft": step(theirs, x),
        "ours": step(ours, x),
    }
    steps = measure(calls, rounds, warmup=2, clock=clock)
    merge_lora(ours)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    calls = {"plain": inference(plain, x), "peft": inference(theirs, x), "ours": inference(ours, x)}
    merged = measure(calls, 3 * rounds, warmup=2, clock=clock)
    return {
        f"{case}, step: ours / peft": (steps["ours"], steps["peft"]),
        f"{case}, step: ours / plain network learning": (steps["ours"], steps["plain"]),
        f"{case}, step: ours / frozen layers {LIMIT}": (steps["ours"], steps["frozen"]),
        f"{case}, merged: ours / peft": (merged["ours"], merged["peft"]),
        f"{case}, merged: ours / plain {LIMIT}": (merged["ours"], merged["plain"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = {}
    for case in CASES:
        pairs |= compare(case, args.rounds, CLOCKS[args.clock][1])
    title = f"LoRA, {CLOCKS[args.clock][0]}, peft {peft.__version__}"
    report(title, pairs, torch.device("cpu"), args.json)


if __name__ == "__main__":
    main()
