"""What a reader meets: the notebooks as files, committed or just executed (`PDL_NOTEBOOKS=build/notebooks`); and
the ways in which nbval passes in silence, each one closed."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pdl_utils.settings import REPOSITORY

NOTEBOOKS = sorted(Path(os.environ.get("PDL_NOTEBOOKS", REPOSITORY / "notebooks")).glob("*.ipynb"))
MARKER = "NBVAL_CHECK_OUTPUT"
CORES = {"1_grad_cam": 1, "2_graph_attention": 2, "3_transfer_learning": 2}  # Grad-CAM; GAT, GATv2; NT-Xent, LoRA
MEGABYTE = 2**20


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def python_of(cell):
    """The cell's syntax tree, without IPython's magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def source_problems(notebook) -> list[str]:
    """What no notebook may have in its code."""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        where, lines = f"code cell {number}", cell.source.splitlines()
        if len(lines) > 27:
            found.append(f"{where} has {len(lines)} lines")
        if lines[0].startswith("# Core") and len(lines) > 16:  # 15 and the line that says so
            found.append(f"{where} is a core of {len(lines)} lines")
        for line in lines:
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
    if "sys.path" in "\n".join(c.source for c in notebook.cells):
        found.append("edits sys.path")
    return found


def output_problems(notebook) -> list[str]:
    """What a rendering must not have. A marked cell that was not run is never compared."""
    found = []
    cells = code_cells(notebook)
    if [c.execution_count for c in cells] != list(range(1, len(cells) + 1)):
        found.append("execution counts are not 1…n: not rendered in one run from the top")
    for number, cell in enumerate(cells, 1):
        where = f"code cell {number}"
        if MARKER in cell.source and not cell.outputs:
            found.append(f"{where} is marked and has no output to compare")
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                found.append(f"{where} holds an error")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where} holds stderr: {output.text[:60]!r}")
            if any("widget" in kind or "svg" in kind or "html" in kind for kind in data):
                found.append(f"{where} holds what GitHub does not show: {sorted(data)}")
            for kind in ("image/png", "image/jpeg"):
                texts = output.get("metadata", {}).get(kind, {}), output.get("metadata", {})
                if kind in data and not any(text.get("alt") for text in texts):
                    found.append(f"{where}: a figure without an alternative text")
    text = nbformat.writes(notebook)
    if len(text.encode()) > 2 * MEGABYTE:
        found.append(f"{len(text.encode()) / MEGABYTE:.1f} MB, over 2")
    if re.search(r"/(home|root|Users|work|tmp)/", text):
        found.append("shows a path of the machine it was rendered on")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_code_of_notebooks_is_sound(path):
    notebook = nbformat.read(path, as_version=4)
    assert source_problems(notebook) == []
    assert sum(c.source.startswith("# Core") for c in code_cells(notebook)) == CORES[path.stem]
    claims = [n for c in code_cells(notebook) for n in ast.walk(python_of(c)) if isinstance(n, ast.Assert)]
    assert len(claims) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_rendered_notebooks_are_whole(path):
    assert output_problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_committed_notebooks_come_from_the_full_profile(path):
    outputs = [o for c in code_cells(nbformat.read(path, as_version=4)) for o in c.outputs]
    top = next((o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})), "not rendered")
    assert "| profile | full" in top
    assert re.search(r"\| wall time \| \d+ (seconds|minutes) \|", top)


def tiny_notebook(*sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for count, cell in enumerate(notebook.cells, 1):
        cell.execution_count = count
    return notebook


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("# NBVAL_CHECK_OUTPUT shapes\n1", "marker with other text"),
        ("assert (1 > 2, 'message')", "assert of a tuple"),
        ("assert not score < 0.5, 'too low'", "passes for NaN"),
        ("assert 1 < 2", "without a message"),
        ("import sys\nsys.path.append('.')", "edits sys.path"),
        ("\n".join("x = 1" for _ in range(40)), "40 lines"),
        ("\n".join(["# Core: x", *("x = 1" for _ in range(17))]), "a core of 18 lines"),
    ],
)
def test_the_guard_of_sources_sees_what_it_guards_against(source, complaint):
    assert any(complaint in p for p in source_problems(tiny_notebook(source)))
    assert source_problems(tiny_notebook("# Core: y\nx = 1", "assert 1 < 2, 'arithmetic'")) == []


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "holds an error"),
        ({"output_type": "stream", "name": "stderr", "text": "Warning"}, "holds stderr"),
        ({"output_type": "display_data", "data": {"image/jpeg": "x"}, "metadata": {}}, "without an alternative"),
        ({"output_type": "display_data", "data": {"image/svg+xml": "x"}, "metadata": {}}, "GitHub does not show"),
        ({"output_type": "stream", "name": "stdout", "text": "/home/me/file"}, "path of the machine"),
        ({"output_type": "stream", "name": "stdout", "text": "x" * 3 * MEGABYTE}, "MB, over 2"),
    ],
)
def test_the_guard_of_outputs_sees_what_it_guards_against(output, complaint):
    notebook = tiny_notebook("x = 1")
    assert output_problems(notebook) == []
    notebook.cells[0].outputs = [nbformat.from_dict(output)]
    assert any(complaint in p for p in output_problems(notebook))


def test_a_marked_cell_that_was_not_run_is_seen():
    notebook = tiny_notebook(f"# {MARKER}\nprint(1)")
    assert "code cell 1 is marked and has no output to compare" in output_problems(notebook)
    notebook.cells[0].execution_count = None
    assert any("not 1…n" in p for p in output_problems(notebook))


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
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    options = re.search(r"^NBVAL := (.*)$", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    command = [sys.executable, "-m", "pytest", *options[1].split(), "-p", "no:cacheprovider", "copy.ipynb"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == expected
