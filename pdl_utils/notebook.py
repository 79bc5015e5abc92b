"""What a notebook shows: how it was run, figures, tables, findings and results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from pdl_utils.plots import use_style
from pdl_utils.settings import (
    REPOSITORY,
    device_name,
    get_profile,
    has_bfloat16,
    pick_device,
    save_atomically,
    seed_everything,
)
from pdl_utils.training import run_file

DPI = 100
T = TypeVar("T")
Sources = Iterable[Any] | None  # data sets and networks: whatever has a `.provenance`; None: all used so far


class Run:
    """One execution of a notebook. Making it picks profile and device, seeds, sets the style of figures, and shows
    a table of what the notebook runs with, which grows as data are loaded.

    >>> run = Run("1_grad_cam")
    >>> config = run.config(fast={"photos": 24}, full={"photos": 200})
    >>> album = run.use(imagenet_photos(config.photos))
    """

    def __init__(self, notebook: str, profile: str | None = None) -> None:
        """`notebook`: file name without its ending; `profile`: "fast", "full", or None for `get_profile()`."""
        self.notebook, self.profile, self.device = notebook, get_profile(profile), pick_device()
        self.full = self.profile.name == "full"
        self.started, self.sources, self.kept = time.perf_counter(), [], [0, 0]
        seed_everything(0)
        use_style()
        self.rows = {
            "profile": str(self.profile),
            "device": device_name(self.device),
            "precision": "float32" + ("; training in bfloat16" if has_bfloat16(self.device) else ""),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
                        f"torchvision {torchvision.__version__}",
        }  # fmt: skip
        self.shown = display(self._top(), display_id=True)

    def _top(self) -> Markdown:
        return markdown_table(["run", "with"], self.rows.items())

    def note(self, what: str, value: str) -> None:
        """Add a row to the table at the notebook's top, or change it."""
        self.rows[what] = value
        if self.shown is not None:  # outside of a notebook there is nothing to update
            self.shown.update(self._top())

    def use(self, source: T) -> T:
        """Enter the provenance of data or weights into the table; returns what it was given."""
        self.sources.append(source)
        self.note(source.provenance.name, source.provenance.source)
        return source

    def config(self, *, fast: Mapping[str, Any], full: Mapping[str, Any]) -> SimpleNamespace:
        """The settings of this run's profile, `config.name`. ValueError: the two do not name the same ones."""
        if fast.keys() != full.keys():
            raise ValueError(f"name in both profiles: {', '.join(sorted(fast.keys() ^ full.keys()))}")
        return SimpleNamespace(**(full if self.full else fast))

    def file(self, name: str, *code: Callable | torch.nn.Module, **settings: Any) -> Path | None:
        """Where `fit` keeps a training in the full profile, see `run_file`; None in the fast one."""
        if not self.full:
            return None
        path = run_file(name, *code, **settings)
        self.kept[0] += path.exists()
        self.kept[1] += 1
        self.note("trainings", f"{self.kept[0]} of {self.kept[1]} were found in runs/ and not repeated")
        return path

    def once(self, name: str, compute: Callable[[], T], *code: Callable, **settings: Any) -> T:
        """What `compute()` gives: tensors, numbers, and lists and dictionaries of them. In the full profile it is
        kept like a training, under a name made of `code` and `settings`, and read back the next time."""
        path = self.file(name, *code, **settings)
        if path and path.exists():
            return torch.load(path, weights_only=True)
        value = compute()
        if path:
            save_atomically(partial(torch.save, value), path)
        return value

    def stand_ins(self, data: Sources) -> str:
        """The tag " · stand-in for CIFAR-10" if that is what took its place among `data`; else nothing."""
        return "".join(dict.fromkeys(s.provenance.tag for s in (self.sources if data is None else data)))

    def show(
        self, figure: Figure, name: str, alt: str, *, photographs: bool = False, data: Sources = None
    ) -> None:
        """Display a figure with a text for those who cannot see it; stand-ins among `data` are named below it.

        PNG, or JPEG for figures made of photographs: ten as PNG would bring a notebook over what GitHub shows. In
        the full profile it is written to `PDL_FIGURES`, or `build/figures/`, as `{name}.png` or `{name}.jpg`.
        """
        if told := self.stand_ins(data):
            figure.text(1, 0, told.strip(" ·"), ha="right", va="top", style="italic")
        kind, ending, options = "png", "png", {}
        if photographs:
            kind, ending, options = "jpeg", "jpg", {"pil_kwargs": {"quality": 85, "subsampling": 0}}
        drawn = BytesIO()
        figure.savefig(drawn, format=kind, dpi=DPI, bbox_inches="tight", **options)
        plt.close(figure)
        display(Image(drawn.getvalue(), format=kind, alt=alt))
        if self.full:
            folder = REPOSITORY / (os.environ.get("PDL_FIGURES") or "build/figures")
            try:
                save_atomically(lambda partial: partial.write_bytes(drawn.getvalue()), folder / f"{name}.{ending}")
            except OSError as error:  # the figure is in the notebook all the same
                self.note("figures", f"not written: {error}")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]], *, data: Sources = None) -> None:
        """Display a Markdown table; stand-ins among `data` are named in its first cell."""
        display(markdown_table([head[0] + self.stand_ins(data), *head[1:]], rows))

    def finding(
        self, condition: bool, sentence: str, otherwise: str | None = None, *, data: Sources = None
    ) -> None:
        """Display what this run found: `sentence`, or `otherwise` (if there is one) where `condition` is false.
        Stand-ins among `data` are named."""
        said = sentence if condition or otherwise is None else otherwise
        display(Markdown(f"> **{said}**{self.stand_ins(data)}"))

    def results(self, results: Mapping[str, Any]) -> None:
        """Display all results beside what `figures/published.json` says of others, and note the time until here.

        Args:
            results: name → a number, or several (mean ± standard deviation, and how many); or a tuple of this and
                the data and networks that it comes from (none: no stand-in is named). ValueError: a number is
                missing, NaN or infinite.
        """
        published = json.loads((REPOSITORY / "figures" / "published.json").read_text(encoding="utf-8"))
        rows = []
        for name, result in results.items():
            values, *sources = result if isinstance(result, tuple) else (result,)
            theirs = {"paper": "–", "public": "–"}
            for entry in published:
                if entry["notebook"] == self.notebook and name in entry["rows"]:
                    theirs[entry["column"]] = entry["figure"]
            told = self.stand_ins(sources if isinstance(result, tuple) else None)
            rows.append([name, in_words(name, values) + told, *theirs.values()])
        display(markdown_table(["result", "this run", "paper", "best public"], rows))
        seconds = time.perf_counter() - self.started
        self.note("wall time", f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes")


def in_words(name: str, values: float | Sequence[float]) -> str:
    """A result as it is shown: "0.973 ± 0.002 (n = 3)"."""
    numbers = np.atleast_1d(np.asarray(values, dtype=float))
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: {numbers} are no finite results")
    if numbers.size == 1:
        return f"{numbers[0]:.3f}"
    return f"{numbers.mean():.3f} ± {numbers.std(ddof=1):.3f} (n = {numbers.size})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A Markdown table of what is given, numbers as the caller formatted them."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells))
