"""What a reader meets: the committed notebooks, checked as files; and the ways in which nbval passes in
silence, each one closed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pdl_utils.results import readme_table

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARKER = "NBVAL_CHECK_OUTPUT"
MEGABYTE = 2**20


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def python_of(cell):
    """The cell's syntax tree, without IPython's magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def problems(notebook) -> list[str]:
    """Everything that a committed notebook must not have."""
    found = []
    cells = code_cells(notebook)
    if [c.execution_count for c in cells] != list(range(1, len(cells) + 1)):
        found.append("execution counts are not 1…n: not rendered in one run from the top")
    for number, cell in enumerate(cells, 1):
        where = f"code cell {number}"
        if len(cell.source.splitlines()) > 28:
            found.append(f"{where} has {len(cell.source.splitlines())} lines")
        for line in cell.source.splitlines():
            if MARKER in line and line.strip() not in (f"# {MARKER}", f"#{MARKER}"):
                found.append(f"{where}: nbval ignores a marker with other text on its line: {line.strip()!r}")
        for node in ast.walk(python_of(cell)):
            if isinstance(node, ast.Assert):
                if isinstance(node.test, ast.Tuple):
                    found.append(f"{where}: assert of a tuple is always true")
                elif isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
                    found.append(f"{where}: 'assert not' passes for NaN; turn the comparison around")
                elif node.msg is None:
                    found.append(f"{where}: an assert without a message")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"{where} holds an error")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where} holds stderr: {output.text[:60]!r}")
            data = output.get("data", {})
            if any("widget" in kind or "svg" in kind for kind in data):
                found.append(f"{where} holds what GitHub does not show: {sorted(data)}")
            if (
                "image/png" in data
                and not output.metadata.get("image/png", {}).get("alt")
                and not output.metadata.get("alt")
            ):
                found.append(f"{where}: a figure without an alternative text")
    text = nbformat.writes(notebook)
    if len(text.encode()) > 2 * MEGABYTE:
        found.append(f"{len(text.encode()) / MEGABYTE:.1f} MB, over 2")
    if re.search(r"/(home|root|Users|work|tmp)/", text):
        found.append("shows a path of the machine it was rendered on")
    if "sys.path" in text:
        found.append("edits sys.path")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_whole(path):
    assert problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_come_from_the_full_profile_and_make_claims(path):
    notebook = nbformat.read(path, as_version=4)
    streams = [o.text for c in code_cells(notebook) for o in c.outputs if o.output_type == "stream"]
    assert any(text.startswith("profile: full") for text in streams)
    claims = [n for c in code_cells(notebook) for n in ast.walk(python_of(c)) if isinstance(n, ast.Assert)]
    assert len(claims) >= 5


def tiny_notebook(*sources, run=True):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for count, cell in enumerate(notebook.cells, 1):
        cell.execution_count = count if run else None
    return notebook


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("# NBVAL_CHECK_OUTPUT shapes\n1", "marker with other text"),
        ("assert (1 > 2, 'message')", "assert of a tuple"),
        ("assert not score < 0.5, 'too low'", "passes for NaN"),
        ("assert 1 < 2", "without a message"),
        ("import sys\nsys.path.append('.')", "edits sys.path"),
        ("open('/home/me/file')", "path of the machine"),
        ("\n".join("x = 1" for _ in range(40)), "40 lines"),
    ],
)
def test_the_guard_sees_what_it_guards_against(source, complaint):
    assert any(complaint in p for p in problems(tiny_notebook(source)))
    assert problems(tiny_notebook("assert 1 < 2, 'arithmetic'")) == []
    assert any("not 1…n" in p for p in problems(tiny_notebook("x = 1", run=False)))


def nbval(path):
    """Return code of the command that `make test` runs on a notebook."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, path], capture_output=True, text=True, timeout=120, cwd=path.parent
    ).returncode


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda nb: None, 0),
        (lambda nb: nb.cells[0].outputs[0].update(text="(2, 4)\n"), 1),
        (lambda nb: nb.cells[1].update(source="assert 1 > 2, 'a claim that broke'"), 1),
    ],
    ids=["as it is", "a marked output corrupted", "a claim broken"],
)
def test_nbval_goes_red_when_it_should(tmp_path, change, expected):
    notebook = tiny_notebook(f"# {MARKER}\nprint((2, 3))", "assert 1 < 2, 'arithmetic'")
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="(2, 3)\n")]
    change(notebook)
    path = tmp_path / "copy.ipynb"
    nbformat.write(notebook, path)
    assert nbval(path) == expected


def test_the_runner_writes_copies_and_html_and_fails_when_a_cell_does(tmp_path):
    from pdl_utils.run_notebooks import main

    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    table = "from IPython.display import Markdown\nMarkdown('| run | with |\\n|---|---|')"
    nbformat.write(tiny_notebook("print(6 * 7)", table, run=False), good)
    nbformat.write(tiny_notebook("1 / 0", run=False), bad)
    dead = tmp_path / "dead.ipynb"
    nbformat.write(tiny_notebook("import os\nos._exit(1)", run=False), dead)
    assert main(["--out", str(tmp_path / "out"), str(good)]) == 0
    executed = nbformat.read(tmp_path / "out" / "good.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "42\n"
    assert re.search(r"\| wall time \| \d+ seconds \|$", executed.cells[1].outputs[0].data["text/markdown"])
    assert "42" in (tmp_path / "out" / "good.html").read_text()
    assert main(["--out", str(tmp_path / "out"), str(dead), str(bad), str(good)]) == 1
    before = bad.read_bytes()
    assert main(["--in-place", str(bad)]) == 1
    assert bad.read_bytes() == before  # a failed run replaces nothing


def test_results_are_complete_and_readme_shows_them():
    results = json.loads((ROOT / "figures" / "results.json").read_text())
    assert readme_table(results) in (ROOT / "README.md").read_text()
    for notebook, entries in results.items():
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists()
        for name, entry in entries.items():
            assert set(entry) == {"mean", "std", "n", "unit", "provenance", "run"}, name
            assert entry["run"].startswith("full"), name
