"""Files of weights: what is saved comes back, what is damaged is named."""

import pytest
import torch
from safetensors.torch import save_file

from pdl_utils.weights import DIGESTS, CorruptCheckpoint, load_weights, read_weights, save_weights, sha256


@pytest.fixture
def saved(tmp_path):
    weights = {"w": torch.randn(4, 5, 3, 3), "bias": torch.randn(4), "steps": torch.tensor(7)}
    weights["zero"] = torch.zeros(2, 2)
    save_weights(tmp_path / "net.safetensors", weights, {"seed": 3, "categories": ["ä", "b"]})
    return tmp_path / "net.safetensors", weights


def test_what_is_saved_comes_back(saved):
    file, weights = saved
    loaded, facts = load_weights(file)
    assert facts == {"seed": 3, "categories": ["ä", "b"]}
    assert loaded.keys() == weights.keys()
    step = weights["w"].flatten(1).abs().amax(1) / 127  # a row's 255 values
    assert ((loaded["w"] - weights["w"]).abs().flatten(1) <= 0.501 * step[:, None]).all()
    assert torch.equal(loaded["bias"], weights["bias"].half().float())
    assert torch.equal(loaded["steps"], weights["steps"])
    assert torch.equal(loaded["zero"], weights["zero"])
    assert {path.name for path in file.parent.iterdir()} == {DIGESTS, "net.safetensors"}


def test_a_file_of_float16_is_read_as_before(tmp_path):
    weight = torch.randn(4, 5).half()
    save_file({"w": weight}, tmp_path / "net.safetensors", {"source": '"mine"'})
    loaded, facts = read_weights(tmp_path / "net.safetensors")
    assert torch.equal(loaded["w"], weight.float())
    assert facts == {"source": "mine"}


def test_digests_are_those_of_all_files(saved):
    file, weights = saved
    save_weights(file.with_name("other.safetensors"), weights, {})
    lines = (file.parent / DIGESTS).read_text().splitlines()
    assert lines == [f"{sha256(file.with_name(n))}  {n}" for n in ("net.safetensors", "other.safetensors")]


def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(saved):
    file, _ = saved
    before = file.read_bytes()
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        save_weights(file, {"w": torch.tensor([[1.0, float("nan")]])}, {})
    assert file.read_bytes() == before


def test_a_file_that_is_damaged_unknown_or_absent_is_named(saved):
    file, _ = saved
    stranger = file.with_name("stranger.safetensors")
    stranger.write_bytes(file.read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"stranger\.safetensors has SHA-256 .*, SHA256SUMS says none"):
        load_weights(stranger)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors has SHA-256 .* `git checkout"):
        load_weights(file)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_weights(file.with_name("absent.safetensors"))


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "net.safetensors"
    save_file({"w": torch.zeros(1)}, file, {"source": "my own"})  # no JSON
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors cannot be read .* JSON metadata"):
        read_weights(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors cannot be read"):
        read_weights(file)
