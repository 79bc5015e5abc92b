"""What a notebook prints: the table at its top, source, tables, figures; and the results that are kept."""

import json
import math

import matplotlib.pyplot as plt
import pytest

from pdl_utils import notebook
from pdl_utils.datasets.sources import Provenance
from pdl_utils.notebook import Run, show_source, table, without_docstrings
from pdl_utils.settings import Profile


class Data:
    provenance = Provenance("PPI", "stand-in: seeded graphs", real=False)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A run in each profile, which write to a folder of the test's own."""
    monkeypatch.setenv("PDL_FIGURES", str(tmp_path))
    return {name: Run("2_graphs", Profile(name, "a test")) for name in ("fast", "full")}


class Display:
    """In place of IPython's: keeps what is shown, and what it is changed to."""

    def __init__(self):
        self.shown = []

    def __call__(self, what, display_id):
        self.shown.append(what.data)
        return self

    def update(self, what):
        self.shown.append(what.data)


@pytest.mark.parametrize(
    ("faster", "precision"), [(True, "training in bfloat16"), (False, "| precision | float32 |")]
)
def test_the_table_at_the_top_says_what_the_notebook_runs_with(monkeypatch, faster, precision):
    screen = Display()
    monkeypatch.setattr(notebook, "display", screen)
    monkeypatch.setattr(notebook, "bfloat16_is_faster", lambda device: faster)
    run = Run("2_graphs", Profile("fast", "a test"))
    assert run.use(Data).provenance is Data.provenance
    run.note("training", "3 runs")
    run.finish()
    first, *_, last = screen.shown
    assert "| profile | fast (a test) |" in first
    assert precision in first
    assert "| PPI | stand-in: seeded graphs |" in last
    assert "| training | 3 runs |" in last
    assert last.endswith("seconds |")


def test_a_stand_in_is_named_wherever_its_tag_goes():
    assert Provenance("PPI", "official files").tag == ""
    assert "stand-in for PPI" in Data.provenance.tag


def test_results_are_kept_in_the_full_profile_only(runs, tmp_path):
    origin = Provenance("PPI", "official files")
    runs["fast"].record("GAT", [0.1], "micro-F1", origin)
    assert not (tmp_path / "results.json").exists()
    runs["full"].record("GCN", 0.5, "micro-F1", origin)
    entry = runs["full"].record("GAT", [0.9, 0.8, 1.0], "micro-F1", origin)
    assert entry["mean"] == pytest.approx(0.9)
    assert entry["std"] == pytest.approx(0.1), "of the sample, one degree of freedom less"
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["2_graphs"]["GAT"] == entry
    assert written["2_graphs"]["GCN"]["n"] == 1
    for nonsense in ([], [math.nan], [0.1, math.inf]):
        with pytest.raises(ValueError, match="no finite results"):
            runs["full"].record("GAT", nonsense, "micro-F1", origin)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == written


def test_figures_are_small_pngs_with_a_text(runs, tmp_path):
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    image = runs["full"].show(figure, "line", "a rising line")
    assert (tmp_path / "line.png").read_bytes() == image.data
    assert image.data.startswith(b"\x89PNG")
    assert image.alt == "a rising line"
    photo = runs["fast"].show(plt.figure(), "photo", "a photograph", photographs=True)
    assert photo.data.startswith(b"\xff\xd8")  # JPEG
    assert not plt.get_fignums()
    assert [p.name for p in tmp_path.iterdir()] == ["line.png"]


def documented(a):
    """A docstring

    of three lines."""
    # a comment that matters
    return a


class OnlyADocstring:
    """Nothing else."""


def test_source_is_shown_without_docstrings_and_still_runs():
    shown = show_source(documented, OnlyADocstring).data
    assert "# a comment that matters" in shown
    assert "docstring" not in shown.replace("OnlyADocstring", "")
    code = shown.removeprefix("```python\n").removesuffix("\n```")
    scope = {}
    exec(code, scope)
    assert scope["documented"](5) == 5
    assert without_docstrings("x = 'no docstring'") == "x = 'no docstring'"


def test_tables_are_markdown():
    assert table(["a", "b"], [[1, "two"]]).data == "| a | b |\n|---|---|\n| 1 | two |"
