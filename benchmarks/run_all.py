"""All benchmarks in turn; their ratios in one JSON file, in one figure, and on the page docs/benchmarks.md.

    python benchmarks/run_all.py [--rounds N] [--out build/quick] [--draw]

At most fifteen minutes on two ordinary CPU cores that nothing else keeps busy. On busy ones, what runs in
several threads is timed wrongly, by a factor of ten and more. `--rounds 1` is a quick look, best with `--out`.
`--draw` measures nothing: it makes the figure and the page from the JSON file that is there.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from side_by_side import LIMIT, save_json

from pdl_utils.plots import COLORS, use_style
from pdl_utils.settings import REPOSITORY, save_atomically, save_text

SCRIPTS = ("grad_cam", "graph_attention", "simclr", "lora")
PARTS = REPOSITORY / "build" / "bench"
INTRODUCTION = """# Speed, beside the peers

`make bench` writes this page, [the figure](../figures/benchmarks.png) and
[the numbers](../figures/benchmarks.json), in at most fifteen minutes on two CPU cores.

![Ratios of our time to that of the peers and of the work that no one can avoid](../figures/benchmarks.png)

Ours and the others take turns, every other round backwards, and the ratio of times is taken round by round: below
1, ours is faster. The tables give the median and the range. Rows that end with "(limit)" compare with work that no
implementation can avoid, not with a peer. Ratios depend on the machine, most of all on its memory; what they were
measured with stands above each table.
"""
# Two kinds of comparison, apart in color, in shape and in filling.
PEER = {"label": "against a peer", "color": COLORS[0], "marker": "o", "markerfacecolor": COLORS[0]}
WORK = {
    "label": "against the limit: work no one can avoid",
    "color": COLORS[5],
    "marker": "D",
    "markerfacecolor": "w",
}
ROW, HEAD = 0.2, 0.45  # inches


def run(name: str, rounds: int | None) -> Path:
    """Run a benchmark in a process of its own; the file with its numbers."""
    file = PARTS / f"{name}.json"
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--json", str(file)]
    command += ["--rounds", str(rounds)] if rounds else []
    subprocess.run(command, env={"PYTHONWARNINGS": "ignore::FutureWarning"} | os.environ, check=True)
    return file


def merge(files: Mapping[str, Path]) -> dict[str, Any]:
    """Name → what the benchmark reported."""
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}


def draw_ratios(axis: Axes, found: Mapping[str, Any]) -> None:
    """A row a ratio: its median as a dot, its range as a line, and its median as a number."""
    ratios = found["ratios"]
    for i, (name, r) in enumerate(ratios.items()):
        look = {key: value for key, value in (WORK if name.endswith(LIMIT) else PEER).items() if key != "label"}
        axis.plot([r["min"], r["max"]], [i, i], color=look["color"], linewidth=1.5)
        axis.plot(r["median"], i, markersize=5.5, **look)
        axis.text(1.01, i, f"{r['median']:.2f}", transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=1, zorder=0)
    axis.set_yticks(range(len(ratios)), [name.removesuffix(LIMIT).rstrip() for name in ratios], fontsize=8)
    axis.set_ylim(len(ratios) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_title(f"{found['title']} · {found['device']}", fontsize=8, x=-0.05)  # room for the device at its end


def draw(benchmarks: Mapping[str, Any], file: Path) -> None:
    """One figure of all ratios, a panel a benchmark, over a common axis."""
    use_style()
    rows = [len(found["ratios"]) for found in benchmarks.values()]
    height = ROW * sum(rows) + HEAD * len(rows) + 0.8
    figure, axes = plt.subplots(
        len(rows), 1, sharex=True, squeeze=False, figsize=(9.5, height), height_ratios=rows
    )
    for axis, found in zip(axes.flat, benchmarks.values(), strict=True):
        draw_ratios(axis, found)
    last = axes[-1, 0]
    last.set(xscale="log", xlabel="time, ours / theirs (left of 1, ours is faster); median and range")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last.xaxis.set_minor_formatter(NullFormatter())
    handles = [plt.Line2D([], [], linewidth=1.5, markersize=5.5, **look) for look in (PEER, WORK)]
    figure.legend(handles=handles, ncols=2, loc="outside upper right")
    save_atomically(lambda partial: figure.savefig(partial, format="png", dpi=100), file)
    plt.close(figure)


def page(benchmarks: Mapping[str, Any]) -> str:
    """docs/benchmarks.md: what each benchmark says about itself at its top, and its ratios."""
    parts = [INTRODUCTION]
    for name, found in benchmarks.items():
        code = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        head, _, body = str(ast.get_docstring(ast.parse(code))).partition(".\n")
        rows = [
            f"| {what} | {r['median']:.2f} | {r['min']:.2f}–{r['max']:.2f} |"
            for what, r in found["ratios"].items()
        ]
        parts += [
            f"## {head}\n{body}\n",
            f"*{found['title']} · {found['device']} · torch {found['torch']}*\n",
            "| time, ours / theirs | median | range |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        ]
        for layer, peak in found.get("peak_mb", {}).items():
            ours, theirs = peak.values()
            parts.append(f"Memory's peak, {layer}: {ours} MB, {ours / theirs:.2f} of the peer's {theirs} MB.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of every benchmark; by default each has its own number")
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="folder for figures/ and docs/")
    parser.add_argument("--draw", action="store_true", help="measure nothing, make the figure and the page anew")
    args = parser.parse_args()
    started, files, numbers = time.perf_counter(), {}, args.out / "figures" / "benchmarks.json"
    if not args.draw:
        for name in SCRIPTS:
            files[name] = run(name, args.rounds)
            print(f"\n== {name} done, {(time.perf_counter() - started) / 60:.1f} min so far", flush=True)
        save_json(merge(files), numbers)
    benchmarks = json.loads(numbers.read_text(encoding="utf-8"))
    draw(benchmarks, numbers.with_suffix(".png"))
    save_text(page(benchmarks), args.out / "docs" / "benchmarks.md")
    print(f"figures/benchmarks.json, .png and docs/benchmarks.md are in {args.out}")


if __name__ == "__main__":
    main()
