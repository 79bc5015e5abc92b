"""The benchmarks: turns, ratios, and that every contestant runs and stands in docs/benchmarks.md."""

import importlib.util
import re

import pytest
import torch

from pdl_utils.settings import REPOSITORY

spec = importlib.util.spec_from_file_location("bench", REPOSITORY / "benchmarks" / "run.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_contestants_take_turns_every_other_round_backwards_and_ratios_are_of_one_round(monkeypatch, capsys):
    turns, seconds = [], {"a": [1, 2, 4], "b": [2, 8, 8]}

    class Timer:
        def __init__(self, *_, globals, **__):
            self.name = globals["call"]

        def timeit(self, _):
            turns.append(self.name)
            return type("Measurement", (), {"mean": seconds[self.name].pop(0)})

    monkeypatch.setattr(bench, "Timer", Timer)
    bench.compare("x", {"a": "a", "b": "b"}, rounds=3)
    assert "".join(turns) == "abbaab"
    assert capsys.readouterr().out == "| x | b | 0.50 | 0.25–0.50 | 2,000 · 8,000 |\n"


def test_every_contestant_runs_and_has_its_row_on_the_page(monkeypatch, capsys):
    for peer in ("captum", "torchcam", "pytorch_grad_cam", "lightly", "peft"):  # of the extra `bench`
        pytest.importorskip(peer)

    def once(what, calls, rounds):
        for call in calls.values():
            call()
        print("".join(f"| {what} | {other} |\n" for other in list(calls)[1:]))

    monkeypatch.setattr(bench, "compare", once)
    monkeypatch.setattr(bench, "NODES", 20)
    monkeypatch.setattr(bench.subprocess, "check_output", lambda command: b"1.0")
    bench.main(["--threads", str(torch.get_num_threads())])
    row = re.compile(r"^\| ([^|]*[^-|]) \| ([^|]*) \|", re.MULTILINE)
    printed = row.findall(capsys.readouterr().out)
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert len(printed) > 15
    assert printed == row.findall(page)


def test_the_peak_of_memory_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench, "NODES", 200)
    bench.main(["--threads", str(torch.get_num_threads()), "--peak", "GAT", "ours"])
    assert float(capsys.readouterr().out) >= 0
