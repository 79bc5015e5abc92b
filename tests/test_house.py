"""Settings, provenance, results, display, plots: the small things that every notebook leans on."""

import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pdl_utils import plots, results, settings
from pdl_utils.display import show_source, table, without_docstrings
from pdl_utils.provenance import Provenance, describe_run
from pdl_utils.settings import Profile, flag, get_profile, pick_device, seed_everything

FULL, FAST = Profile("full", "a test"), Profile("fast", "a test")


def test_profile_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PDL_PROFILE", "Full")
    assert get_profile().choose(fast=1, full=2) == 2
    monkeypatch.setenv("PDL_PROFILE", "fast")
    assert get_profile().choose(fast=1, full=None) == 1
    monkeypatch.setenv("PDL_PROFILE", "quick")
    with pytest.raises(ValueError, match="PDL_PROFILE='quick': set it to 'fast' or 'full'"):
        get_profile()


@pytest.mark.parametrize(("gpu", "expected"), [(True, "full"), (False, "fast")])
def test_unset_the_profile_fits_the_machine_and_says_why(monkeypatch, gpu, expected):
    monkeypatch.delenv("PDL_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    profile = get_profile()
    assert profile.name == expected
    assert "GPU was found" in str(profile)


def test_device(monkeypatch):
    monkeypatch.setenv("PDL_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    monkeypatch.setenv("PDL_DEVICE", "warp9")
    with pytest.raises(ValueError, match="PDL_DEVICE='warp9'"):
        pick_device()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("yes", True), ("0", False), ("", False), ("off", False)])
def test_flags(monkeypatch, value, on):
    monkeypatch.setenv("PDL_TEST_FLAG", value)
    assert flag("PDL_TEST_FLAG") is on
    assert flag("PDL_UNSET_FLAG") is False


def test_seeding_repeats_everything():
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(1).item(), np.random.rand()))  # noqa: NPY002 (the global state is the point)
    assert draws[0] == draws[1]


def test_a_stand_in_is_named_wherever_its_tag_goes():
    real, substitute = (
        Provenance("PPI", "official files"),
        Provenance("PPI", "stand-in: seeded graphs", real=False),
    )
    assert real.tag == ""
    assert "stand-in for PPI" in substitute.tag
    text = describe_run(FAST, torch.device("cpu"), substitute)
    assert "| PPI | stand-in: seeded graphs |" in text
    assert "fast (a test)" in text


def test_results_are_kept_in_the_full_profile_only(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    origin = Provenance("PPI", "official files")
    results.record(FAST, "2_graphs", "GAT", [0.1], "micro-F1", origin)
    assert not (tmp_path / "results.json").exists()
    results.record(FULL, "1_cam", "hits", 0.5, "share", origin)
    entry = results.record(FULL, "2_graphs", "GAT", [0.9, 0.8, 1.0], "micro-F1", origin)
    assert entry["mean"] == pytest.approx(0.9)
    assert entry["std"] == pytest.approx(0.1)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["2_graphs"]["GAT"] == entry
    assert written["1_cam"]["hits"]["n"] == 1
    for nonsense in ([], [math.nan], [0.1, math.inf]):
        with pytest.raises(ValueError, match="no finite results"):
            results.record(FULL, "2_graphs", "GAT", nonsense, "micro-F1", origin)
    assert json.loads((tmp_path / "results.json").read_text()) == written


def test_figures_are_small_pngs_with_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    figure, axis = plt.subplots()
    axis.plot([1, 2])
    image = results.show_figure(figure, "line", "a rising line", FULL)
    assert (tmp_path / "line.png").read_bytes() == image.data
    assert image.data.startswith(b"\x89PNG")
    assert image.alt == "a rising line"
    photo = results.show_figure(plt.figure(), "photo", "a photograph", FAST, photographs=True)
    assert photo.data.startswith(b"\xff\xd8")  # JPEG
    assert not plt.get_fignums()
    results.show_figure(plt.figure(), "other", "nothing", FAST)
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


def test_overlay_shows_grey_where_there_is_no_evidence_and_color_where_there_is():
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    picture = plots.overlay(image, heat)
    assert picture.shape == (4, 4, 3)
    np.testing.assert_allclose(picture[3, 3], 200 / 255, rtol=1e-5)
    assert np.ptp(picture[0, 0]) > 0.1
    signed = plots.overlay(image, heat - torch.eye(4).flip(0))
    assert signed[0, 0, 0] > signed[0, 0, 2]  # for: orange
    assert signed[3, 0, 2] > signed[3, 0, 0]  # against: purple


def test_a_gradient_of_zero_is_grey():
    np.testing.assert_allclose(plots.gradient_picture(torch.zeros(3, 4, 4)), 0.5)
    assert plots.gradient_picture(torch.randn(3, 8, 8)).shape == (8, 8, 3)


def test_grids_curves_and_bars_draw():
    plots.use_style()
    figure = plots.image_grid([np.zeros((4, 4, 3))] * 3, ["a", "b", "c"], columns=2, title="t", row_labels=["r"])
    assert len(figure.axes) == 4
    figure, (left, right) = plt.subplots(1, 2)
    plots.curves(
        left, [1, 2], {"one": [1, 2], "three runs": [[1, 2], [2, 3], [3, 4]]}, xlabel="x", ylabel="y", title=""
    )
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["one", "three runs"]
    plots.comparison(right, {"a": (0.5, 0.4, 0.6)}, xlabel="share", title="t", references={"paper": 0.7})
    assert [t.get_text() for t in right.get_yticklabels()] == ["a"]
    plt.close("all")


def test_the_repository_is_where_the_package_is():
    assert (settings.REPOSITORY / "pyproject.toml").exists()


def test_modules_import_what_the_diagram_in_the_readme_allows():
    readme = (settings.REPOSITORY / "README.md").read_text(encoding="utf-8")
    diagram = readme.partition("flowchart LR\n")[2].partition("```")[0]
    boxes = {}
    for part in re.split(r"-->|\n", diagram):
        name, _, label = part.strip().partition("[")
        if name:
            boxes.setdefault(name, label.strip('"]') or name)
    place = {module: i for i, label in enumerate(boxes.values()) for module in re.split(" · |<br>", label)}
    package = settings.REPOSITORY / "pdl_utils"
    allowed = 0
    for module, where in place.items():
        for path in [*package.glob(f"{module}.py"), *package.glob(f"{module}/*.py")]:
            for other in re.findall(r"^from pdl_utils\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                assert place.get(other, 0) <= where, f"{module} imports {other}, which stands right of it"
                allowed += other in place
    assert allowed > 25
