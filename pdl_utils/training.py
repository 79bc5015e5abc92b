"""One training loop for every experiment, which can be interrupted; and what names the file of a kept training."""

import ast
import copy
import hashlib
import inspect
import json
import linecache
import math
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from pdl_utils.settings import data_root, progress_wanted, save_atomically

LIBRARIES = sys.stdlib_module_names | {"torch", "torchvision", "torch_geometric"}  # their code names no training
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.Lambda)
REMEDY = "lower the learning rate, clip gradients (clip_norm=1), or look for NaN in the input and the gradients"


class NonFiniteLoss(FloatingPointError):
    """The loss, or a weight, became NaN or infinite. The last state that was saved is from before."""


class UnusableState(RuntimeError):
    """A file to resume from is damaged, or was written under other settings; it is left as it is."""


@dataclass
class History:
    """What `fit` saw, one row an epoch: `epoch`, `loss` (mean over batches), `seconds`, and `evaluate`'s."""

    rows: list[dict[str, float]]

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """Learning rate up linearly for `warmup` steps, then down a half-cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    schedule = LambdaLR(optimizer, factor)
    schedule.steps, schedule.warmup = steps, warmup  # for its state, which leaves functions out
    return schedule


def sgd(model: nn.Module, lr: float, weight_decay: float, steps: int, warmup: int) -> tuple[Optimizer, LambdaLR]:
    """Optimizer and schedule: SGD with Nesterov momentum 0.9, weight decay on matrices and kernels only (no bias,
    no norm), and one `warmup_cosine` over `steps` batches."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    return optimizer, warmup_cosine(optimizer, steps, warmup)


