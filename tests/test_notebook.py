"""What a notebook shows: the table at its top, figures, tables, findings, results; and what it keeps."""

import json
from io import BytesIO
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from pdl_utils import notebook, settings
from pdl_utils.datasets.sources import Provenance
from pdl_utils.notebook import Run
from pdl_utils.training import UnusableState, run_file

STAND_IN = SimpleNamespace(provenance=Provenance("PPI", "stand-in: seeded graphs", real=False))
REAL = SimpleNamespace(provenance=Provenance("CIFAR-10", "official files"))


class Screen(list):
    """In place of IPython's display: keeps what is shown, and what it is changed to."""

    def __call__(self, what, display_id=False):
        self.append(what)
        return self

    update = __call__

    @property
    def last(self):
        return self[-1].data


@pytest.fixture
def screen(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "data"))
    shown = Screen()
    monkeypatch.setattr(notebook, "display", shown)
    return shown


def test_the_table_at_the_top_says_what_the_notebook_runs_with(monkeypatch, screen):
    monkeypatch.setattr(settings, "has_bfloat16", lambda device: False)
    Run("2_graph_attention", "full")
    assert "| precision | float32 |" in screen.last
    monkeypatch.setattr(settings, "has_bfloat16", lambda device: True)
    run = Run("2_graph_attention", "fast")
    assert "| profile | fast (chosen here) |" in screen.last
    assert "| precision | float32; training in bfloat16 |" in screen.last
    assert run.use(STAND_IN) is STAND_IN
    run.note("training", "3 runs")
    assert "| PPI | stand-in: seeded graphs |\n| training | 3 runs |" in screen.last


def test_settings_are_those_of_the_profile_and_both_name_the_same(screen):
    for profile, epochs in (("fast", 3), ("full", 50)):
        assert Run("x", profile).config(fast={"epochs": 3}, full={"epochs": 50}).epochs == epochs
    with pytest.raises(ValueError, match="name in both profiles: seeds"):
        Run("x", "fast").config(fast={"epochs": 3}, full={"epochs": 50, "seeds": 3})


def test_a_figure_has_a_text_and_is_written_in_full_only_where_that_is_possible(screen, monkeypatch, tmp_path):
    Run("x", "full").show(plt.figure(), "line", "a rising line")
    assert screen[-1].alt == "a rising line"
    assert screen.last.startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "line.png").read_bytes() == screen.last
    Run("x", "fast").show(plt.figure(), "photo", "a photograph", photographs=True)
    assert screen.last.startswith(b"\xff\xd8")  # JPEG
    wide, axis = plt.subplots(figsize=(12, 2))
    axis.set(title="far", xlabel="epoch")
    axis.text(1.1, 0.5, "far outside of the axes", transform=axis.transAxes)
    Run("x", "fast").show(wide, "wide")
    assert Image.open(BytesIO(screen.last)).width == pytest.approx(847, abs=1)  # JupyterLab's width
    assert screen[-1].alt == "far; epoch"
    assert not plt.get_fignums()
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["line.png"]
    monkeypatch.setenv("PDL_FIGURES", str(tmp_path / "figures" / "line.png"))  # no folder
    Run("x", "full").show(plt.figure(), "line", "a line")
    assert "line.png cannot be written" in screen.last


def test_stand_ins_are_named_where_they_are_shown_and_nowhere_else(screen):
    run, figure = Run("2_graph_attention", "fast"), plt.figure()
    run.use(STAND_IN), run.use(REAL)
    run.table(["a", "b"], [[1, "two | three"]])
    assert screen.last == "| a · stand-in for PPI | b |\n| --- | --- |\n| 1 | two \\| three |"
    run.table(["a"], [], data=[REAL])
    assert screen.last.startswith("| a |")
    run.finding(1 > 2, "One is larger.", "One is not larger.")
    assert screen.last == "> **One is not larger.** · stand-in for PPI"
    run.finding(False, "Two is less.", data=[REAL])
    assert screen.last == "> **This run does not confirm: Two is less.**"
    with pytest.raises(AttributeError):
        run.use([1, 2])
    run.table(["a"], [])  # as if nothing had been asked
    with pytest.raises(ValueError, match="zip"):
        run.table(["a", "b"], [[1]])
    run.show(figure, "f", "f")
    assert [text.get_text() for text in figure.texts] == ["stand-in for PPI"]


def test_results_stand_beside_those_of_others_and_tell_their_stand_ins(screen):
    published = json.loads((settings.REPOSITORY / "figures" / "published.json").read_text(encoding="utf-8"))
    theirs = next(entry for entry in published if entry["column"] == "paper")
    run = Run(theirs["notebook"], "fast")
    run.use(REAL), run.use(STAND_IN)
    run.results({theirs["rows"][0]: ([0.9, 0.8, 1.0], REAL), "mine": 0.5, "kept": (0.5,)})
    assert f"| {theirs['rows'][0]} | 0.900 ± 0.100 (n = 3) | {theirs['figure']} |" in screen[-2].data
    assert "| mine | 0.500 · stand-in for PPI | – | – |\n| kept | 0.500 | – | – |" in screen[-2].data
    assert "| wall time | " in screen.last
    for nonsense in ([], [0.1, float("nan")]):
        with pytest.raises(ValueError, match=r"mine: .* no finite results"):
            run.results({"mine": nonsense})


def test_in_full_what_was_computed_once_is_read_back(screen, tmp_path):
    asked = []

    def compute():
        asked.append(1)
        return {"accuracy": [0.5], "map": torch.ones(2)}

    for profile, count in (("fast", 1), ("full", 2), ("full", 2)):
        assert Run("x", profile).once("a probe", compute, size=3)["accuracy"] == [0.5]
        assert len(asked) == count
    assert "| trainings | 1 of 1 were found in runs/" in screen.last
    assert Run("x", "fast").file("a net", seed=0) is None
    (kept,) = (tmp_path / "data" / "runs").iterdir()
    kept.write_bytes(b"half")
    with pytest.raises(UnusableState, match=r"a-probe-\w+\.pt is damaged; remove it"):
        Run("x", "full").once("a probe", compute, size=3)
    with pytest.raises(TypeError, match="only tensors, Python's numbers"):
        Run("x", "full").once("another", lambda: np.float64(1))
    assert list((tmp_path / "data" / "runs").iterdir()) == [kept]
    assert kept == run_file("a probe", compute, size=3)  # its name holds the code of what is computed
