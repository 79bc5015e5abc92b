"""LoRA: learn a low-rank update beside frozen layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Patterns = str | Sequence[str]


class LowRank(nn.Module):
    """The update of one layer, s·B(A(x)): A maps to `rank` numbers, B from them to the layer's outputs.

    A is a layer like the frozen one, with its stride and padding; B looks at one position only, and is zero
    at first. s is alpha / rank (sec. 4.1), or alpha / √rank if `scaling` is "rs", which keeps updates of any
    rank at one size (Kalajdzievski 2023, arXiv:2312.03732). A layer with groups gets `rank` numbers a group.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, scaling: str = "standard") -> None:
        super().__init__()
        self.scale = alpha / (rank if scaling == "standard" else math.sqrt(rank))
        self.groups = g = getattr(base, "groups", 1)
        like: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        if isinstance(base, nn.Linear):
            self.A = nn.Linear(base.in_features, rank, **like)
            self.B = nn.Linear(rank, base.out_features, **like)
        else:
            places = {n: getattr(base, n) for n in ("stride", "padding", "dilation", "padding_mode")}
            self.A = type(base)(base.in_channels, g * rank, base.kernel_size, groups=g, **places, **like)
            self.B = type(base)(g * rank, base.out_channels, 1, groups=g, **like)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.scale * self.A(x))

    def weight(self) -> Tensor:
        """s·BA as one matrix, or one per group: (out, in · kernel)."""
        A = self.A.weight.reshape(self.groups, -1, self.A.weight[0].numel())
        B = self.B.weight.reshape(self.groups, -1, A.shape[1])
        return self.scale * (B @ A).flatten(0, 1)


class LoRA(nn.Module):
    """A frozen layer with low-rank updates beside it, of which one is active: base(x) + s·B(A(x)) (eq. 3)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()  # adapter's name → LowRank
        self.active: str | None = None  # name of the adapter that is applied

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.updates[self.active](x) if self.active in self.updates else y

    @property
    def weight(self) -> Tensor:
        """W + s·BA, for what reads a layer's weight. `forward` does not: W is frozen, and its gradient, as
        large as W, is never computed."""
        W = self.base.weight
        return W + self.updates[self.active].weight().view_as(W) if self.active in self.updates else W

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Patterns = "*",
    *,
    name: str = "default",
    train: Patterns = (),
    scaling: str = "standard",
    init_a: Callable[[Tensor], Any] | None = None,
) -> None:
    """Freeze `model` and wrap its layers in `LoRA`, in place. Only the updates learn. What the network
    computes stays the same until then; but batch norm's running statistics are no parameters, and move in
    train mode as ever.

    Args:
        rank, alpha, scaling: see `LowRank`.
        targets: linear layers and convolutions, as shell patterns of names from `model.named_modules()`,
            such as "layer4.*".
        name: of this adapter. A second one is added beside the first and becomes the active one.
        train: patterns of modules that learn as a whole, such as a new head "fc". They get no update, and
            all adapters share them.
        init_a: fills A's weight, (rank, in, *kernel), in place; by default it starts as any layer does.

    Raises:
        ValueError: a pattern fits no layer that it could (the message lists those that there are), a layer
            has an adapter of this name, rank < 1, an unknown scaling, or a name with a dot.
        RuntimeError: the model is merged.
    """
    if rank < 1 or scaling not in ("standard", "rs") or "." in name:
        wanted = "rank must be at least 1, scaling 'standard' or 'rs', and name without a dot"
        raise ValueError(f"{wanted}; got {rank}, {scaling!r}, {name!r}")
    wrapped, modules = lora_layers(model), outer_modules(model)
    trained = match(train, {n: m for n, m in modules.items() if list(m.parameters()) and not lora_layers(m)})
    whole = {part for module in trained.values() for part in module.modules()}
    if wrapped:
        whole |= {m for m in modules.values() if learns(m)}  # by `train` of an earlier adapter
    suitable = {n: m for n, m in modules.items() if n and type(m) in (*LAYERS, LoRA) and m not in whole}
    layers = match(targets, suitable)
    for layer, module in layers.items():
        if isinstance(module, LoRA) and name in module.updates:
            raise ValueError(f"layer {layer!r} has an adapter {name!r} already; give the new one another name")
    if not wrapped:
        model.requires_grad_(False)
    wrappers = {module: module if isinstance(module, LoRA) else LoRA(module) for module in layers.values()}
    replace(model, wrappers)
    for layer in wrappers.values():
        update = layer.updates[name] = LowRank(layer.base, rank, alpha, scaling)
        if init_a:
            with torch.no_grad():
                init_a(update.A.weight)
    for module in trained.values():
        module.requires_grad_(True)
    use_lora(model, name)


def learns(module: nn.Module) -> bool:
    """Has the module, apart from its parts, a parameter that learns?"""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module: the model's own parts, without what is inside of LoRA layers."""
    inner = {part for m in model.modules() if isinstance(m, LoRA) for part in m.modules() if part is not m}
    return {name: m for name, m in model.named_modules() if m not in inner}


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


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in the place of the old one, in all places where the old one stands."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                setattr(parent, key, new[child])


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, LoRA]:
    """Layer's name → its LoRA: all, or those with one adapter; a ValueError if there is none of this name."""
    if merged_layers(model):
        raise RuntimeError("the model is merged, for inference only; call unmerge_lora(model) first")
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, LoRA)}
    names = sorted({key for layer in layers.values() for key in layer.updates})
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}; there are {', '.join(names) or 'none'}")
    return {layer: module for layer, module in layers.items() if name is None or name in module.updates}


