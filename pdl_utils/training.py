"""One training loop for every experiment, which can be interrupted; and what names the file of a kept training."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import linecache
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm

from pdl_utils.settings import data_root, progress_wanted, save_atomically

OWN = ("epoch", "loss", "seconds")  # numbers of the history that `fit` enters itself


class NonFiniteLoss(FloatingPointError):
    """The loss, or a weight, became NaN or infinite. The last state that was saved is from before."""


class UnusableState(RuntimeError):
    """A file to resume from is damaged, or was written under other settings; it is left as it is."""


@dataclass
class History:
    """What `fit` saw, one row an epoch: `epoch`, `loss` (mean over batches), `seconds`, and `evaluate`'s."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """Learning rate up linearly for `warmup` steps, then down a half-cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


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
    model: nn.Module, batches: Callable[[int], Collection[Any]], loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: Optimizer, *, epochs: int, scheduler: LRScheduler | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None, keep_best: str | None = None,
    clip_norm: float | None = None, autocast: bool = False, file: Path | None = None, label: str | None = "train",
) -> History:  # fmt: skip
    """Train `model` in place, and leave it in eval mode. With a `file`, it is kept after every epoch: a training
    that was interrupted goes on when it is started again, and a finished one is read back.

    Args:
        model: whatever `loss_fn` understands; it may be wrapped in DistributedDataParallel.
        batches: gives the batches of an epoch (0-based), in an order that depends on the epoch alone.
        loss_fn: `loss_fn(model, batch)` is a scalar to minimise.
        scheduler: steps once a batch.
        evaluate: its numbers join the history after every epoch; called in eval mode, without gradients.
        keep_best: one of these numbers; the weights of the epoch where it was largest are restored at the end.
        clip_norm: largest Euclidean norm of the joint gradient.
        autocast: compute in bfloat16 where that is safe; see `has_bfloat16`.
        label: what the progress bar says; None: no bar.

    Raises NonFiniteLoss before the step of a batch whose loss is NaN or infinite, or after an epoch that made
    weights so; UnusableState if `file` is damaged or of other settings; ValueError for an epoch without a batch.
    """
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    parts = {"model": bare, "optimizer": optimizer} | ({"scheduler": scheduler} if scheduler else {})
    settings = _settings(bare, optimizer, epochs=epochs, keep_best=keep_best, clip_norm=clip_norm)
    history, best = _resume(file, parts, settings) if file and file.exists() else (History(), None)
    writes = file and not (dist.is_initialized() and dist.get_rank())  # of several processes, the first
    bar = tqdm(
        total=epochs, initial=len(history.rows), desc=label, unit="epoch", unit_scale=True, file=sys.stdout,
        disable=label is None or not progress_wanted(), mininterval=1,
    )  # fmt: skip
    with bar:  # an interruption closes it
        for epoch in range(len(history.rows), epochs):
            started, where = time.perf_counter(), f"{label or 'train'}, epoch {epoch + 1}"
            how = {"clip_norm": clip_norm, "autocast": autocast, "bar": bar, "where": where}
            loss = _epoch(model, batches(epoch), loss_fn, optimizer, scheduler, **how)
            row = {"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - started}
            if evaluate is not None:
                with torch.no_grad():
                    row |= _plain(evaluate(bare))
            history.rows.append(row)
            bar.set_postfix({name: f"{row[name]:.3g}" for name in row if name not in ("epoch", "seconds")})
            if keep_best and (best["value"] if best else -math.inf) < row[keep_best] < math.inf:
                weights = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
                best = {"epoch": epoch + 1, "value": row[keep_best], "weights": weights}
            if writes:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"settings": settings, "history": history.rows, "best": best, "random": _random_states()}
                save_atomically(lambda path, state=state: torch.save(state, path), file)
    if best is not None:
        bare.load_state_dict(best["weights"])
    model.eval()
    return history


