"""Profile, device, precision, seeds and folders: what every notebook begins with."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from pdl_utils import settings
from pdl_utils.settings import REPOSITORY, get_profile, pick_device


def test_the_profile_is_the_callers_then_the_environments_then_that_of_the_machine(monkeypatch):
    monkeypatch.setenv("PDL_PROFILE", "Full")
    assert get_profile("fast") == ("fast", "chosen here")
    assert get_profile() == ("full", "PDL_PROFILE=Full")
    monkeypatch.setenv("PDL_PROFILE", "quick")
    with pytest.raises(ValueError, match="profile 'quick': set it, or PDL_PROFILE, to 'fast' or 'full'"):
        get_profile()
    monkeypatch.delenv("PDL_PROFILE")
    for gpu, expected in ((True, "full, a GPU was found"), (False, "fast, no GPU was found")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert ", ".join(get_profile()).startswith(expected)


def test_the_device_is_one_that_is_there(monkeypatch):
    monkeypatch.setenv("PDL_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    for missing in ("warp9", "cuda:99"):
        monkeypatch.setenv("PDL_DEVICE", missing)
        with pytest.raises(ValueError, match=f"PDL_DEVICE='{missing}' is no device of this machine"):
            pick_device()


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_bfloat16_is_for_devices_that_have_its_instructions(monkeypatch):
    for capability, expected in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert settings.has_bfloat16(torch.device("cuda")) is expected
    code = "import torch; from pdl_utils.settings import *; print(has_bfloat16(torch.device('cpu')))"
    ordinary = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert run_python(code, env=ordinary).stdout.strip() == "False"


def test_flags(monkeypatch):
    for value, on in (("1", True), ("yes", True), ('"0"', False), ("", False), ("off", False)):
        monkeypatch.setenv("PDL_TEST_FLAG", value)
        assert settings.flag("PDL_TEST_FLAG") is on
    assert settings.flag("PDL_UNSET_FLAG") is False


def test_seeding_repeats_everything():
    draws = set()
    for _ in range(2):
        settings.seed_everything(3)
        draws.add((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002 (the global state)
    assert len(draws) == 1


def test_the_data_root_does_not_depend_on_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for chosen, root in ((f'"{tmp_path}" ', tmp_path), ("mydata", REPOSITORY / "mydata")):
        monkeypatch.setenv("PDL_DATA", chosen)
        assert settings.data_root() == root
    monkeypatch.delenv("PDL_DATA")
    assert settings.data_root() == REPOSITORY / "data"


def test_a_copy_of_the_package_refuses_and_says_what_to_do(tmp_path):
    (tmp_path / "pdl_utils").mkdir()
    (tmp_path / "pdl_utils" / "__init__.py").write_text((REPOSITORY / "pdl_utils" / "__init__.py").read_text())
    said = run_python("import pdl_utils", cwd=tmp_path).stderr
    assert "ImportError: pdl_utils was installed as a copy" in said
    assert "pip install -e ." in said
