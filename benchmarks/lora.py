"""LoRA beside peft and beside the plain network, on one core.

    python benchmarks/lora.py [--rounds 30] [--json FILE]

A training step (forward, backward, SGD) with the same A and B on both sides, and inference with the update
merged. peft computes the same formula in the same order, so that the two take the same time; what is left of a
step when nothing learns (the frozen layers' outputs, and the gradients of their inputs except the first) is the
limit. Merged, ours is a plain layer. The process's CPU time is compared, which other programs disturb less than
the clock on the wall.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import peft
import torch
from side_by_side import LIMIT, Pairs, arguments, measure, report
from torch import Tensor, nn

from pdl_utils.few_labels import LoRA, add_lora, merge_lora

ALPHA = 12


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 5))


def conv_net() -> nn.Sequential:
    """Two convolutions as in a ResNet's first stage."""
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
    for name in layers:
        update, peer = ours.get_submodule(name).updates["default"], theirs.get_submodule(name)
        nn.init.normal_(update.B.weight, std=0.01)
        peer.lora_A["default"].load_state_dict(update.A.state_dict())
        peer.lora_B["default"].load_state_dict(update.B.state_dict())
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
    return lambda: frozen[1:](frozen[0](x).requires_grad_()).square().mean().backward()


def compare(case: str, rounds: int) -> Pairs:
    """Seconds of ours and of theirs in each round, for the ratios of a case."""
    torch.manual_seed(0)
    build, shape, rank = CASES[case]
    plain, x = build(), torch.randn(shape)
    ours, theirs = model_pair(plain, rank)
    torch.testing.assert_close(ours(x), theirs(x))
    calls = {"ours": step(ours, x), "peft": step(theirs, x), "frozen": frozen_step(plain, x)}
    calls["plain"] = step(copy.deepcopy(plain), x)
    steps = measure(calls, rounds, warmup=2, clock=time.process_time)
    merge_lora(ours)
    assert not any(isinstance(module, LoRA) for module in ours.modules())
    with torch.no_grad():
        merged = measure(
            {"ours": lambda: ours(x), "plain": lambda: plain(x)}, 4 * rounds, warmup=2, clock=time.process_time
        )
    return {
        f"{case}, step: ours / peft": (steps["ours"], steps["peft"]),
        f"{case}, step: ours / plain network learning": (steps["ours"], steps["plain"]),
        f"{case}, step: ours / frozen layers {LIMIT}": (steps["ours"], steps["frozen"]),
        f"{case}, merged: ours / plain {LIMIT}": (merged["ours"], merged["plain"]),
    }


def main() -> None:
    args = arguments(__doc__, rounds=30)
    torch.set_num_threads(1)
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for case in CASES:
        pairs |= compare(case, args.rounds)
    report(f"LoRA, CPU time, peft {peft.__version__}", pairs, torch.device("cpu"), args.json)


if __name__ == "__main__":
    main()
