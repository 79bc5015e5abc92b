"""Files of weights: what is saved comes back, what is damaged is named."""

import pytest
import torch
from safetensors.torch import save_file

from pdl_utils.weights import DIGESTS, CorruptCheckpoint, load_weights, read_weights, save_weights, sha256

BIAS = torch.full((4,), 1e5)  # more than float16 can hold; of two layers
WEIGHTS = {"w": torch.randn(4, 5, 3), "bias": BIAS, "tied": BIAS}
WEIGHTS |= {"steps": torch.tensor(7), "zero": torch.zeros(2, 2)}


@pytest.fixture
def file(tmp_path):
    save_weights(tmp_path / "net.safetensors", WEIGHTS, {"seed": 3, "categories": ["ä", "b"]})
    return tmp_path / "net.safetensors"


def test_what_is_saved_comes_back(file):
    loaded, facts = load_weights(file)
    assert facts == {"seed": 3, "categories": ["ä", "b"]}
    assert loaded.keys() == WEIGHTS.keys()
    step = WEIGHTS["w"].flatten(1).abs().amax(1) / 127  # a row's 255 values
    assert ((loaded["w"] - WEIGHTS["w"]).abs().flatten(1) <= 0.501 * step[:, None]).all()
    expected = {"bias": BIAS, "tied": BIAS, "steps": WEIGHTS["steps"], "zero": WEIGHTS["zero"]}
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    save_weights(file.with_name("other.safetensors"), {}, {})
    save_weights(file, WEIGHTS, {})
    assert {path.name for path in file.parent.iterdir()} == {DIGESTS, "net.safetensors", "other.safetensors"}
    lines = (file.parent / DIGESTS).read_text().splitlines()
    assert sorted(lines) == sorted(f"{sha256(path)}  {path.name}" for path in file.parent.glob("*.safetensors"))


def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        save_weights(file, {"w": torch.tensor([[1.0, float("nan")]])}, {})
    assert file.read_bytes() == before


def test_a_file_that_is_damaged_unknown_or_absent_is_named(file):
    content = bytearray(file.read_bytes())
    file.with_name("unknown.safetensors").write_bytes(content)
    content[-1] ^= 1
    file.write_bytes(content)
    for name in ("net", "unknown", "absent"):
        with pytest.raises(CorruptCheckpoint, match=rf"^{name}\.safetensors is .*; `git checkout"):
            load_weights(file.with_name(f"{name}.safetensors"))


def test_another_writers_file_is_read_and_what_cannot_be_read_is_named(tmp_path):
    file, weight = tmp_path / "net.safetensors", torch.randn(4, 5).half()
    save_file({"w": weight}, file, {"source": '"mine"'})
    loaded, facts = read_weights(file)
    assert torch.equal(loaded["w"], weight.float())
    assert facts == {"source": "mine"}
    save_file({"w": weight}, file, {"source": "mine"})  # no JSON
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors cannot be read .* JSON metadata"):
        read_weights(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"net\.safetensors cannot be read"):
        read_weights(file)
