"""Weights from torchvision's server, from a file, or this project's own; every architecture by one call."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from pdl_utils import resnet
from pdl_utils.datasets.sources import NoRealData, data_root
from pdl_utils.resnet import pretrained_resnet, torchvision_network
from pdl_utils.weights import save_weights


@pytest.fixture
def official(file_server, fresh_data, monkeypatch, tmp_path):
    """A weight file of torchvision's format and name, on a local server."""
    torch.manual_seed(0)
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    file_server.files[name] = content
    entry = SimpleNamespace(
        url=file_server.url + name,
        meta={"categories": [f"class {i}" for i in range(1000)]},
        transforms=lambda: SimpleNamespace(resize_size=[256], crop_size=[224]),
    )
    monkeypatch.setattr(resnet, "get_model_weights", lambda arch: SimpleNamespace(IMAGENET1K_V1=entry))
    monkeypatch.setenv("PDL_PROGRESS", "0")
    return SimpleNamespace(name=name, state=state, server=file_server, content=content)


def is_official(network, official):
    return all(torch.equal(w, official.state[name]) for name, w in network.model.state_dict().items())


def test_torchvisions_weights_are_fetched_once_and_kept(official):
    for _ in range(2):
        network = pretrained_resnet("resnet18")
        assert is_official(network, official)
    assert official.server.requests == 1
    assert [p.name for p in data_root().iterdir() if not p.name.startswith(".")] == [official.name]
    assert network.provenance.real
    assert "IMAGENET1K_V1" in network.provenance.source
    assert not network.model.training
    photo = Image.new("RGB", (500, 300), (255, 0, 0))
    crops = network.crop([photo, photo.rotate(90, expand=True)])
    assert crops.shape == (2, 3, 224, 224)
    assert crops.dtype == torch.uint8
    red = network.preprocess(crops)[0, :, 5, 5]
    torch.testing.assert_close(red, torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    assert network.model(network.preprocess(crops)).shape == (2, 1000)


def test_a_truncated_download_is_fetched_again(official, capsys):
    official.server.truncated = 1
    assert is_official(pretrained_resnet("resnet18"), official)
    assert official.server.requests == 2
    assert "attempt 1 of 3" in capsys.readouterr().out


def test_a_damaged_file_is_named_and_replaced(official, capsys):
    data_root().mkdir(parents=True)
    file = data_root() / official.name
    file.write_bytes(official.content[:1000])
    assert is_official(pretrained_resnet("resnet18"), official)
    assert f"{official.name} is truncated or corrupt" in capsys.readouterr().out
    assert file.read_bytes() == official.content


def test_offline_the_projects_own_weights_serve_and_count_as_real(official, monkeypatch, tmp_path, capsys):
    own = resnet18(num_classes=2)
    facts = {
        "categories": ["cat", "dog"], "top1": {"128": 0.5}, "resolution": 128, "photo_size": 96,
        "data": "two photos",
    }  # fmt: skip
    save_weights(tmp_path / "own" / "resnet18_tiny_imagenet.safetensors", own.state_dict(), facts)
    monkeypatch.setattr(resnet, "CHECKPOINTS", tmp_path / "own")
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    network = pretrained_resnet("resnet18")
    assert network.categories == ["cat", "dog"]
    assert network.size == 96
    assert "this project's own, trained on two photos, top-1 50.0% at 128 px" in capsys.readouterr().out
    assert network.class_of("Dog") == 1
    assert network.class_of("crane") is None
    assert network.class_of(None) is None
    with pytest.raises(NoRealData, match="resnet18 weights: no real data, because PDL_OFFLINE is set"):
        torchvision_network("resnet18")


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="no weights for 'resnet50'; choose 'resnet18' or 'resnet34'"):
        pretrained_resnet("resnet50")
