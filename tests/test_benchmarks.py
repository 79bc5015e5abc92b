"""The benchmarks: turns, ratios, report, the joint figure, and that every script still starts."""

import importlib
import itertools
import json
import sys

import pytest
import torch

from pdl_utils.settings import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script that is run from there
side_by_side = importlib.import_module("side_by_side")
run_all = importlib.import_module("run_all")


def test_contestants_take_turns_and_every_other_round_runs_backwards():
    turns, ticks = [], itertools.count()
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    seconds = side_by_side.measure(calls, 3, warmup=2, clock=lambda: next(ticks))
    assert "".join(turns) == "abccbaabccbaabc"
    assert seconds == {name: [1, 1, 1] for name in "abc"}  # nothing but the call is timed, and no warm-up


def test_ratios_are_taken_within_a_round():
    assert side_by_side.ratio([2.0, 3.0, 8.0], [1.0, 6.0, 2.0]) == {"median": 2.0, "min": 0.5, "max": 4.0}
    with pytest.raises(ValueError, match="shorter"):
        side_by_side.ratio([1.0, 2.0], [1.0])


def test_report_prints_and_writes_one_schema(tmp_path, capsys):
    file = tmp_path / "new" / "a.json"
    pairs = {"ours / peer": ([1.0, 1.0], [2.0, 3.0])}
    found = side_by_side.report("A title", pairs, torch.device("cpu"), file)
    assert json.loads(file.read_text()) == found
    assert set(found) == {"title", "device", "torch", "ratios"}
    assert found["title"] == "A title"
    assert found["ratios"] == {"ours / peer": {"median": 0.4167, "min": 0.3333, "max": 0.5}}
    assert "ours / peer" in capsys.readouterr().out
    more = side_by_side.report("A title", pairs, torch.device("cpu"), None, peak_mb=3)
    assert more == found | {"peak_mb": 3}


def test_the_joint_figure_shows_all_ratios(tmp_path, monkeypatch):
    ratios = {
        f"case {i}: ours / peer": {"median": 0.1 * 2**i, "min": 0.05 * 2**i, "max": 0.3 * 2**i} for i in range(9)
    }
    ratios[f"case 9: ours / plain layer {side_by_side.LIMIT}"] = {"median": 1.5, "min": 1.4, "max": 1.7}
    files = {}
    for name in run_all.SCRIPTS:
        files[name] = tmp_path / f"{name}.json"
        content = {"title": name, "device": "CPU, 2 threads", "torch": "2", "ratios": ratios}
        side_by_side.save_json(content, files[name])
    merged = run_all.merge(files)
    assert list(merged) == list(run_all.SCRIPTS)
    assert merged["lora"]["ratios"] == ratios

    drawn = []
    monkeypatch.setattr(run_all.plt, "close", drawn.append)
    image = tmp_path / "figures" / "benchmarks.png"
    run_all.draw(merged, image)
    monkeypatch.undo()
    axes = drawn[0].axes
    run_all.plt.close(drawn[0])
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.stat().st_size < 300_000
    assert [p.name for p in image.parent.iterdir()] == ["benchmarks.png"]
    assert drawn[0].get_figwidth() <= 12
    assert [axis.get_title(loc="left").split()[0] for axis in axes] == list(run_all.SCRIPTS)
    markers = [line.get_marker() for line in axes[0].lines if line.get_marker() != "None"]
    assert markers == ["o"] * 9 + ["D"]


def test_run_all_runs_every_benchmark():
    scripts = {file.stem for file in BENCHMARKS.glob("*.py")} - {"side_by_side", "run_all"}
    assert scripts == set(run_all.SCRIPTS)


@pytest.mark.parametrize("name", run_all.SCRIPTS)
def test_scripts_start(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--rounds" in shown
    assert "--json" in shown


def test_every_grad_cam_contestant_runs():
    for peer in ("captum", "torchcam", "pytorch_grad_cam"):  # of the extra `bench`
        pytest.importorskip(peer)
    from torchvision.models import resnet18

    script = importlib.import_module("grad_cam")
    model = resnet18().eval()
    calls = script.contestants(model, torch.randn(2, 3, 64, 64))
    assert len(calls) == 1 + 2 * 4
    for call in calls.values():
        call()


def test_the_readme_gives_the_ratios_that_were_measured():
    measured = json.loads((REPOSITORY / "figures" / "benchmarks.json").read_text(encoding="utf-8"))
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in section.splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 10
    for benchmark, what, figure in rows[1:]:
        found = measured[benchmark]["ratios"][what]
        assert figure == "{median:.2f} ({min:.2f}–{max:.2f})".format(**found), what
