"""LoRA: learn a low-rank update of frozen weights (Hu et al. 2021, arXiv:2106.09685).

RuntimeErrors of this module mean that the model is merged, see `merge_lora`."""

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

kaiming_uniform = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))  # as these layers' own weights start


class LoRA(nn.Module):
    """The parametrization W → W + s·BA (eq. 3). A is (rank, in, *kernel), random; B is (out, rank), zero at
    first; s is alpha / rank (sec. 4.1), or alpha / √rank if `scaling` is "rs", which keeps updates of any
    rank at one size (Kalajdzievski 2023, arXiv:2312.03732). W is (out, in, *kernel)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, scaling: str, name: str, init_a: Callable):
        super().__init__()
        self.name, self.scale = name, alpha / (rank if scaling == "standard" else math.sqrt(rank))
        self.A = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.active = self.enabled = True
        with torch.no_grad():
            init_a(self.A)

    def extra_repr(self) -> str:
        return f"{self.name!r}, rank={len(self.A)}, scale={self.scale:g}"

    def forward(self, weight: Tensor) -> Tensor:
        if not (self.active and self.enabled):
            return weight
        updated = weight.new_empty(0).as_subclass(UpdatedWeight)
        updated.weight, updated.lora = weight, self
        return updated


class UpdatedWeight(Tensor):
    """W + s·BA, computed only if somebody looks at it. Layers do not: they apply W, A and B one by one, so
    that the gradient of W, as large as W and of no use, is never computed."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        by_layer = func in (F.linear, F.conv1d, F.conv2d, F.conv3d) and not kwargs and isinstance(args[1], cls)
        if not by_layer or args[6:] not in ((), (1,)):  # the seventh is the number of groups
            return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))
        x, updated, bias, *geometry = *args, *[None] * (3 - len(args))
        lora = updated.lora
        y, h = func(x, updated.weight, bias, *geometry), func(x, lora.A, None, *geometry)
        if func is F.linear and y.ndim == 2:  # scaled and summed up within the product
            return y.addmm_(h, lora.B.to(h.dtype).t(), alpha=lora.scale)
        return y.add_(func(h, (lora.scale * lora.B).view(*lora.B.shape, *[1] * (lora.A.ndim - 2))))


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
    """Freeze `model` and give its layers a low-rank update each, which alone learns. What the network
    computes stays the same until then; but batch norm's running statistics are no parameters, and move in
    train mode as ever.

    Args:
        rank, alpha, scaling: see `LoRA`.
        targets: linear layers and convolutions, as shell patterns of names from `model.named_modules()`,
            such as "layer4.*".
        name: of this adapter. One more than there are is added beside the others and becomes the active one.
        train: patterns of modules that learn as a whole, such as a new head "fc". They get no update, and
            all adapters share them.
        init_a: fills A, (rank, in, *kernel), in place.

    Raises:
        ValueError: a pattern fits no layer that it could (those there are get listed), a layer has an
            adapter of this name or another parametrization, rank < 1, or an unknown scaling.
    """
    if rank < 1 or scaling not in ("standard", "rs"):
        raise ValueError(f"rank must be at least 1, scaling 'standard' or 'rs'; got {rank}, {scaling!r}")
    adapters = loras(model)
    modules = {n: m for n, m in model.named_modules() if "parametrizations." not in n}
    trained = match(train, {n: m for n, m in modules.items() if list(m.parameters())})
    whole = {part for module in trained.values() for part in module.modules()}
    layers = match(targets, {n: m for n, m in modules.items() if isinstance(m, LAYERS) and m not in whole})
    if not layers:
        raise ValueError("no targets; '*' means all linear layers and convolutions")
    for layer, module in layers.items():
        names = [lora.name for _, other, lora in adapters if other is module]
        if name in names:
            raise ValueError(f"layer {layer!r} has an adapter {name!r} already; give the new one another name")
        if is_parametrized(module) and not names:
            raise ValueError(f"layer {layer!r} is parametrized by something else than LoRA")
    model.requires_grad_(False)
    for module in layers.values():
        weight = module.parametrizations.weight.original if is_parametrized(module) else module.weight
        register_parametrization(module, "weight", LoRA(weight, rank, alpha, scaling, name, init_a), unsafe=True)
    for module in trained.values():
        module.requires_grad_(True)
    use_lora(model, name)