def merged_layers(model: nn.Module) -> dict[nn.Module, LoRA]:
    """Plain layer that `merge_lora` made → the LoRA layer whose place it has."""
    return {m: vars(m)["unmerged"][0] for m in model.modules() if "unmerged" in vars(m)}


def use_lora(model: nn.Module, name: str) -> None:
    """Switch to an adapter: it alone is applied, and it alone learns. ValueError: there is none of the name."""
    lora_layers(model, name)
    for layer in lora_layers(model).values():
        layer.active = name
        for key, update in layer.updates.items():
            update.requires_grad_(key == name)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the frozen layers alone are applied: bit for bit what they did before `add_lora`."""
    active = {layer: layer.active for layer in lora_layers(model).values()}
    try:
        for layer in active:
            layer.active = None
        yield
    finally:
        for layer, name in active.items():
            layer.active = name


def merge_lora(model: nn.Module) -> None:
    """Put plain layers, whose weight is W + s·BA of the active adapter, in the place of the LoRA layers, for
    inference: no latency (sec. 4.1), and the `state_dict()` of a plain network. The LoRA layers are kept
    aside; until `unmerge_lora`, what deals with adapters raises a RuntimeError. ValueError: no adapter."""
    layers = lora_layers(model).values()
    if not layers:
        raise ValueError("the model has no adapter to merge; add_lora adds one")
    plain = {layer: copy.deepcopy(layer.base) for layer in layers}
    for layer, module in plain.items():
        module.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        module.unmerged = (layer,)  # in a tuple, or it would be a part of the module and of its state_dict
    replace(model, plain)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit. RuntimeError: the model is not merged."""
    layers = merged_layers(model)
    if not layers:
        raise RuntimeError("the model is not merged; merge_lora(model) merges it")
    for module, layer in layers.items():
        layer.to(module.weight.device, module.weight.dtype).train(module.training)  # as the model is by now
    replace(model, layers)


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter alone: LAYER.lora_A, LAYER.lora_B and LAYER.lora_scale of its layers, and under their own
    names the parameters and buffers of modules that learn as a whole (`train` of `add_lora`). As in
    `state_dict()`, the tensors are the model's own. ValueError: there is no adapter of this name."""
    state: dict[str, Tensor] = {}
    for layer, module in lora_layers(model, name).items():
        update = module.updates[name]
        state[f"{layer}.lora_A"] = update.A.weight.detach()
        state[f"{layer}.lora_B"] = update.B.weight.detach()
        state[f"{layer}.lora_scale"] = torch.tensor(update.scale, dtype=torch.float64)
    for prefix, module in outer_modules(model).items():
        if learns(module):
            for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
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
