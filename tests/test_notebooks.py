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
# Cells that compute Grad-CAM; GCN, GAT, GATv2; NT-Xent, LoRA.
CORES = {"1_grad_cam": 1, "2_graph_attention": 3, "3_transfer_learning": 2}
KEEPING = re.compile(r"\brun\.(config|file|once|note|use|results)\b|\bRun\(|^PROFILE\b|perf_counter|\brun_file\b")
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def python_of(cell):
    """The cell's syntax tree, without IPython's magics."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def count(notebook, *kinds):
    """Statements of these kinds in a notebook."""
    return sum(isinstance(n, kinds) for cell in code_cells(notebook) for n in ast.walk(python_of(cell)))


def node_problems(node):
    """A claim that cannot fail as it should, or a construction that a student has to take apart."""
    match node:
        case ast.Assert(test=ast.Tuple()):
            yield "assert of a tuple is always true"
        case ast.Assert(test=ast.UnaryOp(op=ast.Not())):
            yield "'assert not' passes for NaN; turn the comparison around"
        case ast.Assert(msg=None):
            yield "an assert without a message"
        case ast.NamedExpr():
            yield "an assignment inside an expression"
        case ast.Lambda(args=ast.arguments(defaults=[_, *_])):
            yield "a lambda with defaults"
        case ast.Tuple(ctx=ast.Store(), elts=parts) if any(isinstance(part, ast.Tuple) for part in parts):
            yield "a tuple unpacked at two levels"
    if isinstance(node, COMPREHENSION) and sum(isinstance(n, COMPREHENSION) for n in ast.walk(node)) > 1:
        yield "a comprehension inside another"


def source_problems(notebook):
    """What no notebook may have in its code."""
    cells, found = code_cells(notebook), []
    for number, cell in enumerate(cells, 1):
        lines = cell.source.splitlines()
        problems = [problem for node in ast.walk(python_of(cell)) for problem in node_problems(node)]
        limit = 16 if lines[0].startswith("# Core") else 20  # 15 and the line that says so
        if len(lines) > limit:
            problems.append(f"{len(lines)} lines, over {limit}")
        problems += [f"a line of {len(line)} characters" for line in lines if len(line) > 96]
        marked = [line for line in lines if MARKER in line and line.strip() != f"# {MARKER}"]
        problems += [f"nbval ignores a marker with other text on its line: {line!r}" for line in marked]
        found += [f"code cell {number}: {problem}" for problem in problems]
    if "parameters" not in cells[0].metadata.get("tags", []) or not cells[0].source.startswith("PROFILE = None"):
        found.append("the first code cell is not `PROFILE = None`, tagged `parameters`")
    if count(notebook, ast.Import, ast.ImportFrom) > 12:
        found.append("more than 12 lines of imports")
    if any("sys.path" in cell.source for cell in cells):
        found.append("edits sys.path")
    return found


def book_keeping(notebook):
    """The share of code lines in statements that keep the books: profiles, settings, files, times, results."""
    kept = total = 0
    for cell in code_cells(notebook):
        total += sum(not line.strip().startswith("#") for line in cell.source.splitlines() if line.strip())
        for node in python_of(cell).body:
            text = ast.unparse(node)
            if isinstance(node, ast.FunctionDef):  # a function is not book-keeping because of one line in it
                kept += len(KEEPING.findall(text))
            elif KEEPING.search(text):
                kept += node.end_lineno - node.lineno + 1
    return kept / total


def shown_problems(output):
    """What an output may not be or lack, as GitHub and JupyterLab show it."""
    data = output.get("data", {})
    if output.output_type == "error":
        yield "an error"
    if output.output_type == "stream" and output.name == "stderr":
        yield f"stderr: {output.text[:60]!r}"
    if any("widget" in kind or "svg" in kind or "html" in kind for kind in data):
        yield f"what GitHub does not show: {sorted(data)}"
    for kind in {"image/png", "image/jpeg"} & set(data):
        if not (output.metadata.get(kind, {}).get("alt") or output.metadata.get("alt")):
            yield "a figure without an alternative text"
        width = Image.open(BytesIO(base64.b64decode(data[kind]))).width
        if width > 865:  # JupyterLab shrinks what is wider than 848 px; up to 2% do not show
            yield f"a figure of {width} px, over 865"


def output_problems(notebook):
    """What a rendering must not have. A marked cell that was not run is never compared."""
    cells, text, found = code_cells(notebook), nbformat.writes(notebook), []
    for number, cell in enumerate(cells, 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was not run from the top: its count is {cell.execution_count}")
        if MARKER in cell.source and not cell.outputs:
            found.append(f"code cell {number} is marked and has no output to compare")
        problems = [problem for output in cell.outputs for problem in shown_problems(output)]
        found += [f"code cell {number} shows {problem}" for problem in problems]
    if len(text.encode()) > 1.8 * 2**20:
        found.append(f"{len(text.encode()) / 2**20:.2f} MB, over 1.8")
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
    assert count(notebook, ast.Assert) >= 5


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


# Each guard sees what it guards against


def tiny_notebook(*sources):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ("PROFILE = None", *sources)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python", "file_extension": ".py"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    for number, cell in enumerate(notebook.cells, 1):
        cell.execution_count = number
    return notebook


def output(kind, data=None, alt="", **fields):
    return nbformat.from_dict({"output_type": kind, "data": data or {}, "metadata": {"alt": alt}, **fields})


def picture(width):
    drawn = BytesIO()
    Image.new("L", (width, 1)).save(drawn, "png")
    return {"image/png": base64.b64encode(drawn.getvalue()).decode()}


CODE_FAULTS = [
    f"# {MARKER} shapes", "assert (1 > 2, 'message')", "assert not score < 0.5, 'too low'", "assert 1 < 2",
    "sys.path.append('.')", "import sys\n" * 13, "x = 1\n" * 21, "# Core: x\n" + "x = 1\n" * 16, "x" * 97,
    "x = [[b for b in a] for a in c]", "(x := 1)", "for (a, b), c in d:\n    pass", "x = lambda y=1: y",
]  # fmt: skip
SHOWN_FAULTS = [
    output("error", ename="E", evalue="", traceback=[]),
    output("stream", name="stderr", text="Warning"),
    output("display_data", picture(9)),  # without an alternative text
    output("display_data", picture(900), alt="x"),
    output("display_data", {"image/svg+xml": "x"}),
    output("stream", name="stdout", text="/home/me/file"),
    output("stream", name="stdout", text="x" * 2**21),
]


@pytest.mark.parametrize("code", CODE_FAULTS)
def test_a_fault_in_code_is_seen(code):
    sound = "# Core: y\nx = [y for y in z]", "assert 1 < 2, 'arithmetic'"
    assert [len(source_problems(tiny_notebook(*sound, *more))) for more in ((), (code,))] == [0, 1]


def test_a_fault_in_what_is_shown_is_seen():
    for shown, count_of in ([], 0), *(([fault], 1) for fault in SHOWN_FAULTS):
        notebook = tiny_notebook("x = 1")
        notebook.cells[1].outputs = shown
        assert len(output_problems(notebook)) == count_of, shown
    assert len(output_problems(tiny_notebook(f"# {MARKER}\nprint(1)"))) == 1  # nothing to compare with


def test_faults_of_the_whole_notebook_are_seen():
    notebook = tiny_notebook("x = 1", "x = 2", "config = run.config(\n    fast={'a': 1},\n    full={'a': 2},\n)")
    assert book_keeping(notebook) == pytest.approx(5 / 7)
    notebook.cells[0].metadata["tags"] = []  # papermill could not change the settings
    notebook.cells[1].execution_count = None
    notebook.metadata.language_info["version"] = "3.11"
    assert [problem[:30] for problem in source_problems(notebook) + output_problems(notebook)] == [
        "the first code cell is not `PR", "code cell 2 was not run from t", "language_info lacks the file's"
    ]  # fmt: skip


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
