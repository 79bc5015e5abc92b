"""Profile, device, precision and seeds: what every notebook begins with."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pdl_utils import settings
from pdl_utils.settings import bfloat16_is_faster, flag, get_profile, pick_device, save_atomically, seed_everything


@pytest.fixture
def unmeasured():
    """Forget what was measured, before the test and after it."""
    bfloat16_is_faster.cache_clear()
    yield
    bfloat16_is_faster.cache_clear()


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


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 2.0), True), ((2.0, 1.0), False), ((1.0, 1.0), False)])
def test_bfloat16_is_taken_where_it_was_measured_to_be_faster(unmeasured, monkeypatch, seconds, faster):
    with_it, without = seconds
    measured = []

    def measure(device, *, autocast, patience=1.0):
        measured.append(autocast)
        return with_it if autocast else without

    monkeypatch.setattr(settings, "_step_seconds", measure)
    assert [bfloat16_is_faster(torch.device("cpu")) for _ in range(3)] == [faster] * 3
    assert sorted(measured) == [False, True], "once a process is enough"


def test_a_processor_without_bfloat16_instructions_trains_in_float32():
    code = """
import torch
from pdl_utils.settings import bfloat16_is_faster
print(bfloat16_is_faster(torch.device("cpu")))
"""
    ordinary = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run([sys.executable, "-c", code], env=ordinary, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_the_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    assert settings.data_root() == tmp_path
    monkeypatch.delenv("PDL_DATA")
    assert settings.data_root() == settings.REPOSITORY / "data"
    monkeypatch.setattr(settings, "REPOSITORY", tmp_path)  # a package copied into site-packages
    assert settings.data_root().name == "pdl-utils"


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    file = tmp_path / "state.pt"
    file.write_text("old")

    def half(partial):
        partial.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_atomically(half, file)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    assert file.read_text() == "old"
