"""Read the activations of a model's layers without touching the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

Layer = str | nn.Module


def find_layers(model: nn.Module, layers: Layer | Sequence[Layer]) -> dict[str, nn.Module]:
    """Name → module for layers given by name or as modules of `model`, in the order given.

    Raises:
        ValueError: no layer was given, a name is not in the model (near matches are listed), or a
            module is not part of it.
    """
    by_name = dict(model.named_modules())
    names = {module: name for name, module in by_name.items()}
    found = {}
    for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers:
        if isinstance(layer, nn.Module):
            if layer not in names:
                raise ValueError(f"{type(layer).__name__} is not a part of this {type(model).__name__}")
            found[names[layer]] = layer
        elif layer in by_name:
            found[layer] = by_name[layer]
        else:
            near = get_close_matches(layer, by_name, n=5, cutoff=0.5) or [n for n, _ in model.named_children()]
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}; did you mean {', '.join(near)}?")
    if not found:
        raise ValueError("name at least one layer, for example 'layer4'")
    return found


@contextmanager
def record_activations(
    model: nn.Module, layers: Layer | Sequence[Layer], *, start_graph: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Inside the `with`, every forward pass of `model` leaves its layers' outputs in a dictionary.

    What is kept is exactly what the layer returned: the rest of the network is handed a copy, so an
    in-place operation that follows (`relu_`, `+=`) does not overwrite it, and gradients with respect
    to it are those at that very place. A layer that runs twice in a pass keeps its last output.

    >>> with record_activations(model, "layer4") as seen:
    ...     logits = model(images)
    >>> gradient, = torch.autograd.grad(logits[0, 281], seen["layer4"])

    Args:
        model: any module; nothing about it changes, and its hooks are gone after the `with`, also
            when the forward pass raises.
        layers: names from `model.named_modules()`, or modules.
        start_graph: record gradients from the first of the layers on only. What comes before runs as
            under `torch.no_grad()`, which saves its time and memory; works inside `no_grad()` too and
            with frozen parameters.

    Raises:
        ValueError: from `find_layers`.
        TypeError: a layer returns something else than one tensor.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r} ({type(module).__name__}) returns {type(output).__name__}, not a tensor; "
                    "choose a layer inside it"
                )
            if start_graph:
                torch.set_grad_enabled(True)  # until the enclosing no_grad() ends
                if not output.requires_grad:
                    output = output.detach().requires_grad_()
            seen[name] = output
            return output.clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in find_layers(model, layers).items()]
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not start_graph):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with`; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
