"""The house: what may import what, what must be declared, whether README is true, and the pages and the runner."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal

import nbformat
import pytest

from pdl_utils.settings import REPOSITORY

TOPICS = {"grad_cam", "graphs", "few_labels"}
PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TOOLS = {"jupyter"}  # declared because README calls it, not because it is imported
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/checkpoints/README.md"]
PAGES += [f"{path.parent.name}/{path.name}" for path in [*(REPOSITORY / "docs").glob("*.md"), *NOTEBOOKS]]


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
    texts = [
        re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
        for name in ("dependencies", *extras)
    ]
    return {name.lower() for text in texts for name in re.findall(r'"([\w-]+)>=', text)}


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


def test_conda_brings_what_pip_would():
    text = (REPOSITORY / "environment.yml").read_text(encoding="utf-8")
    names = {"torch": "pytorch", "torch-geometric": "pytorch_geometric"}
    theirs = dict(re.findall(r"^  - ([\w-]+)>=([\d.]+)$", text, re.MULTILINE))
    for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', PYPROJECT):
        assert theirs.get(names.get(name, name), version) == version, name
    listed = ["torch", "torchvision", "torch-geometric", "matplotlib", "numpy", "jupyter", "scikit-learn", "nbval"]
    assert {names.get(name, name) for name in listed} <= set(theirs)


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


# README and the other pages


def text_of(page):
    """A page's Markdown, without its code."""
    path = REPOSITORY / page
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_on_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert target.exists(), link
        if anchor and target.suffix in (".md", ".ipynb"):
            assert anchor in anchors(target.relative_to(REPOSITORY) if target.is_absolute() else target), link


@pytest.mark.parametrize("page", PAGES[:2])
def test_commands_on_a_page_exist(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
    used = set(re.findall(r"PDL_[A-Z]+", "\n".join(map(code_of, (REPOSITORY / "pdl_utils").rglob("*.py")))))
    assert set(re.findall(r"PDL_[A-Z]+", text)) <= used
    if page == "README.md":
        assert set(re.findall(r"^\| `(PDL_[A-Z]+)", text, re.MULTILINE)) == used


def test_readme_is_one_page_and_begins_with_the_figures():
    assert len(README.splitlines()) <= 125
    assert README.count("![") == len(NOTEBOOKS)
    version = re.search(r'^version = "(.*)"', PYPROJECT, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def results_of(number):
    """The rows of a committed notebook's results table: name → the other cells."""
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(number)]
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    tables = [o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    (table,) = [text for text in tables if "| paper | best public |" in text.splitlines()[0]]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:4] for row in rows}


def test_readmes_results_are_rows_of_the_notebooks_tables():
    rows = re.findall(r"^\| (\d) · (.*?) \| (.*) \|$", README, re.MULTILINE)
    assert 6 <= len(rows) <= 10
    for number, name, cells in rows:
        assert cells.split(" | ") == results_of(number)[name]


def test_a_published_figure_says_what_it_is_and_stands_beside_a_result():
    published = json.loads((REPOSITORY / "figures" / "published.json").read_text(encoding="utf-8"))
    places = [(f["notebook"], row, f["column"]) for f in published for row in f["rows"]]
    assert len(set(places)) == len(places)
    for figure in published:
        assert set(figure) == {"notebook", "rows", "column", "figure", "measured", "source", "address"}
        assert figure["column"] in ("paper", "public")
        assert re.match(r"0\.\d{3}( ± 0\.\d{3})? ?\S", figure["figure"])
        assert figure["address"].startswith("https://")
        assert set(figure["rows"]) <= set(results_of(figure["notebook"][0]))


def test_numbers_in_readmes_captions_are_results_rounded_from_the_tables_digits():
    captions = re.findall(r"^\*\[(\d) · .*?\*$", README, re.MULTILINE | re.DOTALL)
    assert captions == ["1", "2", "3"]
    for caption in re.finditer(r"^\*\[(\d) · .*?\*$", README, re.MULTILINE | re.DOTALL):
        results = [Decimal(row[0].split()[0]) for row in results_of(caption[1]).values()]
        percents = {f"{(100 * r).quantize(Decimal(1), ROUND_HALF_UP)}%" for r in results}
        for number in re.findall(r"\d+%|\d\.\d+", caption[0]):
            assert number in percents | set(map(str, results)), number


def test_figures_are_those_that_the_notebooks_draw():
    code = "\n".join(map(code_of, NOTEBOOKS))
    drawn = [path for path in (REPOSITORY / "figures").iterdir() if path.suffix in (".png", ".jpg")]
    assert [path.name for path in drawn if f'"{path.stem}"' not in code] == []


# The runner and the pages


def notebook(path, *sources):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    made.cells.append(nbformat.v4.new_markdown_cell("the feature $x_i$, `not $this$`, and [README](../README.md)"))
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)
    return path


@pytest.mark.skipif(shutil.which("sh") is None, reason="a system without make has README's other commands")
def test_the_runner_writes_copies_and_html_and_fails_when_a_cell_or_a_page_does(tmp_path):
    def run(*arguments):
        command = ["sh", REPOSITORY / "scripts" / "run_notebooks.sh", *arguments]
        environment = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    good = notebook(
        tmp_path / "good.ipynb",
        "from IPython.display import Markdown, display\nshown = display(Markdown('| run |'), display_id=True)",
        "shown.update(Markdown('| run | 42 seconds |'))",
    )
    bad = notebook(tmp_path / "bad.ipynb", "1 / 0")
    before = bad.read_bytes()
    (tmp_path / "out" / "good.html").mkdir(parents=True)  # no page can be written there
    ran = run(tmp_path / "out", good)
    assert ran.returncode == 1
    assert "failed: good" in ran.stderr
    ran = run("--in-place", bad, good)
    assert ran.returncode == 1
    assert "failed: bad" in ran.stderr
    assert re.search(r"bad failed after \d+ s", ran.stdout)
    assert re.search(r"\[2/2\] good … ok in \d+ s", ran.stdout)
    assert bad.read_bytes() == before  # a failed run replaces nothing
    executed = nbformat.read(good, as_version=4)
    assert executed.cells[0].outputs[0].data["text/markdown"] == "| run | 42 seconds |"
    assert executed.metadata.language_info.file_extension == ".py"
    assert "version" not in executed.metadata.language_info  # it would change with every rendering
    assert executed.cells[0].metadata == {"tags": ["parameters"]}


def test_the_pages_need_no_network_and_have_a_text_for_every_figure(tmp_path):
    files = ["README.md", *(str(path) for path in NOTEBOOKS), "docs/reliability.md"]
    command = [sys.executable, "scripts/pages.py", tmp_path, *files]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    for path in [*NOTEBOOKS, REPOSITORY / "index"]:
        html = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
        images = re.findall(r"<img [^>]*>", html)
        assert len(images) >= 3
        assert all(re.search(r'alt="[^"]{10}', image) and "No description" not in image for image in images)
        assert re.findall(r'<(?!a\b)[^>]* (?:src|href)="(?!data:)[^"]+"', html) == []  # nothing is fetched
        assert "$$" not in html
        assert 'href="index.html"' in html
        assert path.stem == "index" or "<math" in html
    assert 'href="2_graph_attention.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_page_leaves_code_and_links_without_a_page_alone(tmp_path):
    source = notebook(tmp_path / "one.ipynb", "1")
    subprocess.run([sys.executable, REPOSITORY / "scripts" / "pages.py", tmp_path, source], check=True)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    for part in ("<msub><mi>x</mi><mi>i</mi></msub>", "not $this$", "and README"):
        assert part in page
