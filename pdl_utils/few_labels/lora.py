"""LoRA: learn a low-rank update beside frozen layers (Hu et al. 2021, arXiv:2106.09685)."""

import copy
import math
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """A frozen layer with a low-rank update beside it: base(x) + s·B(A(x)) (eq. 3).

    A is a layer like the frozen one, with its stride and padding, to `rank` numbers; B looks at one position
    only, and is zero at first. s is alpha / rank (sec. 4.1), or alpha / √rank if `scaling` is "rs" (Kalajdzievski
    2023, arXiv:2312.03732)."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, scaling: str = "standard") -> None:
        super().__init__()
        self.base, self.scale = base, alpha / {"standard": rank, "rs": math.sqrt(rank)}[scaling]
        wide = torch.promote_types(base.weight.dtype, torch.float32)  # half precision would round small steps away
        like = {"bias": False, "device": base.weight.device, "dtype": wide}
        if isinstance(base, nn.Linear):
            self.A, self.B = nn.Linear(base.in_features, rank, **like), nn.Linear(rank, base.out_features, **like)
        else:
            places = {n: getattr(base, n) for n in ("stride", "padding", "dilation", "padding_mode")}
            self.A = nn.Conv2d(base.in_channels, rank, base.kernel_size, **places, **like)
            self.B = nn.Conv2d(rank, base.out_channels, 1, **like)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.B(self.scale * self.A(x.to(self.A.weight.dtype)))).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """W + s·BA: for attention modules, which read the weights and biases of their parts by themselves."""
        BA = self.B.weight.flatten(1) @ self.A.weight.flatten(1)
        return (self.base.weight + (self.scale * BA).view_as(self.base.weight)).to(self.base.weight.dtype)

    bias = property(lambda self: self.base.bias)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A plain layer of weight W + s·BA: no latency (sec. 4.1)."""
        plain = copy.deepcopy(self.base)
        plain.weight.copy_(self.weight)
        return plain

    def get_extra_state(self) -> Tensor:
        """The scale is part of the state: loaded under another alpha, A and B would mean something else."""
        return torch.tensor(self.scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state.item()


def add_lora(
    model: nn.Module, rank: int, alpha: float, targets: str = "*", scaling: str = "standard"
) -> list[str]:
    """Freeze `model`, forget its gradients, and wrap in `LoRA`, in place, its linear layers and 2-d convolutions
    (without groups, of torch's own arithmetic) whose names fit the shell pattern `targets`.

    Returns the names of the layers. ValueError, and nothing is changed: a bad argument, no layer that fits, or one
    that is used under two names or changed in each pass by a hook (weight norm, pruning)."""
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf or scaling not in ("standard", "rs"):
        needed = "rank is a whole number from 1 on, alpha a positive number, scaling 'standard' or 'rs'"
        raise ValueError(f"rank={rank!r}, alpha={alpha!r}, scaling={scaling!r}: {needed}")
    modules = dict(model.named_modules())
    if any(isinstance(module, LoRA) for module in modules.values()):
        raise ValueError("the model has LoRA layers already; merge_lora(model) makes them plain")
    plain = nn.Linear.forward, nn.Conv2d.forward  # a subclass may use its weight in another way
    layers = {n: m for n, m in modules.items() if n and type(m).forward in plain and getattr(m, "groups", 1) == 1}
    chosen = [n for n in layers if fnmatchcase(n, targets)]
    if not chosen:
        raise ValueError(f"no layer that can have LoRA fits {targets!r}; there are {', '.join(layers) or 'none'}")
    for n in chosen:
        weight = layers[n]._parameters.get("weight")
        if weight is None or layers[n]._forward_pre_hooks or layers[n]._forward_hooks:
            raise ValueError(f"{n} is changed in each pass by a hook or parametrization; remove that first")
        users = [u for u, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if len(users) > 1:
            raise ValueError(f"one weight has several names, {', '.join(users)}: an update at one would part them")
    wrapped = {n: LoRA(layers[n], rank, alpha, scaling).train(layers[n].training) for n in chosen}
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None  # or an optimizer that holds it would still take a step
    for n, layer in wrapped.items():
        model.set_submodule(n, layer)
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Put plain layers in the place of the LoRA layers, in place; nothing of the updates stays."""
    for n, module in list(model.named_modules()):
        if isinstance(module, LoRA):
            model.set_submodule(n, module.merged())


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is not frozen: every A, B and scale, what was unfrozen by hand, and buffers, which move
    in train mode. `model.load_state_dict(model.state_dict() | adapter)` switches to it."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {n for n, p in named if not p.requires_grad and not n.endswith((".A.weight", ".B.weight"))}
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name not in frozen}