def match(patterns: Patterns, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules whose names fit a pattern; a ValueError if one of the patterns fits none."""
    found: dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = {name: module for name, module in modules.items() if fnmatchcase(name, pattern)}
        if not fitting:
            near = get_close_matches(pattern, modules, n=8, cutoff=0.5) or list(modules)[:20]
            raise ValueError(f"no suitable layer fits {pattern!r}; there are {', '.join(near) or 'none'}")
        found |= fitting
    return found


def loras(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module, LoRA]]:
    """(layer's name, layer, LoRA) of all adapters, or of one; a ValueError if there is none of this name."""
    if any("unmerged" in vars(module) for module in model.modules()):
        raise RuntimeError("the model is merged, for inference only; call unmerge_lora(model) first")
    every = [
        (layer, module, lora)
        for layer, module in model.named_modules()
        if is_parametrized(module, "weight")
        for lora in module.parametrizations.weight
        if isinstance(lora, LoRA)
    ]
    names = sorted({lora.name for *_, lora in every})
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}; there are {', '.join(names) or 'none'}")
    return [entry for entry in every if name in (None, entry[2].name)]


def use_lora(model: nn.Module, name: str) -> None:
    """Switch to an adapter: it alone is applied, and it alone learns. ValueError: there is none of the name."""
    loras(model, name)
    for *_, lora in loras(model):
        lora.active = lora.name == name
        lora.requires_grad_(lora.active)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the frozen weights alone are applied: bit for bit what they did before `add_lora`."""
    states = [(lora, lora.enabled) for *_, lora in loras(model)]
    try:
        for lora, _ in states:
            lora.enabled = False
        yield
    finally:
        for lora, enabled in states:
            lora.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Make adapted layers ordinary ones, whose weight is W + s·BA of the active adapter: no latency (sec.
    4.1), and the `state_dict()` of a plain network. W and the adapters are kept aside; until `unmerge_lora`,
    `model.train()` and all that deals with adapters raises a RuntimeError. ValueError: there is no adapter."""
    layers = {module for _, module, _ in loras(model)}
    if not layers:
        raise ValueError("the model has no adapter to merge; add_lora adds one")
    for module in layers:
        merged = dense(module.weight).detach().clone()
        # Not by remove_parametrizations: it changes the class, which copies of the layer share.
        module.unmerged = type(module), module._modules.pop("parametrizations")
        module.__class__ = type(module).__base__
        module.weight = nn.Parameter(merged, requires_grad=False)
    model.train = partial(train_unmerged, model)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit. RuntimeError: the model is not merged."""
    merged = [module for module in model.modules() if "unmerged" in vars(module)]
    if not merged:
        raise RuntimeError("the model is not merged; merge_lora(model) merges it")
    vars(model).pop("train", None)
    for module in merged:
        weight = module._parameters.pop("weight")
        module.__class__, parametrizations = vars(module).pop("unmerged")
        module.parametrizations = parametrizations.to(weight.device, weight.dtype)  # the model may have moved


def train_unmerged(model: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a merged model, which its `eval` calls too."""
    if mode:
        loras(model)  # raises
    return type(model).train(model, mode)


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter alone: LAYER.lora_A, LAYER.lora_B and LAYER.lora_scale of its layers, and under their own
    names the parameters and buffers of modules that learn as a whole (`train` of `add_lora`). As in
    `state_dict()`, the tensors are the model's own. ValueError: there is no adapter of this name."""
    state: dict[str, Tensor] = {}
    for layer, _, lora in loras(model, name):
        scale = torch.tensor(lora.scale, dtype=torch.float64)
        for key, value in (("A", lora.A), ("B", lora.B), ("scale", scale)):
            state[f"{layer}.lora_{key}".lstrip(".")] = value.detach()
    for prefix, module in model.named_modules():
        learning = [(key, p) for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if learning and not isinstance(module, LoRA):
            for key, value in [*learning, *module.named_buffers(recurse=False)]:
                state[f"{prefix}.{key}".lstrip(".")] = value.detach()
    return state


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Fill an adapter that `add_lora` added with what `lora_state_dict` gave. ValueError: the two do not fit
    in layers, shapes, scale or whole modules, which are named; nothing was changed."""
    own = lora_state_dict(model, name)
    problems = [f"{key} is missing" for key in own.keys() - state.keys()]
    problems += [f"{key} is unexpected" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        ours, theirs = own[key], state[key]
        if ours.shape != theirs.shape:
            problems.append(f"{key} is {(*theirs.shape,)}, {(*ours.shape,)} in the model")
        elif key.endswith("lora_scale") and not math.isclose(ours, theirs, rel_tol=1e-3):  # it may be fp16
            problems.append(f"{key} is {theirs:g}, {ours:g} in the model; compare alpha, rank and scaling")
    if problems:
        raise ValueError(f"this is no state of adapter {name!r}: " + "; ".join(sorted(problems)))
    for key, value in own.items():
        value.copy_(state[key])
