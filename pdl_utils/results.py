"""Numbers and figures that outlive a notebook's run, each with the run that made it."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import torch
from filelock import FileLock
from IPython.display import Image
from matplotlib.figure import Figure

from pdl_utils.provenance import Provenance, device_name
from pdl_utils.settings import REPOSITORY, Profile, pick_device, save_atomically

FIGURES = REPOSITORY / "figures"
DPI = 100
MARKERS = ("<!-- results -->", "<!-- end of results -->")  # in README.md, around its table


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
            save_atomically(lambda partial: partial.write_text(text, encoding="utf-8"), file)
    return entry


def readme_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All results as README shows them: a Markdown table a notebook, and under it what it was made from."""
    parts = []
    for notebook, entries in sorted(results.items()):
        parts.append(f"\n**{notebook}**\n\n| what | this repository | unit |\n|---|---|---|")
        for name, entry in sorted(entries.items()):
            spread = f" ± {entry['std']:.3f} (n = {entry['n']})" if entry["n"] > 1 else ""
            parts.append(f"| {name} | {entry['mean']:.3f}{spread} | {entry['unit']} |")
        origins = {part for entry in entries.values() for part in entry["provenance"].split("; ") if part}
        runs = {entry["run"] for entry in entries.values()}
        parts.append(f"\n*Made from {' · '.join(sorted(origins))}. Run: {' · '.join(sorted(runs))}.*")
    return "\n".join(parts)


def update_readme() -> None:
    """Put the table of `figures/results.json` between README's two markers."""
    readme = REPOSITORY / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    results = json.loads((FIGURES / "results.json").read_text(encoding="utf-8"))
    text = f"{before}{MARKERS[0]}\n{readme_table(results)}\n{MARKERS[1]}{after}"
    save_atomically(lambda partial: partial.write_text(text, encoding="utf-8"), readme)


if __name__ == "__main__":  # `make figures` ends with it
    update_readme()
