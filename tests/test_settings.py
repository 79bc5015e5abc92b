"""Profile, device, precision, seeds and folders: what every notebook begins with."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pdl_utils import settings
from pdl_utils.settings import (
    REPOSITORY,
    data_root,
    flag,
    get_profile,
    pick_device,
    save_atomically,
    seed_everything,
)


def test_the_profile_is_the_callers_then_the_environments(monkeypatch):
    monkeypatch.setenv("PDL_PROFILE", "Full")
    assert get_profile().name == "full"
    assert get_profile("fast").name == "fast"
    monkeypatch.setenv("PDL_PROFILE", "quick")
    with pytest.raises(ValueError, match="profile 'quick': set it, or PDL_PROFILE, to 'fast' or 'full'"):
        get_profile()


@pytest.mark.parametrize(("gpu", "expected"), [(True, "full"), (False, "fast")])
def test_unset_the_profile_fits_the_machine_and_says_why(monkeypatch, gpu, expected):
    monkeypatch.delenv("PDL_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    profile = get_profile()
    assert profile.name == expected
    assert "GPU was found" in str(profile)


def test_the_device_is_one_that_is_there(monkeypatch):
    monkeypatch.setenv("PDL_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    for missing in ("warp9", "cuda:99"):
        monkeypatch.setenv("PDL_DEVICE", missing)
        with pytest.raises(ValueError, match=f"PDL_DEVICE='{missing}' is no device of this machine"):
            pick_device()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_a_gpu_is_asked_for_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert settings.has_bfloat16(torch.device("cuda")) is expected


def test_a_processor_held_to_avx2_trains_in_float32():
    code = "import torch; from pdl_utils.settings import *; print(has_bfloat16(torch.device('cpu')))"
    ordinary = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run([sys.executable, "-c", code], env=ordinary, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


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


def test_the_data_root_does_not_depend_on_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDL_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("PDL_DATA", "mydata")
    assert data_root() == REPOSITORY / "mydata"
    monkeypatch.delenv("PDL_DATA")
    assert data_root() == REPOSITORY / "data"


def test_a_copy_of_the_package_refuses_and_says_what_to_do(tmp_path):
    (tmp_path / "pdl_utils").mkdir()
    (tmp_path / "pdl_utils" / "__init__.py").write_text((REPOSITORY / "pdl_utils" / "__init__.py").read_text())
    command = [sys.executable, "-c", "import pdl_utils"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: pdl_utils was installed as a copy" in ran.stderr
    assert "pip install -e ." in ran.stderr


def test_a_write_that_fails_leaves_the_old_file_and_names_the_variables(tmp_path):
    file = tmp_path / "state.pt"
    file.write_text("old")

    def half(partial):
        partial.write_text("ne")
        raise RuntimeError("torch says little")

    with pytest.raises(OSError, match=r"state\.pt cannot be written; .*PDL_DATA and PDL_FIGURES"):
        save_atomically(half, file)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    assert file.read_text() == "old"
    with pytest.raises(OSError, match="cannot be written"):
        save_atomically(half, file / "below a file" / "state.pt")
