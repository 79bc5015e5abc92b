"""One training loop for every experiment, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pdl_utils.settings import data_root, progress_wanted, save_atomically


class NonFiniteLoss(FloatingPointError):
    """The loss, or a weight, became NaN or infinite. The last state that was saved is from before."""


class UnusableState(RuntimeError):
    """A file to resume from is damaged or the state of something else; the file is left as it is."""


@dataclass
class History:
    """What `fit` saw, one row an epoch: `epoch`, `loss` (mean over batches), `seconds`, and
    everything that the `evaluate` callback returned."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate up linearly for `warmup` steps, then down a half-cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def sgd(
    model: nn.Module, lr: float, weight_decay: float, steps: int, warmup: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with Nesterov momentum 0.9, weight decay on matrices and kernels only (no bias, no norm), and one
    `warmup_cosine` over `steps` batches."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    return optimizer, warmup_cosine(optimizer, steps, warmup)


def run_file(name: str, **settings: Any) -> Path:
    """Where the state of one training is kept: `runs/{name}-{digest of settings}.pt` under the data root.

    Given to `fit` as `checkpoint`, it makes a notebook that takes hours on a slow machine resumable: a training
    that was cut goes on, one that is finished is read back, and one whose settings changed starts anew, since
    its name is another. Delete the folder `runs/` to train everything again.

    Args:
        name: what people call it, such as "GAT, seed 0".
        settings: all that decides the result, JSON values: sizes, epochs, seed, data.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return data_root() / "runs" / f"{readable}-{digest}.pt"


def _resume(checkpoint: Path, parts: Mapping[str, Any], epochs: int) -> tuple[History, dict[str, Any] | None]:
    """Put `parts` (model, optimizer, scheduler) back to where `checkpoint` was saved; a finished training has
    the model alone. Returns the history and the best epoch until then."""
    with checkpoint.open("rb") as file:  # one that may not be read is not damaged
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            rows = state["history"]
            if "rng" not in state and len(rows) != epochs:
                raise ValueError(f"it holds a finished training of {len(rows)} epochs, not of {epochs}")
            for name in parts if "rng" in state else ["model"]:
                parts[name].load_state_dict(state[name])
            if "rng" in state:
                torch.set_rng_state(state["rng"])
            return History(rows), state.get("best")
        except Exception as error:  # half a file, or the state of something else: all kinds are raised
            problem = f"{type(error).__name__}: {error}"
            raise UnusableState(
                f"{checkpoint} is damaged or not a state of this training; delete it to start over ({problem})"
            ) from error


def train_step(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float | None,
    autocast: bool,
    where: str,
) -> float:
    """Loss of one batch, and one step down its gradient. `where` goes into the error message."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = loss_fn(model, batch)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"{where}: loss is {value}; "
            "lower the learning rate, clip gradients (clip_norm=1) or check the input for NaN"
        )
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return value


def fit(
    model: nn.Module,
    batches: Callable[[int], Collection[Any]],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    keep_best: str | None = None,
    clip_norm: float | None = None,
    autocast: bool = False,
    checkpoint: Path | None = None,
    save: bool = True,
    stop_after: int | None = None,
    label: str = "train",
    progress: bool | None = None,
) -> History:
    """Train `model` in place, in train mode, and leave it in eval mode.

    Args:
        model: whatever `loss_fn` understands; it may be wrapped in DistributedDataParallel.
        batches: gives the batches of an epoch (0-based), a list or anything with a length that can be
            iterated, in an order that depends on the epoch alone; that, and the random state in the
            checkpoint, makes a resumed run equal an unbroken one.
        loss_fn: `loss_fn(model, batch)` is a scalar tensor to minimise.
        optimizer, scheduler: the scheduler steps once a batch.
        evaluate: called in eval mode and without gradients after every epoch; its numbers join the history.
        keep_best: the name of a number from `evaluate`; the weights of the epoch in which it was
            largest are restored at the end (early stopping without stopping), the last ones if it was
            never finite.
        clip_norm: largest Euclidean norm of the joint gradient.
        autocast: compute in bfloat16 where that is safe (`torch.autocast`); see `bfloat16_is_faster`.
        checkpoint: file to save to after every epoch and, if it exists, to go on from. After the last epoch it
            keeps the weights and the history alone: a finished training is read back, not repeated.
        save: write `checkpoint`; of several processes, one does.
        stop_after: return once so many of the `epochs` are done, to go on another time.
        label, progress: what the progress line says, and whether it shows; None: unless `PDL_PROGRESS=0`.

    Raises:
        NonFiniteLoss: at the first batch whose loss is NaN or infinite, before its step is taken; or at the end
            of an epoch that made weights NaN or infinite, before they are evaluated and saved.
        UnusableState: `checkpoint` is damaged, or the state of another model, optimizer or scheduler.

    Returns:
        One row an epoch.
    """
    bare = getattr(model, "module", model)  # without DistributedDataParallel's wrapper
    parts = {"model": bare, "optimizer": optimizer, "scheduler": scheduler}
    parts = {name: part for name, part in parts.items() if part is not None}
    history, best = History(), None
    if checkpoint is not None and checkpoint.exists():
        history, best = _resume(checkpoint, parts, epochs)
    done = len(history.rows)
    progress = progress_wanted() if progress is None else progress
    bar = tqdm(
        total=epochs, initial=done, desc=label, unit="epoch", unit_scale=True, disable=not progress, mininterval=1
    )
    for epoch in range(done, min(epochs, stop_after or epochs)):
        started, todo, total = time.perf_counter(), batches(epoch), 0.0
        where = f"{label}, epoch {epoch + 1}"
        model.train()
        for count, batch in enumerate(todo, 1):
            total += train_step(
                model, batch, loss_fn, optimizer, clip_norm=clip_norm, autocast=autocast,
                where=f"{where}, batch {count}",
            )  # fmt: skip
            if scheduler is not None:
                scheduler.step()
            bar.n = epoch + count / len(todo)  # adding up 1 / len(todo) could exceed `epochs`, and tqdm would warn
            bar.update(0)
        # A gradient of NaN shows in the next batch's loss, but for the last batch's: once an epoch is enough.
        if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
            raise NonFiniteLoss(
                f"{where}: weights are NaN or infinite, though the losses are not; "
                "look for a gradient of NaN, as of the root of 0, or lower the learning rate"
            )
        row = {"epoch": epoch + 1, "loss": total / max(1, len(todo)), "seconds": time.perf_counter() - started}
        model.eval()
        if evaluate is not None:
            with torch.no_grad():
                row.update(evaluate(bare))
        history.rows.append(row)
        bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k not in ("epoch", "seconds")})
        if keep_best is not None and (best["value"] if best else -math.inf) < row[keep_best] < math.inf:
            weights = {k: v.detach().clone() for k, v in bare.state_dict().items()}
            best = {"value": row[keep_best], "weights": weights}
        if checkpoint is not None and save and epoch + 1 < epochs:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"rng": torch.get_rng_state(), "history": history.rows, "best": best}
            save_atomically(lambda path, state=state: torch.save(state, path), checkpoint)
    bar.close()
    if best is not None:
        bare.load_state_dict(best["weights"])
    if checkpoint is not None and save and done < len(history.rows) == epochs:
        finished = {"model": bare.state_dict(), "history": history.rows}
        save_atomically(lambda path: torch.save(finished, path), checkpoint)
    model.eval()
    return history
