"""What a notebook prints: how it was run, source code, tables, figures; and the results that outlive the run."""

from __future__ import annotations

import ast
import datetime
import inspect
import json
import math
import os
import platform
import textwrap
import time
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import torch
import torchvision
from filelock import FileLock
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from pdl_utils.datasets.sources import Provenance, Sourced
from pdl_utils.plots import use_style
from pdl_utils.settings import (
    REPOSITORY,
    Profile,
    T,
    bfloat16_is_faster,
    device_name,
    pick_device,
    save_atomically,
    save_text,
    seed_everything,
)

DPI = 100
S = TypeVar("S", bound=Sourced)


def figures_folder() -> Path:
    """Where figures and `results.json` are written: `PDL_FIGURES` if set, else `figures/` of the checkout."""
    return Path(os.environ.get("PDL_FIGURES") or REPOSITORY / "figures").absolute()


class Run:
    """One execution of a notebook. Making it picks the device, seeds, sets the style of the figures, and shows
    a table of what the notebook runs with, which grows as data are loaded.

    >>> run = Run("1_grad_cam", get_profile())
    >>> photos = run.use(imagenet_photos())

    Args:
        notebook: the notebook's file name without its ending.
        profile: decides sizes; in `full`, figures and results are written to `figures/` as well.
    """

    def __init__(self, notebook: str, profile: Profile) -> None:
        self.notebook, self.profile, self.device = notebook, profile, pick_device()
        self.started = time.perf_counter()
        self.entries: dict[str, dict[str, Any]] = {}  # what `record` gave, by name
        seed_everything(0)
        use_style()
        faster = bfloat16_is_faster(self.device)
        self.rows = {
            "profile": str(profile),
            "device": device_name(self.device),
            "precision": "float32; training in bfloat16, which is faster on this device" if faster else "float32",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
                        f"torchvision {torchvision.__version__}",
        }  # fmt: skip
        self.shown = display(self._table(), display_id=True)

    def _table(self) -> Markdown:
        return table(["run", "with"], self.rows.items())

    def note(self, what: str, value: str) -> None:
        """Add a row to the table at the notebook's top, or change it."""
        self.rows[what] = value
        if self.shown is not None:  # outside of a notebook there is nothing to update
            self.shown.update(self._table())

    def use(self, source: S) -> S:
        """Enter the provenance of data or weights into the table; returns what it was given."""
        self.note(source.provenance.name, source.provenance.source)
        return source

    def finish(self) -> None:
        """Enter the wall time since the `Run` was made into the table."""
        seconds = time.perf_counter() - self.started
        self.note("wall time", f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes")

    def choose(self, *, fast: T, full: T) -> T:
        """The value that belongs to this run's profile."""
        return self.profile.choose(fast=fast, full=full)

    def show(self, figure: Figure, name: str, alt: str, *, photographs: bool = False) -> Image:
        """The figure with a text for those who cannot see it; the last line of a cell.

        PNG, or JPEG for figures made of photographs: ten of them as PNG would bring a notebook over what
        GitHub shows. In the full profile it is written to `figures/` too, as `{name}.png` or `{name}.jpg`.
        """
        kind, options = ("jpeg", {"pil_kwargs": {"quality": 85, "subsampling": 0}}) if photographs else ("png", {})
        drawn = BytesIO()
        figure.savefig(drawn, format=kind, dpi=DPI, bbox_inches="tight", **options)
        plt.close(figure)
        if self.profile.name == "full":
            file = figures_folder() / f"{name}.{'jpg' if photographs else 'png'}"
            save_atomically(lambda partial: partial.write_bytes(drawn.getvalue()), file)
        return Image(drawn.getvalue(), format=kind, alt=alt)

    def record(
        self, name: str, values: float | Sequence[float], unit: str, *origins: Provenance
    ) -> dict[str, Any]:
        """Enter a result into `figures/results.json` (in the full profile) and return the entry.

        Args:
            name: what was measured, the same in every run.
            values: one number, or one a seed: mean and sample standard deviation are kept.
            unit: "micro-F1", "share of images", …
            origins: data and weights behind the number.

        Raises:
            ValueError: there is no value, or one is not finite.
        """
        numbers = [float(v) for v in (values if isinstance(values, Sequence) else [values])]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name}: {numbers} are no finite results")
        mean = sum(numbers) / len(numbers)
        spread = math.sqrt(sum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1)) if len(numbers) > 1 else 0.0
        entry = {
            "mean": round(mean, 6),
            "std": round(spread, 6),
            "n": len(numbers),
            "unit": unit,
            "provenance": [str(origin) for origin in origins],
            "run": f"{self.profile.name}, {device_name(self.device)}, torch {torch.__version__}, "
                   f"{datetime.date.today()}",
        }  # fmt: skip
        self.entries[name] = entry
        if self.profile.name == "full":
            enter_result(self.notebook, name, entry)
        return entry

    def results(self) -> Markdown:
        """All that was recorded in this run, beside what `figures/published.json` says of others."""
        published = json.loads((REPOSITORY / "figures" / "published.json").read_text(encoding="utf-8"))
        others = {
            (row, p["column"]): p["figure"]
            for p in published
            if p["notebook"] == self.notebook
            for row in p["rows"]
        }
        rows = []
        for name, entry in self.entries.items():
            theirs = [others.get((name, column), "–") for column in ("paper", "public")]
            rows.append([name, in_words(entry), *theirs, entry["unit"]])
        return table(["result", "this run", "paper", "best public", "unit"], rows)


def in_words(entry: dict[str, Any]) -> str:
    """A recorded result as it is shown: "0.973 ± 0.002 (n = 3)"."""
    return f"{entry['mean']:.3f}" + (f" ± {entry['std']:.3f} (n = {entry['n']})" if entry["n"] > 1 else "")


def enter_result(notebook: str, name: str, entry: dict[str, Any]) -> None:
    """Write one entry into `results.json`: notebook → name → entry."""
    file = figures_folder() / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(".results.json.lock")):  # two notebooks may record at once
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        results.setdefault(notebook, {})[name] = entry
        save_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n", file)


def show_source(*objects: Any) -> Markdown:
    """The source of functions, classes or methods as one code block, read from the installed package: what is
    shown is what runs. Docstrings are left out: the prose beside it explains."""
    parts = [without_docstrings(textwrap.dedent(inspect.getsource(obj)).rstrip()) for obj in objects]
    code = "\n\n\n".join(parts)
    return Markdown(f"```python\n{code}\n```")


def without_docstrings(code: str) -> str:
    """Python source without the docstrings of its functions and classes; comments stay."""
    lines = code.splitlines()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            first, last = text.lineno - 1, text.end_lineno
            lines[first:last] = [None] * (last - first)
            if len(node.body) == 1:  # a body that is a docstring alone still needs a statement
                lines[first] = " " * text.col_offset + "..."
    return "\n".join(line for line in lines if line is not None)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A Markdown table: text on the left, numbers (as they are formatted by the caller) as given."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return Markdown("\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]))
