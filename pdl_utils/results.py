"""Numbers and figures that outlive a notebook's run, each with the run that made it."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Sequence
from io import BytesIO
from string import ascii_lowercase
from typing import Any

import matplotlib.pyplot as plt
import torch
from filelock import FileLock
from IPython.display import Image
from matplotlib.figure import Figure

from pdl_utils.provenance import Provenance, device_name
from pdl_utils.settings import REPOSITORY, Profile, pick_device, save_atomically, save_text

FIGURES = REPOSITORY / "figures"
DPI = 100
MARKERS = ("<!-- results -->", "<!-- end of results -->")  # in README.md, around its table
HEAD = "| what | this repository | the papers | best public | unit |\n|---|---|---|---|---|"


def show_figure(figure: Figure, name: str, alt: str, profile: Profile, *, photographs: bool = False) -> Image:
    """The figure with a text for those who cannot see it; the last line of a cell.

    PNG, or JPEG for figures made of photographs: ten of them as PNG would bring a notebook over what GitHub
    shows. In the full profile it is written to `figures/` too, as `{name}.png` or `{name}.jpg`.
    """
    kind, options = ("jpeg", {"pil_kwargs": {"quality": 85, "subsampling": 0}}) if photographs else ("png", {})
    drawn = BytesIO()
    figure.savefig(drawn, format=kind, dpi=DPI, bbox_inches="tight", **options)
    plt.close(figure)
    if profile.name == "full":
        file = FIGURES / f"{name}.{'jpg' if photographs else 'png'}"
        save_atomically(lambda partial: partial.write_bytes(drawn.getvalue()), file)
    return Image(drawn.getvalue(), format=kind, alt=alt)


def record(
    profile: Profile, notebook: str, name: str, values: float | Sequence[float], unit: str, *origins: Provenance
) -> dict[str, Any]:
    """Enter a result into `figures/results.json` (in the full profile) and return the entry.

    Args:
        notebook: the notebook's file name without its ending.
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
        "provenance": "; ".join(map(str, origins)),
        "run": f"{profile.name}, {device_name(pick_device())}, torch {torch.__version__}, {datetime.date.today()}",
    }
    if profile.name == "full":
        file = FIGURES / "results.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(FIGURES / ".results.json.lock"):  # two notebooks may record at once
            results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            results.setdefault(notebook, {})[name] = entry
            text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
            save_text(text, file)
    return entry


def published_figures() -> list[dict[str, Any]]:
    """What others measured, kept by hand in `figures/published.json`: for the `rows` of a `notebook`, in the
    `column` "papers" or "public" (the best that we found), the `figure`, what was `measured`, the `source`."""
    return json.loads((FIGURES / "published.json").read_text(encoding="utf-8"))


def readme_table(
    results: dict[str, dict[str, dict[str, Any]]], published: Sequence[dict[str, Any]] | None = None
) -> str:
    """All results as README shows them: a Markdown table a notebook beside what others measured, and under it
    what each of those figures is and what ours were made from.

    Raises:
        ValueError: a published figure belongs to no result, or two to one place.
    """
    published = published_figures() if published is None else published
    parts = []
    for notebook, entries in sorted(results.items()):
        names = sorted(entries, key=_natural)
        theirs = [p for p in published if p["notebook"] == notebook]
        if strangers := sorted({row for p in theirs for row in p["rows"]} - set(names)):
            raise ValueError(f"published.json has figures for {strangers}, which {notebook} has not recorded")
        theirs.sort(key=lambda p: (names.index(p["rows"][0]), p["column"]))
        cells, notes = _cells_and_notes(theirs)
        origins = {part for entry in entries.values() for part in entry["provenance"].split("; ") if part}
        parts.append(f"\n**{notebook}**")
        if notes and any(": stand-in" in origin for origin in origins):
            parts.append("\nOurs are from a stand-in, theirs from the real data: **not comparable**.")
        parts.append(f"\n{HEAD}")
        for name in names:
            entry = entries[name]
            spread = f" ± {entry['std']:.3f} (n = {entry['n']})" if entry["n"] > 1 else ""
            others = " | ".join(cells.get((name, column), "–") for column in ("papers", "public"))
            parts.append(f"| {name} | {entry['mean']:.3f}{spread} | {others} | {entry['unit']} |")
        if notes:
            parts.append(f"\nThe others': {' · '.join(notes)}.")
        runs = {entry["run"] for entry in entries.values()}
        parts.append(f"\n*Ours made from {' · '.join(sorted(origins))}. Run: {' · '.join(sorted(runs))}.*")
    if strangers := sorted({p["notebook"] for p in published} - set(results)):
        raise ValueError(f"published.json has figures for {strangers}, which have no results")
    return "\n".join(parts)


def _cells_and_notes(published: Sequence[dict[str, Any]]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Cells by (row, column), each with the letter of its note, and the notes."""
    cells: dict[tuple[str, str], str] = {}
    notes = []
    for letter, entry in zip(ascii_lowercase, published, strict=False):
        notes.append(f"<sup>{letter}</sup> {entry['measured']} ([{entry['source']}]({entry['address']}))")
        for row in entry["rows"]:
            if (row, entry["column"]) in cells:
                raise ValueError(f"published.json has two figures for {row!r}, {entry['column']}")
            cells[row, entry["column"]] = f"{entry['figure']} <sup>{letter}</sup>"
    return cells, notes


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which "rank 2" comes before "rank 16"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def update_readme() -> None:
    """Put the table of `figures/results.json` between README's two markers."""
    readme = REPOSITORY / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    results = json.loads((FIGURES / "results.json").read_text(encoding="utf-8"))
    text = f"{before}{MARKERS[0]}\n{readme_table(results)}\n{MARKERS[1]}{after}"
    save_text(text, readme)


if __name__ == "__main__":  # `make figures` ends with it
    update_readme()
