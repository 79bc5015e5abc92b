"""Weights: a file of the user's own, else torchvision's, else this project's; every architecture by one call."""

import hashlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import ResNet18_Weights, get_model, get_model_weights, list_models

from pdl_utils import resnet
from pdl_utils.datasets import DamagedFile, NoRealData, Provenance
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
ORIGIN = Provenance("weights", "a test")


@pytest.fixture
def official(file_server, fresh_data, monkeypatch, tmp_path):
    """A weight file of torchvision's format and name, on a local server."""
    torch.manual_seed(0)
    state = get_model("resnet18").state_dict()
    torch.save(state, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    file_server.files[name] = content
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", file_server.url + name)
    monkeypatch.setenv("PDL_PROGRESS", "0")
    return SimpleNamespace(name=name, state=state, server=file_server, content=content)


def test_torchvisions_weights_are_fetched_once_and_kept(official):
    for _ in range(2):
        network = pretrained_resnet("resnet18")
        assert all(torch.equal(w, official.state[name]) for name, w in network.model.state_dict().items())
    assert official.server.requests == 1
    assert [p.name for p in data_root().iterdir() if not p.name.startswith(".")] == [official.name]
    assert str(network.provenance) == "resnet18 weights: torchvision's IMAGENET1K_V1, 1,000 classes"
    assert network.provenance.real
    assert not network.model.training
    photo = Image.new("RGB", (500, 300), (255, 0, 0))
    crops = network.crop([photo, photo.rotate(90, expand=True)])
    assert (crops.shape, crops.dtype) == ((2, 3, 224, 224), torch.uint8)
    assert network.model(network.preprocess(crops)).shape == (2, 1000)


@pytest.mark.fault("damaged files")
def test_a_damaged_file_is_named_and_stays(official):
    data_root().mkdir(parents=True)
    file = data_root() / official.name
    file.write_bytes(official.content[:1000])
    with pytest.raises(DamagedFile, match=f"{official.name} .*its SHA-256 differs"):
        pretrained_resnet("resnet18")
    assert file.exists()


# Every classifier of torchvision, with what belongs to its weights

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)).resize(
    (420, 700)
)


def test_every_classifier_gets_the_preprocessing_of_its_weights(monkeypatch):
    """With an empty model in place of the weights: `obtain` only reads."""
    monkeypatch.setattr(resnet, "obtain", lambda name, file, *, read, **_: read(data_root() / file))
    monkeypatch.setattr(resnet, "sha256", lambda path: path.stem.rsplit("-", 1)[1])
    monkeypatch.setattr(resnet.torch, "load", lambda *_, **__: {})
    monkeypatch.setattr(resnet, "get_model", lambda arch, weights: nn.Sequential(nn.Linear(1, 1)))
    checked = {}
    for arch in list_models(module=torchvision.models):
        network = torchvision_network(arch)
        used = re.search("torchvision's (.*), 1,000", network.provenance.source)[1]
        assert used == "IMAGENET1K_V1" or "IMAGENET1K_V1" not in get_model_weights(arch).__members__
        entry = get_model_weights(arch)[used]
        assert re.fullmatch(r".*-[0-9a-f]{8,}\.pth", entry.url), "the name of the file tells its SHA-256"
        preset = entry.transforms()
        key = str(preset)
        if key not in checked:  # many share one
            ours, checked[key] = network.preprocess(network.crop([PHOTO]))[0], preset(PHOTO)
            torch.testing.assert_close(ours, checked[key], rtol=1e-5, atol=2e-4)
        assert network.categories == entry.meta["categories"] == network.model.categories
    assert len(checked) > 20


def test_weights_bring_what_torchvision_changes_in_the_network_for_them(official, monkeypatch):
    """GoogLeNet's weights want their images transformed, and no auxiliary heads."""
    entry = get_model_weights("googlenet").IMAGENET1K_V1
    state = get_model("googlenet", init_weights=False).state_dict()
    torch.save(state, data_root().parent / "googlenet.pth")
    content = (data_root().parent / "googlenet.pth").read_bytes()
    name = f"googlenet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    official.server.files[name] = content
    monkeypatch.setattr(entry.value, "url", official.server.url + name)
    model = torchvision_network("googlenet").model
    assert model.transform_input
    assert model.aux1 is None
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_photographs_are_turned_and_laid_on_white_before_they_are_cut():
    network = PretrainedNetwork(nn.Identity(), [], 8, 8, ORIGIN)
    upright = Image.new("RGB", (8, 8), "white")
    upright.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    turned = upright.rotate(180)
    turned.info["exif"] = exif.tobytes()
    turned._exif = None
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    crops = network.crop([upright, turned, clear, Image.new("I;16", (8, 8), 65535)])
    assert torch.equal(crops[1], crops[0])
    assert (crops[2:] == 255).all()


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
    mine = get_model("resnet18", num_classes=3)
    facts = {"source": "mine, 3 birds", "categories": ["jay", "hen", "owl"], "size": 64, "mean": [0, 0, 0]}
    write_own("resnet18", mine.state_dict(), **facts, std=[1, 1, 1], interpolation="bicubic")
    network = pretrained_resnet("resnet18")
    assert official.server.requests == 0
    assert network.categories == ["jay", "hen", "owl"]
    assert (network.resize, network.size, network.interpolation) == (256, 64, "bicubic")
    assert network.provenance.real
    assert capsys.readouterr().out == "resnet18 weights: mine, 3 birds\n"
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(network.preprocess(pixels), pixels / 255)
    with torch.no_grad():
        images = network.preprocess(pixels)
        torch.testing.assert_close(network.model(images), mine.eval()(images), atol=0.01, rtol=0.01)


