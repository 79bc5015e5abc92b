"""The benchmarks: turns, ratios, report, the joint figure and page, and that every script still starts."""

import importlib
import itertools
import json
import sys

import pytest
import torch
from torchvision.models import resnet18

from pdl_utils.settings import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script that is run from there
side_by_side = importlib.import_module("side_by_side")
run_all = importlib.import_module("run_all")


def test_contestants_take_turns_and_every_other_round_runs_backwards():
    turns, ticks = [], itertools.count()
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    seconds = side_by_side.measure(calls, 4, warmup=2, clock=lambda: next(ticks))
    assert "".join(turns) == "abccbaabccbaabccba"
    assert seconds == {name: [1, 1, 1, 1] for name in "abc"}  # nothing but the call is timed, and no warm-up
    assert len(side_by_side.measure({"a": lambda: None}, 50, budget=0)["a"]) == 3


def test_ratios_are_taken_within_a_round():
    assert side_by_side.ratio([2.0, 3.0, 8.0], [1.0, 6.0, 2.0]) == {"median": 2.0, "min": 0.5, "max": 4.0}
    with pytest.raises(ValueError, match="shorter"):
        side_by_side.ratio([1.0, 2.0], [1.0])


def test_a_report_becomes_a_part_of_the_page_and_of_the_figure(tmp_path, monkeypatch, capsys):
    pairs = {"ours / peer": ([1.0, 1.0], [2.0, 3.0]), f"ours / work {side_by_side.LIMIT}": ([2.0], [1.0])}
    numbers = tmp_path / "figures" / "benchmarks.json"
    peaks = {"GAT": {"ours": 30, "PyG": 120}}
    found = side_by_side.report("A title", pairs, torch.device("cpu"), tmp_path / "lora.json", peak_mb=peaks)
    assert found["ratios"]["ours / peer"] == {"median": 0.4167, "min": 0.3333, "max": 0.5}
    assert torch.backends.cpu.get_cpu_capability() in found["device"]
    side_by_side.save_json(run_all.merge({"lora": tmp_path / "lora.json"}), numbers)
    monkeypatch.setattr(sys, "argv", ["run_all", "--draw", "--out", str(tmp_path)])
    run_all.main()
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for part in ("| ours / peer | 0.42 | 0.33–0.50 |", "30 MB, 0.25 of", "beside peft", found["device"]):
        assert part in page
    assert numbers.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ours / peer" in capsys.readouterr().out


def test_the_page_gives_the_ratios_that_were_measured():
    measured = json.loads((REPOSITORY / "figures" / "benchmarks.json").read_text(encoding="utf-8"))
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == run_all.page(measured), "make it anew: python benchmarks/run_all.py --draw"
    assert set(measured) == set(run_all.SCRIPTS)
    assert {file.stem for file in BENCHMARKS.glob("*.py")} == {*run_all.SCRIPTS, "side_by_side", "run_all"}


@pytest.mark.parametrize("name", run_all.SCRIPTS)
def test_scripts_start(name, monkeypatch, capsys):
    pytest.importorskip({"grad_cam": "captum", "simclr": "lightly", "lora": "peft"}.get(name, "torch"))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "--rounds" in capsys.readouterr().out


def test_every_grad_cam_contestant_runs():
    for peer in ("captum", "torchcam", "pytorch_grad_cam"):  # of the extra `bench`
        pytest.importorskip(peer)
    calls = importlib.import_module("grad_cam").contestants(resnet18().eval(), torch.randn(2, 3, 64, 64))
    assert len(calls) == 1 + 2 * 4
    for call in calls.values():
        call()
