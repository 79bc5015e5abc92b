"""What a reader meets: the notebooks as files, committed or of another folder (`PDL_NOTEBOOKS=build/notebooks`);
and the ways in which nbval passes in silence, each one closed."""

import ast
import base64
import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from pdl_utils.settings import REPOSITORY

COMMITTED = "PDL_NOTEBOOKS" not in os.environ
NOTEBOOKS = sorted(Path(os.environ.get("PDL_NOTEBOOKS", REPOSITORY / "notebooks")).glob("*.ipynb"))
MARKER = "NBVAL_CHECK_OUTPUT"
CORES = {
    "1_grad_cam": 1,
    "2_graph_attention": 3,
    "3_transfer_learning": 2,
}  # Grad-CAM; GCN, GAT, GATv2; NT-Xent, LoRA
KEEPING = re.compile(r"\brun\.(config|file|once|note|use|results)\b|\bRun\(|^PROFILE\b|perf_counter|\brun_file\b")
MEGABYTE = 2**20


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def python_of(cell):
    """The cell's syntax tree, without IPython's magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def lines_of(cell):
    return [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]


def hard_to_read(tree) -> list[str]:
    """Constructions that a student has to take apart."""
    found = []
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for node in ast.walk(tree):
        if isinstance(node, comprehensions):
            inner = [n for n in ast.walk(node) if isinstance(n, comprehensions) and n is not node]
            found += ["a comprehension inside another"] if inner else []
        elif isinstance(node, ast.NamedExpr):
            found.append("an assignment inside an expression")
        elif isinstance(node, ast.Lambda) and node.args.defaults:
            found.append("a lambda with defaults")
        elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store):
            found += ["a tuple unpacked at two levels"] if any(isinstance(e, ast.Tuple) for e in node.elts) else []
    return found


def assert_problems(tree) -> list[str]:
    """Claims that cannot fail as they should."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            if isinstance(node.test, ast.Tuple):
                found.append("assert of a tuple is always true")
            elif isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not):
                found.append("'assert not' passes for NaN; turn the comparison around")
            elif node.msg is None:
                found.append("an assert without a message")
    return found


def source_problems(notebook) -> list[str]:
    """What no notebook may have in its code."""
    found, cells = [], code_cells(notebook)
    for number, cell in enumerate(cells, 1):
        lines, problems = (
            cell.source.splitlines(),
            assert_problems(python_of(cell)) + hard_to_read(python_of(cell)),
        )
        limit = 16 if lines[0].startswith("# Core") else 20  # 15 and the line that says so
        if len(lines) > limit:
            problems.append(f"{len(lines)} lines, over {limit}")
        problems += [f"a line of {len(line)} characters" for line in lines if len(line) > 96]
        for line in lines:
            if MARKER in line and line.strip() not in (f"# {MARKER}", f"#{MARKER}"):
                problems.append(f"nbval ignores a marker with other text on its line: {line.strip()!r}")
        found += [f"code cell {number}: {problem}" for problem in problems]
    if "parameters" not in cells[0].metadata.get("tags", []) or not cells[0].source.startswith("PROFILE = None"):
        found.append("the first code cell is not `PROFILE = None`, tagged `parameters`")
    code = "\n".join(cell.source for cell in cells)
    imports = [n for c in cells for n in ast.walk(python_of(c)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    if len(imports) > 12:
        found.append(f"{len(imports)} lines of imports")
    if "sys.path" in code:
        found.append("edits sys.path")
    return found


def book_keeping(notebook) -> float:
    """The share of code lines in statements that keep the books: profiles, settings, files, times, results."""
    kept = total = 0
    for cell in code_cells(notebook):
        total += len(lines_of(cell))
        for node in python_of(cell).body:
            text = ast.unparse(node)
            if isinstance(node, ast.FunctionDef):  # a function is not book-keeping because of one line in it
                kept += len(KEEPING.findall(text))
            elif KEEPING.search(text):
                kept += node.end_lineno - node.lineno + 1
    return kept / total


def figure_problems(output) -> list[str]:
    """What a figure may not lack, as GitHub and JupyterLab show it."""
    found = []
    for kind in {"image/png", "image/jpeg"} & set(output.get("data", {})):
        texts = output.metadata.get(kind, {}), output.metadata
        if not any(text.get("alt") for text in texts):
            found.append("a figure without an alternative text")
        width = Image.open(BytesIO(base64.b64decode(output.data[kind]))).width
        if width > 865:  # JupyterLab shrinks what is wider than 848 px; up to 2% do not show
            found.append(f"a figure of {width} px, over 865")
    return found


def output_problems(notebook) -> list[str]:
    """What a rendering must not have. A marked cell that was not run is never compared."""
    found, cells = [], code_cells(notebook)
    if [c.execution_count for c in cells] != list(range(1, len(cells) + 1)):
        found.append("execution counts are not 1…n: not rendered in one run from the top")
    for number, cell in enumerate(cells, 1):
        problems = ["is marked and has no output to compare"] if MARKER in cell.source and not cell.outputs else []
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                problems.append("holds an error")
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"holds stderr: {output.text[:60]!r}")
            if any("widget" in kind or "svg" in kind or "html" in kind for kind in data):
                problems.append(f"holds what GitHub does not show: {sorted(data)}")
            problems += figure_problems(output)
        found += [f"code cell {number}: {problem}" for problem in problems]
    text = nbformat.writes(notebook)
    if len(text.encode()) > 1.8 * MEGABYTE:
        found.append(f"{len(text.encode()) / MEGABYTE:.2f} MB, over 1.8")
    if re.search(r"/(home|root|Users|work|tmp)/", text):
        found.append("shows a path of the machine it was rendered on")
    language = notebook.metadata.get("language_info", {})
    if language.get("file_extension") != ".py" or "version" in language:
        found.append("language_info lacks the file's ending, or names a version that changes with every rendering")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_code_of_notebooks_is_sound(path):
    notebook = nbformat.read(path, as_version=4)
    assert source_problems(notebook) == []
    assert book_keeping(notebook) <= 0.2
    assert sum(c.source.startswith("# Core") for c in code_cells(notebook)) >= CORES[path.stem]
    claims = [n for c in code_cells(notebook) for n in ast.walk(python_of(c)) if isinstance(n, ast.Assert)]
    assert len(claims) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_rendered_notebooks_are_whole(path):
    assert output_problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.skipif(not COMMITTED, reason="PDL_NOTEBOOKS names others")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_come_from_the_full_profile_and_real_data(path):
    outputs = [o for c in code_cells(nbformat.read(path, as_version=4)) for o in c.outputs]
    shown = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    assert "| profile | full" in shown[0]
    assert re.search(r"\| wall time \| \d+ (seconds|minutes) \|", shown[0])
    assert "stand-in for" not in "\n".join(text for text in shown if "| best public |" in text)


def tiny_notebook(*sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ("PROFILE = None", *sources)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
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
        ("\n".join("x = 1" for _ in range(21)), "21 lines, over 20"),
        ("\n".join(["# Core: x", *("x = 1" for _ in range(16))]), "17 lines, over 16"),
        (f"x = '{'y' * 96}'", "a line of 102 characters"),
        ("x = [[b for b in a] for a in c]", "a comprehension inside another"),
        ("for (a, b), c in d:\n    pass", "a tuple unpacked at two levels"),
        ("x = lambda y=1: y", "a lambda with defaults"),
    ],
)
def test_the_guard_of_sources_sees_what_it_guards_against(source, complaint):
    assert any(complaint in p for p in source_problems(tiny_notebook(source)))
    assert source_problems(tiny_notebook("# Core: y\nx = 1", "assert 1 < 2, 'arithmetic'")) == []