def test_weights_of_ones_own_serve_every_architecture_and_win_over_our_own(fresh_data, monkeypatch):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    mine = get_model("mobilenet_v3_small", num_classes=2)
    write_own("mobilenet_v3_small", mine.state_dict(), categories=["cat", "dog"])
    network = torchvision_network("mobilenet_v3_small")
    assert str(network.provenance) == "mobilenet_v3_small weights: the file weights/mobilenet_v3_small.safetensors"
    assert network.model(network.preprocess(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))).shape == (1, 2)
    assert "this project's own" in str(pretrained_resnet("resnet18").provenance)
    write_own("resnet18", get_model("resnet18").state_dict(), categories=THOUSAND)
    assert len(pretrained_resnet("resnet18").categories) == 1000


MISFITS = {
    "a missing key": (lambda w: w.pop("bn1.bias"), THOUSAND, 'Missing key.*"bn1.bias"'),
    "no categories": (lambda w: None, None, "it names no categories"),
    "categories of another length": (lambda w: None, ["a", "b"], "size mismatch for fc.weight"),
    "half a file": (None, THOUSAND, "cannot be read"),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_of_ones_own_that_do_not_fit_are_named_with_a_remedy(misfit, fresh_data):
    change, categories, problem = MISFITS[misfit]
    weights = get_model("resnet18").state_dict()
    if change:
        change(weights)
    file = write_own("resnet18", weights, **({"categories": categories} if categories else {}))
    if not change:
        file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(UnfitWeights, match=problem) as caught:
        pretrained_resnet("resnet18")
    assert str(file) in str(caught.value)
    assert "or remove it to use torchvision's weights" in str(caught.value)


# Neither: this project's own


def test_offline_the_projects_own_weights_serve_and_count_as_real(official, monkeypatch, tmp_path, capsys):
    facts = {
        "categories": ["cat", "dog"], "top1": {"128": 0.5}, "resolution": 128, "photo_size": 96,
        "data": "two photos",
    }  # fmt: skip
    own = get_model("resnet18", num_classes=2)
    save_weights(tmp_path / "own" / "resnet18_tiny_imagenet.safetensors", own.state_dict(), facts)
    monkeypatch.setattr(resnet, "CHECKPOINTS", tmp_path / "own")
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    network = pretrained_resnet("resnet18")
    assert (network.categories, network.size) == (["cat", "dog"], 96)
    assert "this project's own, trained on two photos, top-1 50.0% at 128 px" in capsys.readouterr().out
    with pytest.raises(NoRealData, match="resnet18 weights: no real data, because PDL_OFFLINE is set"):
        torchvision_network("resnet18")


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="no weights for 'resnet50'; choose 'resnet18' or 'resnet34'"):
        pretrained_resnet("resnet50")
    with pytest.raises(ValueError, match="no classifier 'resnet43'; did you mean resnet34"):
        torchvision_network("resnet43")


NAMES = {"goldfish": 0, "Goldfish, Carassius auratus": 0, "crane": None, "Cardigan": 3, "cardigan": 4, "dog": None}


@pytest.mark.parametrize("name", [*NAMES, None])
def test_names_become_classes_and_class_0_is_one(name):
    categories = ["goldfish", "crane", "crane", "Cardigan", "cardigan"]
    network = PretrainedNetwork(nn.Identity(), categories, 8, 8, ORIGIN)
    assert network.class_of(name) == NAMES.get(name)
    assert network.classes_of([name, "goldfish", name]).tolist() == [c if c is not None else -1 for c in (
        NAMES.get(name), 0, NAMES.get(name))]  # fmt: skip


def test_networks_and_preprocessing_stay_on_a_fake_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        model = cifar_resnet18(width=8, stem_stride=2)
        network = PretrainedNetwork(model, THOUSAND, 32, 32, ORIGIN)
        images = network.preprocess(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="cpu"))
        assert images.device.type == "cuda"
        assert model(images).device.type == "cuda"
