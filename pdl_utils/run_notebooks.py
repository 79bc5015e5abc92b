"""Execute notebooks from top to bottom, each in a kernel of its own.

python -m pdl_utils.run_notebooks --out build/notebooks notebooks/*.ipynb    copies and HTML
python -m pdl_utils.run_notebooks --in-place notebooks/*.ipynb               the committed renderings
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from pdl_utils.provenance import RUN_TABLE
from pdl_utils.settings import get_profile, save_text

Notebook = nbformat.NotebookNode
# nbconvert sets code in outputs, which show_source makes, in the font of prose.
CODE_STYLE = "<style>.jp-RenderedMarkdown pre { font-family: var(--jp-code-font-family) !important }</style>"


def execute(path: Path, cell_timeout: int) -> tuple[Notebook, str | None]:
    """Run a notebook in its own folder; the executed copy, and what went wrong if anything did."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=cell_timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        record_timing=False, extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip
    try:
        client.execute()
    except Exception as error:  # a failed cell, a time-out, a dead kernel: this notebook's failure, whatever it is
        return notebook, str(error) or repr(error)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}  # the kernel's version would change in every rendering
    return notebook, None


def enter_wall_time(notebook: Notebook, seconds: float) -> None:
    """Add how long the run took to the table at the notebook's top, which could not know it yet."""
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        text = output.get("data", {}).get("text/markdown", "")
        if text.startswith(RUN_TABLE):
            output.data["text/markdown"] = f"{text}\n| wall time | {took} |"


def write(notebook: Notebook, path: Path) -> None:
    save_text(nbformat.writes(notebook) + "\n", path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="+")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, help="folder for the executed copies and their HTML")
    place.add_argument("--in-place", action="store_true", help="write the outputs into the notebooks themselves")
    parser.add_argument("--cell-timeout", type=int, default=7200, help="seconds for one cell")
    args = parser.parse_args(argv)

    print(f"profile: {get_profile()}", flush=True)
    failed = []
    for number, path in enumerate(args.notebooks, 1):
        print(f"[{number}/{len(args.notebooks)}] {path.name} … ", end="", flush=True)
        started = time.perf_counter()
        notebook, problem = execute(path, args.cell_timeout)
        seconds = time.perf_counter() - started
        enter_wall_time(notebook, seconds)
        print(f"{'failed' if problem else 'ok'} in {seconds:.0f} s", flush=True)
        if problem:
            failed.append(path.name)
            print(problem, file=sys.stderr)
        if args.out:
            write(notebook, args.out / path.name)
            html, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
            html = html.replace("</head>", f"{CODE_STYLE}</head>", 1)
            save_text(html, args.out / f"{path.stem}.html")
        elif not problem:  # a failed run never replaces a good rendering
            write(notebook, path)
    if args.out:
        print(f"executed notebooks and their HTML: {args.out.resolve()}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