def _epoch(
    model: nn.Module, todo: Collection[Any], loss_fn: Callable[[nn.Module, Any], Tensor], optimizer: Optimizer,
    scheduler: LRScheduler | None, *, clip_norm: float | None, autocast: bool, bar: tqdm, where: str,
) -> float:  # fmt: skip
    """One pass over the batches, in train mode; leaves the model in eval mode. The mean loss."""
    if len(todo) == 0:
        raise ValueError(f"{where}: no batch; are there fewer examples than one batch holds?")
    device, total, done = next(model.parameters()).device, 0.0, bar.n
    model.train()
    for count, batch in enumerate(todo, 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_fn(model, batch)
        value = loss.item()
        if not math.isfinite(value):
            remedy = "lower the learning rate, clip gradients (clip_norm=1) or check the input for NaN"
            raise NonFiniteLoss(f"{where}, batch {count}: loss is {value}; {remedy}")
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total += value
        bar.n = done + count / len(todo)  # adding up 1 / len(todo) could exceed `epochs`, and tqdm would warn
        bar.update(0)
    # A gradient of NaN shows in the next batch's loss, but for the last batch's: once an epoch is enough.
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        remedy = "look for a gradient of NaN, as of the root of 0, or lower the learning rate"
        raise NonFiniteLoss(f"{where}: weights are NaN or infinite, though the losses are not; {remedy}")
    model.eval()
    return total / len(todo)


def _plain(numbers: Mapping[str, float]) -> dict[str, float]:
    """What `evaluate` gave, as Python's numbers, which a file can hold."""
    if reserved := numbers.keys() & set(OWN):
        raise ValueError(f"evaluate gave {', '.join(sorted(reserved))}, which the loop enters itself; rename it")
    return {name: float(value) for name, value in numbers.items()}


def _settings(model: nn.Module, optimizer: Optimizer, **chosen: object) -> dict[str, str]:
    """What decides the result, as text that can be compared. Precision is left out: it is the device's."""
    settings = chosen | {"model": type(model).__name__, "optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.state_dict()["param_groups"]):
        settings |= {f"{name} of parameters {number}": value for name, value in group.items() if name != "params"}
    return {name: str(value) for name, value in settings.items()}


def _random_states() -> dict[str, Any]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def _resume(
    file: Path, parts: Mapping[str, Any], settings: dict[str, str]
) -> tuple[History, dict[str, Any] | None]:
    """Put `parts` and the random states back to where `file` was saved; gives the history and the best epoch."""
    with file.open("rb") as opened:  # a file that may not be read is not damaged
        try:
            state = torch.load(opened, map_location="cpu", weights_only=True)
            theirs, rows = state["settings"], state["history"]
        except Exception as error:  # half a file, or something else: all kinds are raised
            raise UnusableState(f"{file} is damaged or no training; remove it to start over ({error})") from error
    changed = [k for k in sorted(settings.keys() | theirs.keys()) if settings.get(k) != theirs.get(k)]
    if changed:
        words = "; ".join(f"{k} is {settings.get(k, 'not set')}, was {theirs.get(k, 'not set')}" for k in changed)
        raise UnusableState(f"{file} was trained under other settings: {words}. Give this training another file.")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"]["cpu"])
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        return History(rows), state["best"]
    except Exception as error:  # each part raises its own
        raise UnusableState(f"{file} is of another model; give this training another file ({error})") from error


def run_file(name: str, *code: nn.Module | Callable, **settings: Any) -> Path:
    """The file of a training, for `fit`: `runs/{name}-{digest}.pt` under the data root. The digest is that of
    `settings` (JSON values: all that decides the result), of `code` (a model's layers, the loss, functions) and of
    the loop: whoever changes one of them trains anew, and a better docstring costs nothing."""
    sources: dict[str, str] = {}
    for thing in (fit, *code):
        for part in {type(module) for module in thing.modules()} if isinstance(thing, nn.Module) else [thing]:
            _add_source(part, sources)
    text = json.dumps([name, settings, sources], sort_keys=True)  # the name too: its signs are not in the file's
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return data_root() / "runs" / f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"


def _add_source(thing: type | Callable, sources: dict[str, str]) -> None:
    """Enter the syntax tree of a function or class, without docstrings, into `sources`; and those of what it uses
    from its own module: functions, classes, their bases, and constants, which are known by their capitals."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if thing.__module__.startswith("torch") or name in sources:
        return
    functions = [m for m in vars(thing).values() if inspect.isfunction(m)] if inspect.isclass(thing) else [thing]
    files = {inspect.unwrap(f).__code__.co_filename for f in functions} - {"<string>"}  # a dataclass makes its own
    lines = linecache.getlines(files.pop()) if files else []  # also those of a notebook's cell
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [n for n in ast.walk(ast.parse("".join(lines))) if isinstance(n, kinds) and n.name == thing.__name__]
    sources[name] = ""
    namespace = vars(sys.modules[thing.__module__])
    for tree in found:
        for node in ast.walk(tree):
            if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        sources[name] += ast.dump(tree)
        for used in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            other = namespace.get(used)
            if getattr(other, "__module__", None) == thing.__module__ and hasattr(other, "__qualname__"):
                _add_source(other, sources)
            elif used.isupper() and isinstance(other, (int, float, str, tuple)):
                sources[f"{thing.__module__}.{used}"] = repr(other)
