"""Read what the layers of a model compute, without changing the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from textwrap import shorten

import torch
from torch import Tensor, nn


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of this name in `model.named_modules()`; ValueError with similar names if there is none."""
    layers = dict(model.named_modules(remove_duplicate=False))
    if name not in layers:
        similar = [known for known, layer in layers.items() if layer is name]  # the layer was given, not its name
        similar = similar or get_close_matches(str(name), layers, n=5, cutoff=0.5) or list(layers)[1:9]
        kind, given = type(model).__name__, shorten(str(name), 40)
        raise ValueError(f"{kind} has no layer named {given!r}; did you mean {', '.join(similar)}?")
    return layers[name]


@contextmanager
def record_activations(model: nn.Module, layers: str | Sequence[str]) -> Iterator[dict[str, Tensor | None]]:
    """Inside the `with`, each forward pass leaves the outputs of these layers in a dictionary; None if one did not
    run, the last output if it ran twice. The kept tensor requires a gradient, also behind frozen parameters. The
    rest of the network gets a copy: what follows in place (`relu_`, `+=`) does not overwrite what is kept."""
    names = [layers] if isinstance(layers, (str, nn.Module)) else layers
    if not names:
        raise ValueError("name at least one layer")
    found = {name: find_layer(model, name) for name in names}  # before any hook is placed
    seen: dict[str, Tensor | None] = dict.fromkeys(found)

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r} returns a {type(output).__name__}; choose a layer inside it")
            seen[name] = output if output.requires_grad else output.detach().requires_grad_()
            return seen[name].clone()

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in found.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters (autograd then saves nothing before the first recorded layer) and gradients
    switched on inside the `with`; afterwards all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, _ in modes:  # model.eval() may do more, as merge LoRA, that is not undone below
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_()