def test_the_guard_of_sources_sees_settings_that_papermill_could_not_change_and_too_much_book_keeping():
    notebook = tiny_notebook("x = 1", "x = 2", "config = run.config(\n    fast={'a': 1},\n    full={'a': 2},\n)")
    assert book_keeping(notebook) == pytest.approx(5 / 7)
    notebook.cells[0].metadata["tags"] = []
    assert any("tagged `parameters`" in p for p in source_problems(notebook))


def picture(width):
    drawn = BytesIO()
    Image.new("L", (width, 1)).save(drawn, "png")
    return {"image/png": base64.b64encode(drawn.getvalue()).decode()}


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "holds an error"),
        ({"output_type": "stream", "name": "stderr", "text": "Warning"}, "holds stderr"),
        ({"output_type": "display_data", "data": picture(9), "metadata": {}}, "without an alternative"),
        ({"output_type": "display_data", "data": picture(900), "metadata": {"alt": "x"}}, "a figure of 900 px"),
        ({"output_type": "display_data", "data": {"image/svg+xml": "x"}, "metadata": {}}, "GitHub does not show"),
        ({"output_type": "stream", "name": "stdout", "text": "/home/me/file"}, "path of the machine"),
        ({"output_type": "stream", "name": "stdout", "text": "x" * 3 * MEGABYTE}, "MB, over 1.8"),
    ],
)
def test_the_guard_of_outputs_sees_what_it_guards_against(output, complaint):
    notebook = tiny_notebook("x = 1")
    assert output_problems(notebook) == []
    notebook.cells[1].outputs = [nbformat.from_dict(output)]
    assert any(complaint in p for p in output_problems(notebook))


def test_the_guard_of_outputs_sees_a_marked_cell_that_was_not_run_and_a_version():
    notebook = tiny_notebook(f"# {MARKER}\nprint(1)")
    assert "code cell 2: is marked and has no output to compare" in output_problems(notebook)
    notebook.cells[1].execution_count = None
    notebook.metadata.language_info["version"] = "3.11"
    assert len(output_problems(notebook)) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cells: None, 0),
        (lambda cells: cells[1].outputs[0].update(text="(2, 4)\n"), 1),
        (lambda cells: cells[2].update(source="assert 1 > 2, 'a claim that broke'"), 1),
    ],
    ids=["as it is", "a marked output corrupted", "a claim broken"],
)
def test_nbval_goes_red_when_it_should(tmp_path, change, expected):
    notebook = tiny_notebook(f"# {MARKER}\nprint((2, 3))", "assert 1 < 2, 'arithmetic'")
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="(2, 3)\n")]
    change(notebook.cells)
    nbformat.write(notebook, tmp_path / "copy.ipynb")
    options = re.search(r"^NBVAL := (.*)$", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    command = [sys.executable, "-m", "pytest", *options[1].split(), "-p", "no:cacheprovider", "copy.ipynb"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode == expected


def test_chosen_cells_run_with_changes_that_must_be_found(tmp_path, monkeypatch, request):
    nbformat.write(
        tiny_notebook("run = Run('tiny', PROFILE)", "x = 1\n%magic", "y = x", "1 / 0"), tmp_path / "1.ipynb"
    )
    monkeypatch.setenv("PDL_NOTEBOOKS", str(tmp_path))
    cells = request.getfixturevalue("notebook_cells")("1")
    change = {"run = Run('tiny', PROFILE)": "z = 5 # Run("}
    assert cells.run("x = 1", "y = x", change=change | {"x = 1": "x = z"})["y"] == 5
    for texts, more in (["nowhere"], {}), (["y = x"], {"x = 1": "x = 2"}):
        with pytest.raises(LookupError, match="no cell that runs holds"):
            cells.run(*texts, change=change | more)
