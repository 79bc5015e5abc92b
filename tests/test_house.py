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
TOOLS = {"jupyter"}  # declared because README calls it, not because it is imported
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES = [REPOSITORY / "data/checkpoints/README.md", *NOTEBOOKS]
PAGES += [path for folder in (REPOSITORY, REPOSITORY / "docs") for path in folder.glob("*.md")]


def text_of(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


PYPROJECT, README = text_of("pyproject.toml"), text_of("README.md")


def cells_of(path, kind):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def code_of(path):
    if path.suffix == ".py":
        return text_of(path)
    lines = "\n".join(cells_of(path, "code")).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def imports(path):
    """Names of the modules that a file imports, wherever in it, and of what it takes from them."""
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def declared(extra):
    """Names of the distributions in pyproject.toml's dependencies, and in an extra."""
    lists = re.findall(rf"^(?:dependencies|{extra}) = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"([\w-]+)>=', "".join(lists)))


@pytest.mark.parametrize(
    ("folders", "extra"),
    [(("pdl_utils", "scripts", "notebooks"), None), (("tests",), "test"), (("benchmarks",), "bench")],
)
def test_what_is_imported_is_declared_and_the_reverse(folders, extra):
    # Under other names: a peer of the benchmarks, which need not be here, and what Python 3.10 cannot tell.
    owners = {"pytorch_grad_cam": ["grad-cam"], "sklearn": ["scikit-learn"], "skimage": ["scikit-image"]}
    owners |= importlib.metadata.packages_distributions()
    files, found = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*")], {}
    for path in [path for path in files if path.suffix in (".py", ".ipynb")]:
        for top in {module.partition(".")[0] for module in imports(path)} - sys.stdlib_module_names:
            found[owners.get(top, [top])[0].lower().replace("_", "-")] = path.name
    for own in ("pdl-utils", "scripts"):
        found.pop(own, None)
    assert {name: file for name, file in found.items() if name not in declared(extra)} == {}
    assert extra or declared(extra) - set(found) == TOOLS, "declared, but never imported"


def test_conda_brings_what_pip_would():
    names = {"torch": "pytorch", "torch-geometric": "pytorch_geometric"}
    theirs = dict(re.findall(r"^  - ([\w-]+)>=([\d.]+)$", text_of("environment.yml"), re.MULTILINE))
    for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', PYPROJECT):
        assert theirs.get(names.get(name, name), version) == version, name
    listed = ["torch", "torchvision", "torch-geometric", "matplotlib", "numpy", "jupyter", "scikit-learn", "nbval"]
    assert {names.get(name, name) for name in listed} <= set(theirs)


def test_topics_import_the_shared_ground_only_and_the_shared_ground_no_topic():
    package = REPOSITORY / "pdl_utils"
    assert {path.parent.name for path in package.rglob("*.py")} == {"pdl_utils", "datasets", *TOPICS}
    own = [(path, m.split(".")) for path in package.rglob("*.py") for m in imports(path)]
    assert [path for path, module in own if module[0] in ("scripts", "tests", "benchmarks")] == []
    others = [(path, module[1]) for path, module in own if module[0] == "pdl_utils"]
    assert [path for path, part in others if part in TOPICS and path.parent.name != part] == []
    assert len(others) > 25


# README and the other pages


def prose_of(path):
    """A page's Markdown, without its code."""
    text = "\n\n".join(cells_of(path, "markdown")) if path.suffix == ".ipynb" else text_of(path)
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_on_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", prose_of(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or target.suffix not in (".md", ".ipynb") or anchor in anchors(target), link


def test_commands_variables_and_files_on_a_page_exist():
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    used = set(re.findall(r"PDL_[A-Z]+", "\n".join(map(code_of, (REPOSITORY / "pdl_utils").rglob("*.py")))))
    for text in README, text_of("CONTRIBUTING.md"):
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
        assert set(re.findall(r"PDL_[A-Z]+", text)) <= used
    assert set(re.findall(r"^\| `(PDL_[A-Z]+)", README, re.MULTILINE)) == used
    named = re.findall(r"`([\w/]+\.py)`", text_of("docs/reliability.md"))
    assert [name for name in named if not (REPOSITORY / "tests" / name).exists()] == []


def test_readme_is_one_page_and_begins_with_the_figures():
    assert len(README.splitlines()) <= 110
    assert README.count("![") == len(NOTEBOOKS)
    version = re.search(r'^version = "(.*)"', PYPROJECT, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in text_of("CITATION.cff")
    assert f"## {version}" in text_of("CHANGELOG.md")


def results_of(number):
    """The rows of a committed notebook's results table: name → the other cells."""
    cells = nbformat.read(NOTEBOOKS[int(number) - 1], as_version=4).cells
    outputs = [o["data"] for c in cells for o in c.get("outputs", []) if "data" in o]
    shown = [data.get("text/markdown", "") for data in outputs]
    (table,) = [text for text in shown if "| paper | best public |" in text.partition("\n")[0]]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: row[1:4] for row in rows}


def test_numbers_in_readme_are_the_notebooks_results_rounded_from_the_tables_digits():
    rows = re.findall(r"^\| (\d) · (.*?) \| (.*) \|$", README, re.MULTILINE)
    assert 6 <= len(rows) <= 10
    for number, name, cells in rows:
        assert cells.split(" | ") == results_of(number)[name]
    captions = re.findall(r"^\*\[(\d) · (.*?)\*$", README, re.MULTILINE | re.DOTALL)
    assert [number for number, _ in captions] == ["1", "2", "3"]
    for number, caption in captions:
        results = [Decimal(row[0].split()[0]) for row in results_of(number).values()]
        percents = {f"{(100 * r).quantize(Decimal(1), ROUND_HALF_UP)}%" for r in results}
        assert set(re.findall(r"\d+%|\d\.\d+", caption)) <= percents | set(map(str, results))


def test_a_published_figure_says_what_it_is_and_stands_beside_a_result():
    published = json.loads(text_of("figures/published.json"))
    places = [(f["notebook"], row, f["column"]) for f in published for row in f["rows"]]
    assert len(set(places)) == len(places)
    for figure in published:
        assert set(figure) == {"notebook", "rows", "column", "figure", "measured", "source", "address"}
        assert figure["column"] in ("paper", "public")
        assert re.match(r"0\.\d{3}( ± 0\.\d{3})? ?\S", figure["figure"])
        assert figure["address"].startswith("https://")
        assert set(figure["rows"]) <= set(results_of(figure["notebook"][0]))


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
        ran = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
        assert ran.returncode == 1
        return ran

    first = "from IPython.display import Markdown, display\nshown = display(Markdown('| run |'), display_id=True)"
    good = notebook(tmp_path / "good.ipynb", first, "shown.update(Markdown('| 42 s |'))")
    bad = notebook(tmp_path / "bad.ipynb", "1 / 0")
    before = bad.read_bytes()
    (tmp_path / "out" / "good.html").mkdir(parents=True)  # no page can be written there
    assert "failed: good" in run(tmp_path / "out", good).stderr
    ran = run("--in-place", bad, good)
    assert "failed: bad" in ran.stderr
    assert re.search(r"bad failed after \d+ s\n\[2/2\] good … ok in \d+ s", ran.stdout)
    assert bad.read_bytes() == before  # a failed run replaces nothing
    executed = nbformat.read(good, as_version=4)
    assert executed.cells[0].outputs[0].data["text/markdown"] == "| 42 s |"
    assert executed.metadata.language_info.file_extension == ".py"
    assert "version" not in executed.metadata.language_info  # it would change with every rendering
    assert executed.cells[0].metadata == {"tags": ["parameters"]}


def test_the_pages_need_no_network_and_have_a_text_for_every_figure(tmp_path):
    files = ["README.md", *NOTEBOOKS, "docs/reliability.md", notebook(tmp_path / "one.ipynb", "1")]
    command = [sys.executable, REPOSITORY / "scripts" / "pages.py", tmp_path, *files]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    pages = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert 'href="2_graph_attention.html"' in pages["index"]
    for name in ["index", *(path.stem for path in NOTEBOOKS)]:
        images = re.findall(r"<img [^>]*>", pages[name])
        assert len(images) >= 3
        assert all(re.search(r'alt="[^"]{10}', image) and "No description" not in image for image in images)
        assert re.findall(r'<(?!a\b)[^>]* (?:src|href)="(?!data:)[^"]+"', pages[name]) == []  # nothing is fetched
        assert "$$" not in pages[name]
        assert 'href="index.html"' in pages[name]
        assert name == "index" or "<math" in pages[name]
    for part in ("<msub><mi>x</mi><mi>i</mi></msub>", "not $this$", "and README"):  # code is not changed
        assert part in pages["one"]
