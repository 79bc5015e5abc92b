"""LoRA: train a low-rank update of frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from torch.utils._pytree import tree_map

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Patterns = str | Sequence[str]

kaiming_uniform = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))  # as nn.Linear and nn.Conv2d start


class LoRA(nn.Module):
    """A parametrization, W → W + s·BA (eq. 3), that starts as the identity.

    Args:
        weight: W, (out, in) of a linear layer or (out, in, *kernel) of a convolution.
        rank: r; A is (r, in, *kernel), B is (out, r).
        alpha, scaling: s is alpha / r ("standard", sec. 4.1), or alpha / √r ("rs", Kalajdzievski 2023,
            arXiv:2312.03732), with which updates of any rank are of one size.
        name: of the adapter that this layer's A and B belong to.
        init_a: fills A in place. B is zero.
    """

    def __init__(
        self,
        weight: Tensor,
        rank: int,
        alpha: float,
        scaling: str = "standard",
        name: str = "default",
        init_a: Callable[[Tensor], Any] = kaiming_uniform,
    ):
        super().__init__()
        self.name, self.scale = name, alpha / (rank if scaling == "standard" else math.sqrt(rank))
        self.A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.active = self.enabled = True
        with torch.no_grad():
            init_a(self.A)

    def forward(self, weight: Tensor) -> Tensor:
        if not (self.active and self.enabled):
            return weight
        updated = weight.new_empty(0).as_subclass(UpdatedWeight)
        updated.weight, updated.lora = weight, self
        return updated


class UpdatedWeight(Tensor):
    """W + s·BA, computed when somebody looks at it. A layer does not: it applies W, A and B one after the
    other. So W's gradient, as large as W and of no use, is never computed (sec. 4.2)."""

    weight: Tensor
    lora: LoRA

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        layer_op = func in (F.linear, F.conv1d, F.conv2d, F.conv3d) and not kwargs and isinstance(args[1], cls)
        if layer_op and args[6:] in ((), (1,)):  # the seventh is the number of groups
            x, updated, bias, *geometry = *args, *[None] * (3 - len(args))
            lora, kernel = updated.lora, (1,) * (updated.weight.ndim - 2)
            up = (lora.scale * lora.B).view(*lora.B.shape, *kernel)
            return func(x, updated.weight, bias, *geometry) + func(func(x, lora.A, None, *geometry), up)
        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def dense(x: Any) -> Any:
    """W + s·BA as an ordinary tensor; anything else as it is."""
    if not isinstance(x, UpdatedWeight):
        return x
    with torch.autocast(x.weight.device.type, enabled=False):
        return x.weight + (x.lora.B @ x.lora.A.flatten(1)).view_as(x.weight) * x.lora.scale


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Patterns = "*",
    *,
    name: str = "default",
    train: Patterns = (),
    scaling: str = "standard",
    init_a: Callable[[Tensor], Any] = kaiming_uniform,
) -> None:
    """Freeze `model` and give its layers a low-rank update each, which alone learns. The function that the
    network computes is unchanged until A and B are trained. Batch norm's running statistics are no
    parameters: they move in train mode, as ever.

    Args:
        rank, alpha, scaling, init_a: see `LoRA`.
        targets: which linear layers and convolutions, by shell patterns of names from
            `model.named_modules()`, such as "layer4.*". A grouped convolution's W is (out, in / groups,
            *kernel), and so is its update.
        name: of this adapter. Another one than those there are is added beside them and becomes the active
            one; see `use_lora`.
        train: patterns of modules that learn as a whole, such as a new head "fc". They get no update, and
            all adapters share them.

    Raises:
        ValueError: a pattern fits nothing that it could; a layer has an adapter of this name already, or
            another parametrization; the rank is below 1; the scaling is unknown.
        RuntimeError: the model is merged.
    """
    if rank < 1 or scaling not in ("standard", "rs"):
        raise ValueError(f"rank must be at least 1, scaling 'standard' or 'rs'; got {rank}, {scaling!r}")
    there = {(layer, lora.name) for layer, _, lora in loras(model)}
    modules = {n: m for n, m in model.named_modules() if not n.partition("parametrizations.")[1]}
    trained = match(train, {n: m for n, m in modules.items() if any(True for _ in m.parameters())})
    inside = {m for module in trained.values() for m in module.modules()}
    supported = {n: m for n, m in modules.items() if isinstance(m, LAYERS) and m not in inside}
    layers = match(targets, supported)
    if not layers:
        raise ValueError("no targets; '*' means all linear layers and convolutions")
    for layer, module in layers.items():
        if (layer, name) in there:
            raise ValueError(f"layer {layer!r} has an adapter {name!r} already; give the new one another name")
        if is_parametrized(module) and not any(layer == other for other, _ in there):
            raise ValueError(f"the weight of layer {layer!r} is parametrized by something else than LoRA")
    model.requires_grad_(False)
    for module in layers.values():
        weight = module.parametrizations.weight.original if is_parametrized(module) else module.weight
        register_parametrization(module, "weight", LoRA(weight, rank, alpha, scaling, name, init_a), unsafe=True)
    for module in trained.values():
        module.requires_grad_(True)
    use_lora(model, name)