def fit(
    model: nn.Module, batches: Callable[[int], Iterable[Any]], loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer, *, epochs: int, scheduler: LRScheduler | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None, keep_best: str | None = None,
    clip_norm: float | None = None, autocast: bool = False, file: Path | None = None, label: str | None = "train",
) -> History:  # fmt: skip
    """Train `model`, which may be wrapped in DistributedDataParallel, in place; it is left in eval mode.

    `batches(epoch)`, from 0, gives the batches of an epoch, in an order that depends on the epoch alone, and
    `loss_fn(model, batch)` a scalar to minimise. `scheduler` steps once a batch; `clip_norm` is the largest norm
    of the joint gradient; `autocast` computes in bfloat16 where that is safe. `evaluate(model)`, in eval mode and
    without gradients, adds its numbers to the history after every epoch; with `keep_best`, the name of one, the
    weights of the epoch where it was largest are restored at the end. In `file` the training is kept after every
    epoch: an interrupted one goes on when it is started again, a finished one is read back. `label` names the
    progress bar (None: no bar). Raises NonFiniteLoss before the step of a batch whose loss is NaN or infinite, or
    after an epoch that made weights so; UnusableState if `file` is damaged or of other settings."""
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    parts = {"model": bare, "optimizer": optimizer} | ({"scheduler": scheduler} if scheduler else {})
    settings = {"epochs": epochs, "keep_best": keep_best, "clip_norm": clip_norm, **_numbers_of(parts)}
    own = {id(p) for p in model.parameters()}
    if not own.issuperset(id(p) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer moves weights that are not the model's; make it anew for this model")
    rows, best = [], {"value": -math.inf, "weights": {}}
    if file and file.exists():
        rows, best = _resume(file, parts, settings)
    writes = file and not (dist.is_initialized() and dist.get_rank())  # of several processes, the first
    device, hidden = next(model.parameters()).device, label is None or not progress_wanted()
    todo = range(len(rows), epochs)
    with tqdm(todo, label, epochs, initial=len(rows), unit="epoch", file=sys.stdout, disable=hidden) as bar:
        for epoch in bar:
            started, losses, where = time.perf_counter(), [], f"{label or 'train'}, epoch {epoch + 1}"
            model.train()
            for batch in batches(epoch):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    loss = loss_fn(model, batch)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise NonFiniteLoss(f"{where}, batch {len(losses)}: loss is {losses[-1]}; {REMEDY}")
                optimizer.zero_grad()
                loss.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
            if not losses:
                raise ValueError(f"{where}: no batch; are there fewer examples than one holds, or is it used up?")
            # A gradient of NaN shows in the loss of the next batch, but for the last one.
            if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
                raise NonFiniteLoss(f"{where}: weights are NaN or infinite, though the losses are not; {REMEDY}")
            row = {"epoch": epoch + 1, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - started}
            model.eval()
            with torch.no_grad():
                found = evaluate(bare) if evaluate else {}
            measured = {str(name): float(value) for name, value in found.items()}
            taken = sorted(row.keys() & measured.keys())
            if taken:
                raise ValueError(f"evaluate gave {', '.join(taken)}, which the loop enters itself; rename it")
            rows.append(row | measured)
            bar.set_postfix({"loss": f"{row['loss']:.3g}"} | {k: f"{value:.3g}" for k, value in measured.items()})
            if keep_best and best["value"] < measured[keep_best] < math.inf:
                best = {"value": measured[keep_best], "weights": copy.deepcopy(bare.state_dict())}
            if writes:
                state = {name: part.state_dict() for name, part in parts.items()}
                random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
                state |= {"settings": settings, "history": rows, "best": best, "random": random}
                save_atomically(partial(write_state, state), file)
    if best["weights"]:
        bare.load_state_dict(best["weights"])
    model.eval()
    return History(rows)


def _numbers_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What kinds of model, optimizer and schedule these are, and the numbers that the last two start with."""
    found = {what: type(part).__name__ for what, part in parts.items()}
    states = {f"parameters {k}": group for k, group in enumerate(parts["optimizer"].state_dict()["param_groups"])}
    if "scheduler" in parts:
        states["the schedule"] = parts["scheduler"].state_dict()
    for what, state in states.items():
        state = copy.deepcopy(state)  # a rate that is a tensor changes in place
        found |= {f"{k} of {what}": value for k, value in state.items() if k != "params" and k[0] != "_"}
    return found


def write_state(state: Any, place: Path) -> None:
    """Save what can be read back without running its code. TypeError: `state` holds something else."""
    torch.save(state, place)
    try:
        torch.load(place, weights_only=True, mmap=True)  # now, not after hours; weights are not read
    except pickle.UnpicklingError as error:
        raise TypeError(f"only tensors, Python's numbers, lists and dictionaries can be kept ({error})") from error


def _resume(file: Path, parts: Mapping[str, Any], settings: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    """Put `parts` and the random states back to where `file` was saved; gives the history's rows and the best."""
    with file.open("rb") as opened:  # a file that may not be read is not damaged
        try:
            state = torch.load(opened, map_location="cpu", weights_only=True)
            names = sorted(settings | state["settings"])
            pairs = [(name, settings.get(name, "unset"), state["settings"].get(name, "unset")) for name in names]
            changed = [f"{name} is {ours}, was {theirs}" for name, ours, theirs in pairs if ours != theirs]
            if not changed:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
        except Exception as error:  # half a file, something else, another model: all kinds are raised
            remedy = "remove it to start over, or give this training another file"
            raise UnusableState(f"{file} is damaged, or of another model; {remedy} ({error})") from error
    if changed:
        raise UnusableState(f"{file} is of other settings: {'; '.join(changed)}. Give this training another file.")
    torch.set_rng_state(state["random"]["cpu"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"][: torch.cuda.device_count()])
    return state["history"], state["best"]


def run_file(name: str, *code: nn.Module | Callable, **settings: Any) -> Path:
    """The file of a training, for `fit`: `runs/{name}-{digest}.pt` under the data root. The digest is that of
    `settings` (JSON values: all that decides the result), of `code` (a model's layers, the loss, functions) and of
    the loop: whoever changes one of them trains anew, and a better docstring costs nothing."""
    sources: dict[Any, str] = {}
    for thing in (fit, *code):
        parts = {getattr(thing, "__func__", thing)}  # of a method, its function
        if isinstance(thing, nn.Module):
            sources[thing] = str(thing)  # its layers and their numbers
            parts = {type(module) for module in thing.modules()}
        for part in parts:
            if not hasattr(part, "__qualname__"):  # such as a partial: what it fixes is a setting
                raise TypeError(f"{part} has no code of its own; name networks, classes and functions")
            _add_source(part, sources)
    text = json.dumps([name, settings, sorted(sources.values())], sort_keys=True)
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower())[:60].strip("-")  # file names have a longest length
    return data_root() / "runs" / f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"


def _add_source(thing: type | Callable, sources: dict[Any, str]) -> None:
    """Enter the code of a function, or of a class and its bases, into `sources`: the whole module that it lies in;
    from a notebook its definition, and the functions, classes and constants (in capitals) that this names."""
    for base in thing.__bases__ if inspect.isclass(thing) else ():
        _add_source(base, sources)
    home = thing.__module__ or "builtins"
    if home.split(".")[0] in LIBRARIES or home in sources or thing in sources:
        return
    if home != "__main__":
        sources[home] = ast.dump(_tree(sys.modules[home].__file__))
        return
    functions = [inspect.unwrap(f) for f in (thing, *vars(thing).values()) if inspect.isfunction(f)]  # or methods
    if not functions:  # a class without a method
        sources[thing] = re.sub(r" at 0x\w+", "", str(vars(thing)))
        return
    definitions = [n for n in ast.walk(_tree(functions[0].__code__.co_filename)) if isinstance(n, DEFINITIONS)]
    found = [ast.dump(node) for node in definitions if getattr(node, "name", "<lambda>") == thing.__name__]
    sources[thing] = "".join(found)
    for name, value in functions[0].__globals__.items():
        if f"id='{name}'" not in sources[thing]:
            continue
        if hasattr(value, "__qualname__"):
            _add_source(value, sources)
        elif name.isupper() and not inspect.ismodule(value):
            sources[name] = name + re.sub(r" at 0x\w+", "", repr(value))  # without addresses in memory


def _tree(file: str) -> ast.Module:
    """The syntax tree of a module or a notebook's cell, without comments and docstrings. `linecache` has both, and
    modules as they were first read: what is edited while a kernel runs is not what runs."""
    tree = ast.parse("".join(linecache.getlines(file)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree
