"""Weights: a file of the user's own, else torchvision's, else this project's; every architecture by one call."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import get_model, get_model_weights, list_models

from pdl_utils import resnet
from pdl_utils.datasets import DamagedFile, NoRealData, Provenance
from pdl_utils.resnet import PretrainedNetwork, UnfitWeights, pretrained_resnet, torchvision_network
from pdl_utils.settings import data_root
from pdl_utils.weights import save_weights

THOUSAND = [f"class {i}" for i in range(1000)]
ORIGIN = Provenance("weights", "a test")


@pytest.fixture
def serve(file_server, fresh_data, monkeypatch, tmp_path):
    """Puts weights as one of torchvision's files on a local server; gives its name."""
    monkeypatch.setenv("PDL_PROGRESS", "0")

    def put(arch: str, weights: dict) -> str:
        torch.save(weights, tmp_path / "weights.pth")
        content = (tmp_path / "weights.pth").read_bytes()
        name = f"{arch}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        file_server.files[name] = content
        monkeypatch.setattr(get_model_weights(arch).IMAGENET1K_V1.value, "url", file_server.url + name)
        return name

    return put


def test_torchvisions_weights_are_fetched_once_and_kept(serve, file_server):
    weights = get_model("resnet18").state_dict()
    name = serve("resnet18", weights)
    for _ in range(2):
        network = pretrained_resnet("resnet18")
        assert all(torch.equal(w, weights[key]) for key, w in network.model.state_dict().items())
    assert file_server.requests == 1
    assert str(network.provenance) == "resnet18 weights: torchvision's IMAGENET1K_V1, 1,000 classes"
    assert network.provenance.real
    assert not network.model.training
    photo = Image.new("RGB", (500, 300), (255, 0, 0))
    crops = network.crop([photo, photo.rotate(90, expand=True)])
    assert (crops.shape, crops.dtype) == ((2, 3, 224, 224), torch.uint8)
    assert network.logits(crops).shape == (2, 1000)
    file = data_root() / name
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match=f"{name} .*its SHA-256 differs"):
        pretrained_resnet("resnet18")
    assert file.exists()


# Every classifier of torchvision, with what belongs to its weights


def test_every_classifier_gets_the_preprocessing_of_its_weights(monkeypatch, fresh_data):
    """With an empty model in place of the weights: `obtain` only reads."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
    photo, checked = Image.fromarray(noise).resize((420, 700)), set()
    monkeypatch.setattr(resnet, "obtain", lambda name, file, *, read, **_: read(data_root() / file))
    monkeypatch.setattr(resnet, "sha256", lambda path: path.stem.rsplit("-", 1)[1])
    monkeypatch.setattr(resnet.torch, "load", lambda *_, **__: {})
    monkeypatch.setattr(resnet, "get_model", lambda arch, weights: nn.Sequential(nn.Linear(1, 1)))
    for arch in list_models(module=torchvision.models):
        network, entries = torchvision_network(arch), get_model_weights(arch).__members__
        used = re.search("torchvision's (.*), 1,000", network.provenance.source)[1]
        assert used == "IMAGENET1K_V1" or "IMAGENET1K_V1" not in entries
        assert re.fullmatch(r".*-[0-9a-f]{8,}\.pth", entries[used].url), "the name of the file tells its SHA-256"
        assert network.categories == entries[used].meta["categories"] == network.model.categories
        preset = entries[used].transforms()
        if str(preset) not in checked:  # many share one
            checked.add(str(preset))
            ours = network.preprocess(network.crop([photo]))[0]
            torch.testing.assert_close(ours, preset(photo), rtol=1e-5, atol=2e-4)
    assert len(checked) > 20


def test_weights_bring_what_torchvision_changes_in_the_network_for_them(serve):
    """GoogLeNet's weights want their images transformed, and no auxiliary heads."""
    weights = get_model("googlenet", init_weights=False).state_dict()
    serve("googlenet", weights)
    model = torchvision_network("googlenet").model
    assert model.transform_input
    assert model.aux1 is None
    assert torch.equal(model.fc.weight, weights["fc.weight"])


def test_photographs_are_laid_on_white_before_they_are_cut():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (PretrainedNetwork(nn.Identity(), [], ORIGIN, 4, 8).crop([clear]) == 255).all()  # no frame around it


# A file of the user's own


def write_own(arch: str, weights: dict, **facts: object) -> Path:
    """As somebody writes it who has safetensors and not this package."""
    file = data_root() / "weights" / f"{arch}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    half = {name: w.half() for name, w in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(half, file, {key: json.dumps(value) for key, value in facts.items()})
    return file


def test_weights_of_ones_own_come_first(file_server, fresh_data, capsys):
    mine = get_model("mobilenet_v3_small", num_classes=3).eval()
    facts = {"source": "mine, 3 birds", "categories": ["jay", "hen", "owl"], "size": 64, "mean": [0, 0, 0]}
    write_own("mobilenet_v3_small", mine.state_dict(), **facts, std=[1, 1, 1], interpolation="bicubic")
    network = torchvision_network("mobilenet_v3_small")
    assert file_server.requests == 0
    assert network.categories == ["jay", "hen", "owl"]
    assert (network.resize, network.size, network.interpolation.value) == (256, 64, "bicubic")
    assert network.provenance.real
    assert capsys.readouterr().out == "mobilenet_v3_small weights: mine, 3 birds\n"
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(network.preprocess(pixels), pixels / 255)
    torch.testing.assert_close(network.logits(pixels), mine(pixels / 255).detach(), atol=0.01, rtol=0.01)
    network.model.half()
    assert network.logits(pixels).dtype == torch.half


MISFITS = [
    ({}, "it names no categories"),
    ({"categories": ["a", "b"]}, "size mismatch for fc.weight"),
    ({"categories": THOUSAND, "mean": [123.7, 116.3, 103.5]}, "not in 0..255"),
    ({"categories": THOUSAND, "interpolation": "best"}, "'best' is not a valid InterpolationMode"),
    ({"categories": THOUSAND, "size": "224"}, "not supported between"),
    ({"categories": dict.fromkeys(THOUSAND)}, "must be a list of names"),
    ({"categories": list(range(1000))}, "no attribute 'split'"),
]


@pytest.mark.parametrize(("facts", "problem"), MISFITS)
def test_weights_of_ones_own_that_do_not_fit_are_named_with_a_remedy(facts, problem, fresh_data):
    file = write_own("resnet18", get_model("resnet18").state_dict(), **facts)
    with pytest.raises(UnfitWeights, match=f"{re.escape(str(file))} .*{problem}.*or remove it to use"):
        pretrained_resnet("resnet18")


# Neither: this project's own


def test_offline_the_projects_own_weights_serve_and_count_as_real(fresh_data, monkeypatch, tmp_path, capsys):
    facts = {"categories": ["cat", "dog"], "top1": {"128": 0.5}, "resolution": 128, "photo_size": 96}
    own, file = get_model("resnet18", num_classes=2), tmp_path / "resnet18_tiny_imagenet.safetensors"
    save_weights(file, own.state_dict(), {**facts, "data": "two photos"})
    monkeypatch.setattr(resnet, "CHECKPOINTS", tmp_path)
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    network = pretrained_resnet("resnet18")
    assert (network.categories, network.resize, network.size) == (["cat", "dog"], 96, 96)
    assert "this project's own, trained on two photos, top-1 50.0% at 128 px" in capsys.readouterr().out
    with pytest.raises(NoRealData, match="resnet50 weights: no real data, because PDL_OFFLINE is set"):
        torchvision_network("resnet50")


@pytest.mark.parametrize(("name", "similar"), [("resnet43", "resnet34"), ("fasterrcnn_resnet50_fpn", "alexnet, ")])
def test_an_architecture_that_is_no_classifier_of_torchvision_is_named(name, similar):
    with pytest.raises(ValueError, match=f"no classifier '{name}'; did you mean {similar}"):
        torchvision_network(name)


def test_names_become_classes_and_class_0_is_one():
    categories = ["goldfish", "crane", "crane", "Cardigan", "cardigan"]
    names = ["goldfish", "Goldfish, Carassius auratus", "Cardigan", "cardigan", "crane", "dog", None]
    network = PretrainedNetwork(nn.Identity(), categories, ORIGIN)
    assert network.classes_of(names).tolist() == [0, 0, 3, 4, -1, -1, -1]


def test_networks_and_preprocessing_stay_on_a_fake_gpu():
    with FakeTensorMode(), torch.device("cuda"):
        network = PretrainedNetwork(resnet.cifar_resnet18(width=8, stem_stride=2), THOUSAND, ORIGIN)
        images = network.preprocess(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="cpu"))
        assert images.device.type == network.model(images).device.type == "cuda"
