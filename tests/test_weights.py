"""Files of weights: what is saved comes back, what is damaged is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdl_utils.weights import DIGESTS, CorruptCheckpoint, load_weights, read_weights, save_weights, sha256


@pytest.fixture
def saved(tmp_path):
    weights = {"w": torch.randn(4, 5), "steps": torch.tensor(7)}
    save_weights(tmp_path / "net.safetensors", weights, {"seed": 3, "categories": ["ä", "b"]})
    return tmp_path / "net.safetensors", weights


def test_what_is_saved_comes_back(saved):
    file, weights = saved
    loaded, facts = load_weights(file)
    assert facts == {"seed": 3, "categories": ["ä", "b"]}
    assert loaded["w"].dtype == torch.float32
    assert torch.equal(loaded["w"], weights["w"].half().float())
    assert torch.equal(loaded["steps"], weights["steps"])
    assert {p.name for p in file.parent.iterdir()} == {DIGESTS, f".{DIGESTS}.lock", "net.safetensors"}


def test_digests_are_those_of_sha256sum_and_of_all_files(saved):
    file, weights = saved
    save_weights(file.with_name("other.safetensors"), weights, {})
    lines = (file.parent / DIGESTS).read_text().splitlines()
    assert lines == [f"{sha256(file.with_name(n))}  {n}" for n in ("net.safetensors", "other.safetensors")]


@pytest.mark.fault("disk full")
def test_a_fault_while_writing_the_digests_changes_neither_file(saved, monkeypatch):
    file, _ = saved
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}

    def fails(path, text, **_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fails)  # of the digests, after the weights are written
    with pytest.raises(OSError, match="no space"):
        save_weights(file, {"w": torch.zeros(3)}, {})
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before


@pytest.mark.fault("killed while saving")
def test_a_fault_between_the_two_files_is_named_and_mended(saved, monkeypatch):
    file, weights = saved
    replace = Path.replace

    def fails_for_digests(path, target):
        if target.name == DIGESTS:
            raise OSError("killed")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_for_digests)
    with pytest.raises(OSError, match="killed"):
        save_weights(file, {"w": torch.zeros(3)}, {})
    monkeypatch.undo()
    with pytest.raises(CorruptCheckpoint, match=r"net.safetensors has SHA-256 .*, SHA256SUMS says "):
        load_weights(file)
    save_weights(file, weights, {})
    assert torch.equal(load_weights(file)[0]["steps"], weights["steps"])


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:50] + b"x" + b[51:], lambda b: b""])
def test_a_damaged_file_is_named(saved, damage):
    file, _ = saved
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptCheckpoint, match=r"net.safetensors has SHA-256 .* `git checkout"):
        load_weights(file)


@pytest.mark.fault("damaged files")
def test_a_file_that_no_digest_vouches_for_is_refused(saved):
    file, _ = saved
    stranger = file.with_name("stranger.safetensors")
    save_file({"w": torch.zeros(1)}, stranger)
    with pytest.raises(CorruptCheckpoint, match=r"stranger\.safetensors has SHA-256 .*, SHA256SUMS says none"):
        load_weights(stranger)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_weights(file.with_name("absent.safetensors"))


@pytest.mark.fault("damaged files")
def test_metadata_that_is_not_json_is_named(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "net.safetensors", {"source": "my own"})
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors cannot be read .* JSON metadata"):
        read_weights(tmp_path / "net.safetensors")
