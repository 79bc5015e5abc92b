"""The house: what may import what, what must be declared, and whether README's commands and links exist."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from pdl_utils.settings import REPOSITORY

TOPICS = {"grad_cam", "graphs", "few_labels"}
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
TOOLS = {"jupyterlab"}  # declared because README calls it, not because it is imported
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def imports(code):
    """Names of the modules that Python code imports, wherever in it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write it out"
            yield node.module
            if node.module == "pdl_utils":  # "from pdl_utils import plots"
                yield from (f"pdl_utils.{alias.name}" for alias in node.names)


def code_of(path):
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!")))


def declared(*extras):
    """Names of the distributions in pyproject.toml's dependencies, and in these extras."""
    chosen = [
        re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
        for name in ("dependencies", *extras)
    ]
    return {name.lower() for text in chosen for name in re.findall(r'"([\w-]+)>=', text)}


def imported_distributions(paths):
    """Distributions, by the file that imports one of their modules."""
    # The peers of the benchmarks need not be installed here: this one is imported under another name.
    owners = {"pytorch_grad_cam": ["grad-cam"]} | importlib.metadata.packages_distributions()
    found, paths = {}, list(paths)
    own = {"pdl_utils", "scripts", "benchmarks", *(path.stem for path in paths)}
    for path in paths:
        for module in imports(code_of(path)):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names | own:
                found.setdefault(owners.get(top, [top])[0].lower().replace("_", "-"), path.name)
    return found


def test_package_and_notebooks_import_what_is_declared_and_nothing_else():
    files = [*(REPOSITORY / "pdl_utils").rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py"), *NOTEBOOKS]
    found = imported_distributions(files)
    assert {name: file for name, file in found.items() if name not in declared()} == {}
    assert declared() - set(found) == TOOLS, "declared, but never imported"


@pytest.mark.parametrize(("folder", "extra"), [("tests", "test"), ("benchmarks", "bench")])
def test_tests_and_benchmarks_import_what_their_extra_declares(folder, extra):
    found = imported_distributions((REPOSITORY / folder).rglob("*.py"))
    assert {name: file for name, file in found.items() if name not in declared(extra)} == {}


def test_topics_import_the_shared_ground_only_and_the_shared_ground_no_topic():
    package = REPOSITORY / "pdl_utils"
    assert {path.parent.name for path in package.rglob("*.py")} == {"pdl_utils", "datasets", *TOPICS}
    checked = 0
    for path in package.rglob("*.py"):
        for module in imports(code_of(path)):
            other = module.split(".")[1] if module.startswith("pdl_utils.") else None
            if other in TOPICS:
                assert path.parent.name == other, f"{path.relative_to(package)} imports the topic {other}"
            assert module.partition(".")[0] not in ("scripts", "tests", "benchmarks"), path.name
            checked += other is not None
    assert checked > 25


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_import_from_few_places(path):
    places = {m for m in imports(code_of(path)) if m.startswith("pdl_utils")} - {"pdl_utils"}
    assert 1 <= len(places) <= 6, sorted(places)
    assert not {place for place in places if place.split(".")[1] in TOPICS and place.count(".") > 1}
    lines = [n for n in ast.walk(ast.parse(code_of(path))) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert len(lines) <= 12


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{n}.md" for n in ("results", "benchmarks"))]
)
def test_links_and_commands_on_a_page_lead_somewhere(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (REPOSITORY / page).parent.joinpath(link).exists()]
    assert missing == []
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)|`make (\w+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def test_readme_is_one_page():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 125
    assert text.count("![") == len(NOTEBOOKS)


def notebook(path, *sources):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    made.cells.append(nbformat.v4.new_markdown_cell("the feature $x_i$"))
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


@pytest.mark.skipif(shutil.which("sh") is None, reason="a system without make has README's three commands")
def test_the_runner_writes_copies_and_html_and_fails_when_a_cell_does(tmp_path):
    def run(*arguments):
        script = REPOSITORY / "scripts" / "run_notebooks.sh"
        return subprocess.run(
            ["sh", script, *arguments], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
        )

    good = notebook(
        tmp_path / "good.ipynb",
        "from IPython.display import Markdown, display\nshown = display(Markdown('| run |'), display_id=True)",
        "shown.update(Markdown('| run | 42 seconds |'))",
    )
    bad = notebook(tmp_path / "bad.ipynb", "1 / 0")
    before = bad.read_bytes()
    assert run(tmp_path / "out", good).returncode == 0
    page = (tmp_path / "out" / "good.html").read_text(encoding="utf-8")
    assert "42 seconds" in page
    assert "<msub><mi>x</mi><mi>i</mi></msub>" in page  # a formula that needs no network
    ran = run("--in-place", bad, good)
    assert ran.returncode == 1
    assert "failed: bad" in ran.stderr
    assert re.search(r"bad failed after \d+ s", ran.stdout)
    assert re.search(r"\[2/2\] good … ok in \d+ s", ran.stdout)
    assert bad.read_bytes() == before  # a failed run replaces nothing
    executed = nbformat.read(good, as_version=4)
    assert executed.cells[0].outputs[0].data["text/markdown"] == "| run | 42 seconds |"
    assert executed.metadata.language_info == {"name": "python"}  # no version that changes with every rendering
    assert "execution" not in executed.cells[0].metadata
