"""Weights: a file of the user's own, else torchvision's, else this project's; every architecture by one call."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import mobilenet_v3_small, resnet18

from pdl_utils import resnet
from pdl_utils.datasets import NoRealData
from pdl_utils.resnet import (
    PretrainedNetwork,
    UnfitWeights,
    cifar_resnet18,
    pretrained_resnet,
    torchvision_network,
)
from pdl_utils.settings import data_root
from pdl_utils.weights import save_weights

THOUSAND = [f"class {i}" for i in range(1000)]


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
        meta={"categories": THOUSAND},
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


@pytest.mark.fault("connection cut")
def test_a_truncated_download_is_fetched_again(official, capsys):
    official.server.truncated = 1
    assert is_official(pretrained_resnet("resnet18"), official)
    assert official.server.requests == 2
    assert "attempt 1 of 3" in capsys.readouterr().out


@pytest.mark.fault("damaged files")
def test_a_damaged_file_is_named_and_replaced(official, capsys):
    data_root().mkdir(parents=True)
    file = data_root() / official.name
    file.write_bytes(official.content[:1000])
    assert is_official(pretrained_resnet("resnet18"), official)
    assert f"{official.name} is truncated or corrupt" in capsys.readouterr().out
    assert file.read_bytes() == official.content


# A file of the user's own


def write_own(arch, weights, **facts):
    """As somebody writes it who has safetensors and not this package."""
    file = data_root() / "weights" / f"{arch}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    half = {name: w.half() for name, w in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(half, file, {key: json.dumps(value) for key, value in facts.items()})
    return file


def test_weights_of_ones_own_come_first(official, capsys):
    torch.manual_seed(1)
    mine = resnet18(num_classes=3)
    write_own("resnet18", mine.state_dict(), source="mine, 3 birds", categories=["jay", "hen", "owl"], size=64)
    network = pretrained_resnet("resnet18")
    assert official.server.requests == 0
    assert network.categories == ["jay", "hen", "owl"]
    assert (network.resize, network.size) == (256, 64)
    assert network.provenance.real
    assert capsys.readouterr().out == "resnet18 weights: mine, 3 birds\n"
    assert not network.model.training
    images = network.preprocess(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    torch.testing.assert_close(network.model(images), mine.eval()(images), atol=0.01, rtol=0.01)


def test_weights_of_ones_own_serve_every_architecture_and_win_over_our_own(fresh_data, monkeypatch):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    write_own("mobilenet_v3_small", mobilenet_v3_small(num_classes=2).state_dict(), categories=["cat", "dog"])
    network = torchvision_network("mobilenet_v3_small")
    assert str(network.provenance) == "mobilenet_v3_small weights: the file weights/mobilenet_v3_small.safetensors"
    assert network.model(network.preprocess(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))).shape == (1, 2)
    assert "this project's own" in str(pretrained_resnet("resnet18").provenance)
    write_own("resnet18", resnet18().state_dict(), categories=THOUSAND)
    assert len(pretrained_resnet("resnet18").categories) == 1000


MISFITS = {
    "a missing key": (lambda w: w.pop("bn1.bias"), {}, 'Missing key.*"bn1.bias"'),
    "an unexpected key": (lambda w: w.update(extra=torch.zeros(1)), {}, 'Unexpected key.*"extra"'),
    "another shape": (lambda w: w.update({"bn1.bias": torch.zeros(3)}), {}, "size mismatch for bn1.bias"),
    "no categories": (lambda w: None, {"categories": None}, "it names no categories"),
    "categories of another length": (lambda w: None, {"categories": ["a", "b"]}, "size mismatch for fc.weight"),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_of_ones_own_that_do_not_fit_are_named_with_a_remedy(misfit, fresh_data):
    change, facts, problem = MISFITS[misfit]
    weights = resnet18().state_dict()
    change(weights)
    facts = {key: value for key, value in {"categories": THOUSAND, **facts}.items() if value}
    file = write_own("resnet18", weights, **facts)
    with pytest.raises(UnfitWeights, match=problem) as caught:
        pretrained_resnet("resnet18")
    assert str(file) in str(caught.value)
    assert "or remove it to use torchvision's weights" in str(caught.value)


@pytest.mark.fault("damaged files")
def test_weights_of_ones_own_that_are_half_a_file_are_named(fresh_data):
    file = write_own("resnet18", resnet18().state_dict(), categories=THOUSAND)
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(UnfitWeights, match=r"resnet18\.safetensors does not fit resnet18: .*cannot be read"):
        pretrained_resnet("resnet18")


# Neither: this project's own


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
    with pytest.raises(NoRealData, match="resnet18 weights: no real data, because PDL_OFFLINE is set"):
        torchvision_network("resnet18")


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="no weights for 'resnet50'; choose 'resnet18' or 'resnet34'"):
        pretrained_resnet("resnet50")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("goldfish", 0),
        ("Goldfish", 0),
        ("crane", None),
        ("Cardigan", 3),
        ("cardigan", 4),
        ("dog", None),
        (None, None),
    ],
)
def test_names_become_classes_and_class_0_is_one(name, expected):
    network = PretrainedNetwork(None, ["goldfish", "crane", "crane", "Cardigan", "cardigan"], 8, 8, None)
    assert network.class_of(name) == expected


def test_networks_and_preprocessing_stay_on_a_fake_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        model = cifar_resnet18(width=8, stem_stride=2)
        network = PretrainedNetwork(model, THOUSAND, 32, 32, None)
        crops = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="cpu")
        images = network.preprocess(crops)
        assert images.device.type == "cuda"
        assert model(images).device.type == "cuda"
