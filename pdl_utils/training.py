"""One training loop for every experiment, resumable after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pdl_utils.data_parallel import rank_and_world
from pdl_utils.settings import progress_wanted, save_atomically


class Batches(Protocol):
    """The batches of one epoch: a list, a DataLoader, or anything with a length that can be iterated."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite; the model is left as it was before that step."""


class NonFiniteWeights(FloatingPointError):
    """Weights became NaN or infinite; the last state that was saved is from before."""


class UnusableState(RuntimeError):
    """A file to resume from is damaged or the state of something else; the file is left as it is."""


@dataclass
class History:
    """What `fit` saw, one row an epoch: `epoch`, `loss` (mean over batches), `seconds`, and
    everything that the `evaluate` callback returned."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay weight matrices and kernels, but no bias and no norm."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate up linearly for `warmup` steps, then down a half-cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _resume(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> tuple[History, dict[str, Any] | None]:
    """Put everything back to where `checkpoint` was saved; the history and the best epoch until then."""
    with checkpoint.open("rb") as file:  # one that may not be read is not damaged
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler raises all kinds of things for half a file
            problem = f"{checkpoint} is damaged ({type(error).__name__}); delete it to start over"
            raise UnusableState(problem) from error
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        return History(state["history"]), state["best"]
    except Exception as error:
        problem = f"{checkpoint} is not the state of this model, optimizer and scheduler; delete it to start over"
        raise UnusableState(problem) from error


def fit(
    model: nn.Module,
    batches: Callable[[int], Batches],
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
    examples: int | None = None,
    label: str = "train",
    progress: bool | None = None,
) -> History:
    """Train `model` in place, in train mode, and leave it in eval mode.

    Args:
        model: whatever `loss_fn` understands.
        batches: gives the batches of an epoch (0-based), with a length, in an order that depends on the
            epoch alone; that, and the random state in the checkpoint, makes a resumed run equal an
            unbroken one.
        loss_fn: `loss_fn(model, batch)` is a scalar tensor to minimise.
        optimizer, scheduler: the scheduler steps once a batch.
            A model in DistributedDataParallel is trained by all its processes; the first one saves.
        evaluate: called in eval mode and without gradients after every epoch; its numbers join the history.
        keep_best: the name of a number from `evaluate`; the weights of the epoch in which it was
            largest are restored at the end (early stopping without stopping), the last ones if it was
            never finite.
        clip_norm: largest Euclidean norm of the joint gradient.
        autocast: compute in bfloat16 where that is safe (`torch.autocast`).
        checkpoint: file to save to after every epoch and, if it exists, to go on from.
        examples: how many examples an epoch holds, to report them a second; batches otherwise.
        label, progress: what the progress line says, and whether the first process shows it; None shows it
            unless `PDL_PROGRESS=0`.

    Raises:
        NonFiniteLoss: at the first batch whose loss is NaN or infinite, before its step is taken.
        NonFiniteWeights: a step with a finite loss made weights NaN or infinite; at the end of the epoch,
            before they are evaluated and saved.
        UnusableState: `checkpoint` is damaged, or the state of another model, optimizer or scheduler.

    Returns:
        One row an epoch.
    """
    device = next(model.parameters()).device
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    first_process = rank_and_world()[0] == 0
    history, best = History(), None
    if checkpoint is not None and checkpoint.exists():
        history, best = _resume(checkpoint, bare, optimizer, scheduler)
    first = len(history.rows)
    if progress is None:
        progress = progress_wanted()
    bar = tqdm(
        total=(examples or 1) * epochs, initial=(examples or 1) * first, desc=label,
        unit="img" if examples else "epoch", disable=not (progress and first_process), mininterval=1,
        dynamic_ncols=True,
    )  # fmt: skip
    for epoch in range(first, epochs):
        started, total, count = time.perf_counter(), 0.0, 0
        model.train()
        todo = batches(epoch)
        for batch in todo:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = loss_fn(model, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{label}: loss is {value} in epoch {epoch + 1}, batch {count + 1}; "
                    "lower the learning rate, clip gradients (clip_norm=1) or check the input for NaN"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total, count = total + value, count + 1
            if examples:
                bar.update(examples * count // len(todo) - examples * (count - 1) // len(todo))
        # A gradient of NaN shows in the next batch's loss, but for the last batch's: once an epoch is enough.
        if not nn.utils.get_total_norm([p.detach() for p in model.parameters() if p.requires_grad]).isfinite():
            raise NonFiniteWeights(
                f"{label}: weights are NaN or infinite after epoch {epoch + 1}, though its losses are not; "
                "look for a gradient of NaN, as of the root of 0, or lower the learning rate"
            )
        model.eval()
        row = {"epoch": epoch + 1, "loss": total / max(1, count), "seconds": time.perf_counter() - started}
        if evaluate is not None:
            with torch.no_grad():
                row.update(evaluate(bare))
        history.rows.append(row)
        bar.update(0 if examples else 1)
        bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k not in ("epoch", "seconds")})
        if keep_best is not None and (best["value"] if best else -math.inf) < row[keep_best] < math.inf:
            weights = {k: v.detach().clone() for k, v in bare.state_dict().items()}
            best = {"value": row[keep_best], "weights": weights}
        if checkpoint is not None and first_process:
            state = {
                "model": bare.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict() if scheduler else None,
                "rng": torch.get_rng_state(), "history": history.rows, "best": best,
            }  # fmt: skip
            save_atomically(lambda path, state=state: torch.save(state, path), checkpoint)
    bar.close()
    if best is not None:
        bare.load_state_dict(best["weights"])
    model.eval()
    return history
