"""What a notebook shows: how it was run, figures, tables, findings and results."""

import json
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

from pdl_utils import settings
from pdl_utils.plots import use_style
from pdl_utils.training import UnusableState, run_file, write_state

LAB_WIDTH = 847  # pixels that JupyterLab has for a figure; it shrinks what is wider
T = TypeVar("T")
Sources = Iterable[Any] | None  # data sets and networks: whatever has a `.provenance`; None: all used so far


class Run:
    """One execution of a notebook. Making it picks profile and device, seeds, sets the style of figures, and shows
    a table of what the notebook runs with, which grows as data are loaded.

    >>> run = Run("1_grad_cam")  # the file's name; a second argument, "fast" or "full", chooses the profile
    >>> config = run.config(fast={"photos": 24}, full={"photos": 200})
    >>> album = run.use(imagenet_photos(config.photos))
    """

    def __init__(self, notebook: str, profile: str | None = None) -> None:
        self.notebook, self.device = notebook, settings.pick_device()
        name, reason = settings.get_profile(profile)
        self.full = name == "full"
        self.started, self.sources, self.found = time.perf_counter(), [], []  # found: for each training, was it?
        settings.seed_everything(0)
        use_style()
        bfloat16 = "; training in bfloat16" if settings.has_bfloat16(self.device) else ""
        versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        self.rows = {
            "profile": f"{name} ({reason})",
            "device": settings.device_name(self.device),
            "precision": f"float32{bfloat16}",
            "versions": f"Python {platform.python_version()}, {versions}",
        }
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
        self.note(source.provenance.name, source.provenance.source)
        self.sources.append(source)
        return source

    def config(self, *, fast: Mapping[str, Any], full: Mapping[str, Any]) -> SimpleNamespace:
        """The settings of this run's profile, `config.name`. ValueError: the two do not name the same ones."""
        if fast.keys() != full.keys():
            raise ValueError(f"name in both profiles: {', '.join(sorted(fast.keys() ^ full.keys()))}")
        return SimpleNamespace(**(full if self.full else fast))

    def file(self, name: str, *code: Callable | torch.nn.Module, **decisive: Any) -> Path | None:
        """Where `fit` keeps a training in the full profile, see `run_file`; None in the fast one."""
        if not self.full:
            return None
        path = run_file(name, *code, **decisive)
        self.found.append(path.exists())
        self.note("trainings", f"{sum(self.found)} of {len(self.found)} were found in runs/ and not repeated")
        return path

    def once(self, name: str, compute: Callable[[], T], *code: Callable, **decisive: Any) -> T:
        """What `compute()` gives: tensors, numbers, and lists and dictionaries of them. In the full profile it is
        kept like a training, under a name made of its code, `code` and `decisive`, and read back the next time."""
        path = self.file(name, getattr(compute, "func", compute), *code, **decisive)
        if path is None:
            return compute()
        if not path.exists():
            settings.save_atomically(partial(write_state, compute()), path)
        try:
            return torch.load(path, "cpu", weights_only=True)
        except Exception as error:  # all kinds are raised
            raise UnusableState(f"{path} is damaged; remove it to compute it again ({error})") from error

    def show(
        self, figure: Figure, name: str, alt: str = "", *, photographs: bool = False, data: Sources = None
    ) -> None:
        """Display a figure with a text for those who cannot see it; stand-ins among `data` are named below it. In
        the full profile it is written to `PDL_FIGURES`, or `build/figures/`, as `{name}.png`. Figures made of
        photographs are JPEG, `{name}.jpg`: ten as PNG would bring a notebook over what GitHub shows."""
        told, kind, drawn = self._stand_ins(data), "jpg" if photographs else "png", BytesIO()
        if told:
            figure.text(1, 0, told.strip(" ·"), ha="right", va="top", style="italic")
        figure.draw_without_rendering()  # or its layout would not be known yet
        dots = min(100, LAB_WIDTH / (figure.get_tightbbox().width + 0.2))  # an inch; the margins are 0.2
        jpeg = {"quality": 85, "subsampling": 0}  # PNG knows neither
        figure.savefig(drawn, format=kind, dpi=dots, bbox_inches="tight", pil_kwargs=jpeg)
        plt.close(figure)
        display(Image(drawn.getvalue(), format=kind, alt=alt or words_in(figure) or name))
        if self.full:
            folder = Path(settings.variable("PDL_FIGURES") or "build/figures").expanduser()
            path = settings.REPOSITORY / folder / f"{name}.{kind}"
            try:
                settings.save_atomically(lambda place: place.write_bytes(drawn.getvalue()), path)
            except OSError as error:  # the figure is in the notebook all the same
                self.note("figures", f"not written: {error}")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]], *, data: Sources = None) -> None:
        """Display a Markdown table; stand-ins among `data` are named in its first cell."""
        display(markdown_table([head[0] + self._stand_ins(data), *head[1:]], rows))

    def finding(self, condition: bool, sentence: str, otherwise: str = "", *, data: Sources = None) -> None:
        """Display what this run found: `sentence`, or `otherwise` where `condition` is false; stand-ins among
        `data` are named."""
        said = sentence if condition else otherwise or f"This run does not confirm: {sentence}"
        display(Markdown(f"> **{said}**{self._stand_ins(data)}"))

    def results(self, results: Mapping[str, Any]) -> None:
        """Display all results beside what `figures/published.json` says of others, and note the time until here.
        `results`: name → a number, or several (mean ± standard deviation, and how many); or a tuple of this and
        the data and networks that it comes from."""
        published = json.loads((settings.REPOSITORY / "figures" / "published.json").read_text(encoding="utf-8"))
        published = [entry for entry in published if entry["notebook"] == self.notebook]
        rows = []
        for name, result in results.items():
            values, *sources = result if isinstance(result, tuple) else (result, *self.sources)
            theirs = {entry["column"]: entry["figure"] for entry in published if name in entry["rows"]}
            ours = mean_and_deviation(name, values) + self._stand_ins(sources)
            rows.append([name, ours, theirs.get("paper", "–"), theirs.get("public", "–")])
        display(markdown_table(["result", "this run", "paper", "best public"], rows))
        seconds = time.perf_counter() - self.started
        self.note("wall time", f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes")

    def _stand_ins(self, data: Sources) -> str:
        """The tag " · stand-in for CIFAR-10" if that is what took its place among `data`; else nothing."""
        return "".join(dict.fromkeys(s.provenance.tag for s in (self.sources if data is None else data)))


def words_in(figure: Figure) -> str:
    """A figure's titles, and the labels of its axes and lines: what it says, for those who cannot see it."""
    words = [figure.get_suptitle()]
    for axis in figure.axes:
        words += [axis.get_title("left"), axis.get_ylabel(), axis.get_xlabel()]
        words += axis.get_legend_handles_labels()[1]
    return "; ".join(dict.fromkeys(word for word in words if word))


def mean_and_deviation(name: str, values: float | Sequence[float]) -> str:
    """A result as it is shown: "0.973 ± 0.002 (n = 3)". ValueError: a number is missing, NaN or infinite."""
    numbers = np.atleast_1d(np.asarray(values, dtype=float))
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: {numbers} are no finite results")
    if numbers.size == 1:
        return f"{numbers[0]:.3f}"
    return f"{numbers.mean():.3f} ± {numbers.std(ddof=1):.3f} (n = {numbers.size})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A Markdown table of what is given, numbers as the caller formatted them."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell, _ in zip(line, head, strict=True)] for line in lines]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in cells))
