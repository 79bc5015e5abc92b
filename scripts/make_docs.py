"""Write docs/results.md, and the table in README.md, from figures/results.json and figures/published.json.

    python scripts/make_docs.py     `make figures` ends with it

results.json is written by the notebooks' full profile: notebook → name → {"mean", "std", "n", "unit",
"provenance", "run"}. published.json is kept by hand. It lists what others measured: for the `rows` of a
`notebook`, in the `column` "paper" or "public" (the best that we found), the `figure` as it is shown, what was
`measured`, the `source` and its `address`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

from pdl_utils.notebook import in_words
from pdl_utils.settings import REPOSITORY, save_text

Results = dict[str, dict[str, dict[str, Any]]]
Published = Sequence[dict[str, Any]]

# README's table: notebook, result, and what README calls it.
CHOSEN = [
    ("1_grad_cam", "pointing, layer4, boxes under half of the image", "Grad-CAM's peak lies in the box"),
    ("1_grad_cam", "pointing, centre point, boxes under half of the image", "the image's centre lies in the box"),
    ("2_graph_attention", "MLP, no edges, test micro-F1", "PPI, micro-F1: without edges"),
    ("2_graph_attention", "uniform + skips, test micro-F1", "PPI, micro-F1: uniform averaging"),
    ("2_graph_attention", "GAT + skips, test micro-F1", "PPI, micro-F1: GAT"),
    ("2_graph_attention", "GATv2 + skips, test micro-F1", "PPI, micro-F1: GATv2"),
    ("3_transfer_learning", "100 labels: scratch, nothing", "CIFAR-10, 100 labels: from scratch"),
    ("3_transfer_learning", "100 labels: transfer + mirror, probe", "CIFAR-10, 100 labels: transfer"),
    ("3_transfer_learning", "100 labels: SimCLR, fine-tuned", "CIFAR-10, 100 labels: SimCLR"),
    ("3_transfer_learning", "100 labels: transfer + mirror, pseudo-labels", "CIFAR-10, 100 labels: pseudo-labels"),
]
MARKERS = ("<!-- results -->", "<!-- end of results -->")  # in README.md, around its table
COLUMNS = ("paper", "public")
INTRODUCTION = """# All results

`scripts/make_docs.py` writes this page. The column "here" comes from the notebooks' full profile by way of
[`figures/results.json`](../figures/results.json): the mean and, where there are several runs or photographs, their
sample standard deviation and their number n. What others measured is in
[`figures/published.json`](../figures/published.json): "paper" is what the papers report, "best
public" is the best that we found. Many of these were measured with other data, labels or networks: the words in
brackets say with which, and the letter leads to the details. A dash means that we know of nothing close enough to
compare with.
"""


def load(name: str) -> Any:
    """The content of a JSON file in `figures/`."""
    return json.loads((REPOSITORY / "figures" / name).read_text(encoding="utf-8"))


def theirs(published: Published, results: Results) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What others measured, by (notebook, row, column).

    Raises:
        ValueError: a figure belongs to no result, or two to one place.
    """
    placed: dict[tuple[str, str, str], dict[str, Any]] = {}
    for figure in published:
        for row in figure["rows"]:
            place = (figure["notebook"], row, figure["column"])
            if row not in results.get(figure["notebook"], {}):
                raise ValueError(f"published.json: {figure['notebook']} has recorded no result {row!r}")
            if place in placed:
                raise ValueError(f"published.json: two figures for {place}")
            placed[place] = figure
    return placed


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which "rank 2" comes before "rank 16"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def of_stand_in(entry: dict[str, Any]) -> bool:
    """Were data or weights behind this result a stand-in?"""
    return any(": stand-in" in origin for origin in entry["provenance"])


def results_page(results: Results, published: Published) -> str:
    """docs/results.md: a table a notebook beside what others measured, then what each of those figures is."""
    placed = theirs(published, results)
    parts = [INTRODUCTION]
    for notebook, entries in sorted(results.items()):
        parts.append(f"## [{notebook}](../notebooks/{notebook}.ipynb)\n")
        if any(map(of_stand_in, entries.values())):
            parts.append("Some of ours are from a stand-in, as the last line says: **not comparable**.\n")
        parts.append("| what | here | paper | best public | unit |\n|---|---|---|---|---|")
        notes: list[str] = []
        for name in sorted(entries, key=natural):
            cells = []
            for column in COLUMNS:
                figure = placed.get((notebook, name, column))
                if figure is None:
                    cells.append("–")
                    continue
                note = f"{figure['measured']} ([{figure['source']}]({figure['address']}))"
                if note not in notes:
                    notes.append(note)
                cells.append(f"{figure['figure']} <sup>{ascii_lowercase[notes.index(note)]}</sup>")
            parts.append(f"| {name} | {in_words(entries[name])} | {' | '.join(cells)} | {entries[name]['unit']} |")
        parts.append("")
        parts += [f"- <sup>{letter}</sup> {note}" for letter, note in zip(ascii_lowercase, notes, strict=False)]
        origins = sorted({origin for entry in entries.values() for origin in entry["provenance"]})
        runs = sorted({entry["run"] for entry in entries.values()})
        parts.append(f"\nOurs were made from {' · '.join(origins)}. Run: {' · '.join(runs)}.\n")
    return "\n".join(parts)


def readme_table(results: Results, published: Published, chosen: Sequence[tuple[str, str, str]] = CHOSEN) -> str:
    """README's table: the `chosen` results beside what others measured.

    Raises:
        ValueError: a chosen result is not recorded.
    """
    placed = theirs(published, results)
    lines = ["| result | here | paper | best public |", "|---|---|---|---|"]
    for notebook, name, title in chosen:
        if name not in results.get(notebook, {}):
            raise ValueError(f"README's table: {notebook} has recorded no result {name!r}")
        entry = results[notebook][name]
        here = in_words(entry) + (" (stand-in)" if of_stand_in(entry) else "")
        others = [placed.get((notebook, name, column), {"figure": "–"})["figure"] for column in COLUMNS]
        lines.append(f"| {notebook[0]} · {title} | {here} | {' | '.join(others)} |")
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """README's text with `table` between its two markers."""
    before, _, rest = readme.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}"


def main() -> None:
    results, published, readme = load("results.json"), load("published.json"), REPOSITORY / "README.md"
    page, table = results_page(results, published), readme_table(results, published)
    save_text(page, REPOSITORY / "docs" / "results.md")
    save_text(with_table(readme.read_text(encoding="utf-8"), table), readme)


if __name__ == "__main__":
    main()
