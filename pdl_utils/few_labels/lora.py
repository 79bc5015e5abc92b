"""LoRA: learn a low-rank update beside frozen layers (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """The update of one layer, s·B(A(x)): A maps to `rank` numbers, B from them to the layer's outputs.

    A is a layer like the frozen one, with its stride and padding; B looks at one position only, and is zero
    at first. s is alpha / rank (sec. 4.1), or alpha / √rank if `scaling` is "rs", which keeps updates of any
    rank at one size (Kalajdzievski 2023, arXiv:2312.03732).
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, scaling: str = "standard") -> None:
        super().__init__()
        self.scale = alpha / (rank if scaling == "standard" else math.sqrt(rank))
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        if isinstance(base, nn.Linear):
            self.A = nn.Linear(base.in_features, rank, **like)
            self.B = nn.Linear(rank, base.out_features, **like)
        else:
            places = {n: getattr(base, n) for n in ("stride", "padding", "dilation", "padding_mode")}
            self.A = nn.Conv2d(base.in_channels, rank, base.kernel_size, **places, **like)
            self.B = nn.Conv2d(rank, base.out_channels, 1, **like)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.scale * self.A(x))


class LoRA(nn.Module):
    """A frozen layer with low-rank updates beside it, of which one is active: base(x) + s·B(A(x)) (eq. 3)."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.updates = nn.ModuleDict()  # adapter's name → LowRank
        self.active: str | None = None  # name of the adapter that is applied

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.updates[self.active](x) if self.active in self.updates else y


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: str = "*", *, name: str = "default",
    scaling: str = "standard", init_a: Callable[[Tensor], object] | None = None,
) -> None:  # fmt: skip
    """Freeze `model` and wrap its layers in `LoRA`, in place. Only the updates learn, and what is then unfrozen by
    hand, such as a new head. What the network computes stays the same until they have learned; but batch norm's
    running statistics are no parameters, and move in train mode.

    Args:
        rank, alpha, scaling: see `LowRank`.
        targets: linear layers and 2-d convolutions without groups, as a shell pattern of names from
            `model.named_modules()`, such as "layer4.*"; for a second adapter, layers that have the first.
        name: of this adapter, which becomes the active one.
        init_a: fills A's weight, (rank, in, *kernel), as `nn.init.normal_` does; None: as in any layer.

    Raises:
        ValueError: rank < 1, an unknown scaling, a name that is taken or has a dot, or no layer fits `targets`.
        RuntimeError: the model is merged.
    """
    wrapped = lora_layers(model)
    if rank < 1 or scaling not in ("standard", "rs") or "." in name:
        raise ValueError(f"rank < 1, unknown scaling or name with a dot: {rank}, {scaling!r}, {name!r}")
    if any(name in layer.updates for layer in wrapped.values()):
        raise ValueError(f"there is an adapter {name!r} already; give the new one another name")
    layers = {n: m for n, m in model.named_modules() if n and type(m) in (nn.Linear, nn.Conv2d)}
    suitable = wrapped or {n: m for n, m in layers.items() if getattr(m, "groups", 1) == 1}
    chosen = [n for n in suitable if fnmatchcase(n, targets)]
    if not chosen:
        raise ValueError(f"no suitable layer fits {targets!r}; there are {', '.join(suitable) or 'none'}")
    if not wrapped:
        model.requires_grad_(False)
    for n in chosen:
        layer = wrapped[n] if wrapped else LoRA(suitable[n])
        update = layer.updates[name] = LowRank(layer.base, rank, alpha, scaling)
        if init_a:
            init_a(update.A.weight)
        model.set_submodule(n, layer)
    use_lora(model, name)


def lora_layers(model: nn.Module, name: str | None = None) -> dict[str, LoRA]:
    """Layer's name → its LoRA: all, or those with one adapter; a ValueError if there is none of this name."""
    if any(hasattr(module, "unmerged") for module in model.modules()):
        raise RuntimeError("the model is merged, for inference only; call unmerge_lora(model) first")
    layers = {n: module for n, module in model.named_modules() if isinstance(module, LoRA)}
    names = {adapter for layer in layers.values() for adapter in layer.updates}
    if name not in names | {None}:
        raise ValueError(f"the model has no adapter {name!r}; there are {', '.join(sorted(names)) or 'none'}")
    return {n: layer for n, layer in layers.items() if name is None or name in layer.updates}


def use_lora(model: nn.Module, name: str) -> None:
    """Switch to an adapter: it alone is applied, and it alone learns. ValueError: there is none of the name."""
    lora_layers(model, name)
    for layer in lora_layers(model).values():
        layer.active = name
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(key.startswith(f"updates.{name}."))


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


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Put plain layers, whose weight is W + s·BA of the active adapter, in the place of the LoRA layers: no
    latency (sec. 4.1), and the `state_dict()` of a plain network. RuntimeError: it is merged already."""
    for n, layer in lora_layers(model).items():
        plain = copy.deepcopy(layer.base)
        if layer.active in layer.updates:
            update = layer.updates[layer.active]
            BA = update.B.weight.flatten(1) @ update.A.weight.flatten(1)
            plain.weight += (update.scale * BA).view_as(plain.weight)
        plain.unmerged = (layer,)  # in a tuple, or it would be a part of the module and of its state_dict
        model.set_submodule(n, plain)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit, where the model is on the same device."""
    for n, module in list(model.named_modules()):
        if hasattr(module, "unmerged"):
            model.set_submodule(n, module.unmerged[0])


def lora_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter alone, not copied: LAYER.lora_A, LAYER.lora_B and LAYER.lora_scale of its layers, and parameters
    (no buffers) that were unfrozen by hand. ValueError: there is no adapter of this name."""
    state = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad and ".updates." not in k}
    for n, layer in lora_layers(model, name).items():
        update = layer.updates[name]
        state[f"{n}.lora_A"] = update.A.weight.detach()
        state[f"{n}.lora_B"] = update.B.weight.detach()
        state[f"{n}.lora_scale"] = torch.tensor(update.scale, dtype=torch.float64)
    return state


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Fill an adapter that `add_lora` added with what `lora_state_dict` gave. ValueError: the two do not fit
    in layers, shapes, scale or unfrozen parameters, which are named; nothing was changed."""
    own = lora_state_dict(model, name)
    ours, theirs = (
        {k: f"{v:g}" if k.endswith(".lora_scale") else f"{(*v.shape,)}" for k, v in tensors.items()}
        for tensors in (own, state)
    )
    wrong = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if wrong:
        problems = (f"{k} is {theirs.get(k, 'missing')}, {ours.get(k, 'missing')} in the model" for k in wrong)
        raise ValueError(f"this is no state of adapter {name!r}: {'; '.join(problems)}")
    for key, value in own.items():
        value.copy_(state[key])
