"""`make address`: one command that writes the public address, and the cell that Colab runs first."""

import shutil
import site
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest

from pdl_utils.address import CELL, LINE, set_address
from pdl_utils.settings import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/someone/deep.learning/blob/main/notebooks"


@pytest.fixture
def copy(tmp_path):
    """README, pyproject.toml and the notebooks."""
    (tmp_path / "notebooks").mkdir()
    for path in (REPOSITORY / "README.md", REPOSITORY / "pyproject.toml", *NOTEBOOKS):
        shutil.copy(path, tmp_path / path.relative_to(REPOSITORY))
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_address_is_written_everywhere_and_a_second_time_changes_nothing(copy):
    before = {p: nbformat.read(p, as_version=4) for p in (copy / "notebooks").iterdir()}
    set_address("someone/else", copy)
    set_address("someone/deep.learning", copy)
    once = contents(copy)
    set_address("someone/deep.learning", copy)
    assert contents(copy) == once
    assert not any(b"someone/else" in content for content in once.values())
    readme, pyproject = (copy / "README.md").read_text(), (copy / "pyproject.toml").read_text()
    assert readme.count("colab-badge.svg") == len(before) == 3
    assert pyproject.count('[project.urls]\nRepository = "https://github.com/someone/deep.learning"\n') == 1
    for path, old in before.items():
        new = nbformat.read(path, as_version=4)
        assert f"({COLAB}/{path.name})" in readme
        assert new.cells[0].source.count(f"({COLAB}/{path.name})") == 1
        code = next(c for c in new.cells if c.cell_type == "code")
        assert 'REPOSITORY = "someone/deep.learning"' in code.source
        assert LINE.sub("", code.source) == LINE.sub("", CELL)
        assert [c for c in new.cells if c not in (new.cells[0], code)] == [
            c for c in old.cells if c.id not in (new.cells[0].id, code.id)
        ]


@pytest.mark.parametrize("name", ["foo", "", "a/b/c", "https://github.com/a/b", "-a/b", 'a/b"', "a b/c"])
def test_a_bad_address_is_refused_and_nothing_is_written(copy, name):
    before = contents(copy)
    with pytest.raises(ValueError, match="as owner/name"):
        set_address(name, copy)
    assert contents(copy) == before


def test_nothing_is_half_written_when_a_file_has_no_place_for_it(copy):
    last = copy / "notebooks" / "3_transfer_learning.ipynb"
    whole = last.read_text()
    last.write_text(whole.replace("google.colab", "google.other"))
    before = contents(copy)
    with pytest.raises(ValueError, match=r"3_transfer_learning\.ipynb: its first code cell"):
        set_address("someone/else", copy)
    assert contents(copy) == before
    last.write_text(whole)
    (copy / "README.md").write_text("# no markers\n")
    before = contents(copy)
    with pytest.raises(ValueError, match="lost its markers"):
        set_address("someone/else", copy)
    assert contents(copy) == before


def test_the_command_says_what_is_wrong_in_one_line():
    ran = subprocess.run([sys.executable, "-m", "pdl_utils.address", "foo"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "REPOSITORY='foo': give the owner and the name on GitHub, as owner/name\n"


@pytest.fixture
def ran(monkeypatch):
    """What the cell does, instead of doing it; no command works whose name is in `fails`."""
    seen = SimpleNamespace(commands=[], folders=[], sites=[], fails=())

    def run(command, **_):
        seen.commands.append(" ".join(command))
        return SimpleNamespace(returncode=int(command[0] in seen.fails))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("os.chdir", seen.folders.append)
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    monkeypatch.setattr(site, "addsitedir", seen.sites.append)
    return seen


CELL_OF_SOMEONE = LINE.sub('REPOSITORY = "someone/else"', CELL)
FETCH = "git clone --depth 1 https://github.com/someone/else /content/pdl"
INSTALL = ["pip install -q torch-geometric lightly", "pip install -q --no-deps -e /content/pdl"]


def test_elsewhere_the_cell_does_nothing(ran, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    scope = {}
    exec(CELL_OF_SOMEONE, scope)
    assert (ran.commands, ran.folders, ran.sites) == ([], [], [])
    assert set(scope) - {"__builtins__"} == {"sys", "REPOSITORY"}  # nothing else was imported
    assert capsys.readouterr() == ("", "")


def test_in_colab_the_cell_fetches_once_and_installs(ran, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(CELL_OF_SOMEONE, {})
    assert ran.commands == [FETCH, *INSTALL]
    assert (ran.folders, ran.sites) == (["/content/pdl/notebooks"], ["/content/pdl"])
    monkeypatch.setattr(Path, "is_dir", lambda folder: folder == Path("/content/pdl"))
    exec(CELL_OF_SOMEONE, {})
    assert ran.commands == [FETCH, *INSTALL, *INSTALL]


@pytest.mark.parametrize(
    ("cell", "fails", "tried"),
    [(CELL, (), []), (CELL_OF_SOMEONE, ("git",), [FETCH]), (CELL_OF_SOMEONE, ("pip",), [FETCH, INSTALL[0]])],
    ids=["no address", "nothing to fetch", "nothing to install"],
)
def test_in_colab_a_failure_is_one_sentence(ran, monkeypatch, cell, fails, tried):
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    ran.fails = fails
    with pytest.raises(
        SystemExit, match="No network, or REPOSITORY is not the collection's address; this failed: "
    ):
        exec(cell, {})
    assert ran.commands == tried
    assert ran.folders == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_cell(path):
    first = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    assert LINE.sub("", first) == LINE.sub("", CELL)