def match(patterns: Patterns, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules whose names fit at least one of the patterns.

    Raises:
        ValueError: a pattern fits none, or there is none."""
    found: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = {name: module for name, module in modules.items() if fnmatchcase(name, pattern)}
        if not fitting:
            near = get_close_matches(pattern, modules, n=8, cutoff=0.5) or list(modules)[:20]
            raise ValueError(f"no suitable layer fits {pattern!r}; there are {', '.join(near) or 'none'}")
        found |= fitting
    return found


def loras(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module, LoRA]]:
    """Layer's name, layer and LoRA of all adapters, or of one.

    Raises:
        ValueError: there is no adapter of this name.
        RuntimeError: the model is merged.
    """
    refuse_merged(model)
    every = [
        (layer, module, lora)
        for layer, module in model.named_modules()
        if is_parametrized(module, "weight")
        for lora in module.parametrizations.weight
        if isinstance(lora, LoRA)
    ]
    names = {lora.name for *_, lora in every}
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}; there are {', '.join(sorted(names)) or 'none'}")
    return [found for found in every if name in (None, found[2].name)]


def use_lora(model: nn.Module, name: str) -> None:
    """Switch to another adapter: it alone is applied, and it alone learns.

    Raises:
        ValueError: there is no adapter of this name.
        RuntimeError: the model is merged.
    """
    loras(model, name)
    for *_, lora in loras(model):
        lora.active = lora.name == name
        lora.requires_grad_(lora.active)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model is the network that it was before `add_lora`, bit for bit.

    Raises:
        RuntimeError: the model is merged.
    """
    states = [(lora, lora.enabled) for *_, lora in loras(model)]
    try:
        for lora, _ in states:
            lora.enabled = False
        yield
    finally:
        for lora, enabled in states:
            lora.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Make every adapted layer an ordinary one again whose weight is W + s·BA of the active adapter
    (sec. 4.1: no latency), for inference. W itself and the adapters are kept for `unmerge_lora`; until then
    `model.train()` and all that concerns adapters is refused, and `state_dict()` is that of a plain network.

    Raises:
        ValueError: there is nothing to merge.
        RuntimeError: the model is merged already.
    """
    layers = {layer: module for layer, module, _ in loras(model)}
    if not layers:
        raise ValueError("the model has no adapter; add_lora gives it one")
    for module in layers.values():
        merged = dense(module.weight).detach().clone()
        # By hand: remove_parametrizations would change the class, which copies of this layer share.
        module.unmerged = type(module), module._modules.pop("parametrizations")
        module.__class__ = type(module).__bases__[0]
        module.weight = nn.Parameter(merged, requires_grad=False)
    model.train = partial(train_unmerged, model)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: W and the adapters are what they were, bit for bit.

    Raises:
        RuntimeError: the model is not merged.
    """
    if not any(map(is_merged, model.modules())):
        raise RuntimeError("the model is not merged; merge_lora(model) would do it")
    for module in list(model.modules()):
        vars(module).pop("train", None)
        if is_merged(module):
            like = module.weight  # the model may have moved since
            del module.weight
            module.__class__, parametrizations = vars(module).pop("unmerged")
            module.parametrizations = parametrizations.to(like.device, like.dtype)


def is_merged(module: nn.Module) -> bool:
    return "unmerged" in vars(module)


def refuse_merged(model: nn.Module) -> None:
    if any(map(is_merged, model.modules())):
        raise RuntimeError("the model is merged, for inference only; call unmerge_lora(model) first")


def train_unmerged(model: nn.Module, mode: bool = True) -> nn.Module:
    """What `model.train` is while the model is merged; `model.eval()` comes here too."""
    if mode:
        refuse_merged(model)
    return type(model).train(model, mode)


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter alone: "LAYER.lora_A", "LAYER.lora_B" and "LAYER.lora_scale" of its layers, and, under
    their own names, the parameters and buffers of modules that learn as a whole (`train` of `add_lora`).
    The tensors are the model's own, as in `state_dict()`, and change with it.

    Raises:
        ValueError: there is no adapter of this name.
        RuntimeError: the model is merged.
    """
    state: dict[str, Tensor] = {}
    for layer, _, lora in loras(model, name):
        scale = torch.tensor(lora.scale, dtype=torch.float64)
        for key, value in (("A", lora.A), ("B", lora.B), ("scale", scale)):
            state[f"{layer}.lora_{key}".lstrip(".")] = value.detach()
    for prefix, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        if own and not isinstance(module, LoRA):
            for key, value in [*own.items(), *module.named_buffers(recurse=False)]:
                state[f"{prefix}.{key}".lstrip(".")] = value.detach()
    return state


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Fill an adapter that `add_lora` made with what `lora_state_dict` saved.

    Raises:
        ValueError: the two do not fit (layers, shapes, scale, trained modules); nothing was changed.
        RuntimeError: the model is merged.
    """
    own = lora_state_dict(model, name)
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unexpected" for key in state if key not in own]
    for key in own.keys() & state.keys():
        ours, theirs = own[key], state[key]
        if ours.shape != theirs.shape:
            problems.append(f"{key} is {(*theirs.shape,)}, {(*ours.shape,)} in the model")
        elif key.endswith("lora_scale") and not math.isclose(ours, theirs, rel_tol=1e-3):  # saved in fp16?
            problems.append(f"{key} is {theirs.item():g}, {ours.item():g} in the model (alpha, rank, scaling)")
    if problems:
        raise ValueError(f"this is no state of adapter {name!r}: " + "; ".join(sorted(problems)))
    for key, value in own.items():
        value.copy_(state[key])
