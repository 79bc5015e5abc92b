"""Read what the layers of a model compute, without changing the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of this name; ValueError with similar names if there is none."""
    layers = dict(model.named_modules())
    if not isinstance(name, str):
        known = next((repr(n) for n, layer in layers.items() if layer is name), "none of this model's")
        raise ValueError(
            f"give a layer by its name in model.named_modules(); this {type(name).__name__} is {known}"
        )
    if name not in layers:
        similar = get_close_matches(name, layers, n=5, cutoff=0.5) or [n for n, _ in model.named_children()]
        raise ValueError(f"{type(model).__name__} has no layer {name!r}; did you mean {', '.join(similar)}?")
    return layers[name]


@contextmanager
def record_activations(model: nn.Module, layers: str | Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside the `with`, each forward pass leaves the outputs of these layers in a dictionary.

    The rest of the network gets a copy, so that an in-place operation that follows (`relu_`, `+=`) does not
    overwrite what is kept. The kept tensor requires a gradient, also behind frozen parameters. A layer that runs
    twice in a pass keeps its last output. The hooks are gone after the `with`, also after an error.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r} returns a {type(output).__name__}; choose a layer inside it")
            seen[name] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[name].clone()

        return hook

    names = [layers] if isinstance(layers, (str, nn.Module)) else layers
    if not names:
        raise ValueError("name at least one layer")
    found = {name: find_layer(model, name) for name in names}  # before any hook is placed
    handles = [layer.register_forward_hook(keep(name)) for name, layer in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters and gradients switched on inside the `with`; afterwards all is as it was. With
    frozen parameters, autograd saves nothing for the layers before the first recorded one."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_()
