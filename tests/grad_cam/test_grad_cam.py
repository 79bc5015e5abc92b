"""Grad-CAM against captum, by hand, and against what a caller may get wrong."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop, LayerGradCam
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import get_model
from torchvision.ops import Permute

from pdl_utils import grad_cam as cams
from pdl_utils.grad_cam import grad_cam, guided_backprop, record_activations

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.fixture(scope="module")
def resnet():
    """Its batch norms have statistics of their own: at their initial values many a mistake would not show."""
    torch.manual_seed(0)
    model = get_model("resnet18", num_classes=10).double()
    model(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def tiny_net(outputs: int = 5, activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation or nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs),
    )  # fmt: skip


# Right maps


def check_against_captum(maps: torch.Tensor, model: nn.Module, layer: str, x: torch.Tensor, classes: list[int]):
    peer = copy.deepcopy(model)
    for module in peer.modules():  # captum keeps what in-place operations overwrite
        if isinstance(module, nn.ReLU):
            module.inplace = False
    explain = LayerGradCam(peer, peer.get_submodule(layer))
    theirs = explain.attribute(x, torch.tensor(classes), relu_attributions=True)
    torch.testing.assert_close(maps, theirs.detach(), rtol=0, atol=1e-9 * theirs.max().item())


@pytest.mark.parametrize("layer", ["bn1", "layer2.0.downsample.1", "layer4.1.bn2", "layer4"])
def test_maps_are_captums(resnet, images, layer):
    maps = grad_cam(resnet, images, layer, [1, 5, 9]).maps[layer]
    check_against_captum(maps, resnet, layer, images, [1, 5, 9])


@pytest.mark.parametrize(("arch", "layer"), [("swin_t", "features.7"), ("convnext_tiny", "features.7.2.block.2")])
def test_layers_that_give_channels_last_are_captums_on_the_permuted_layer(arch, layer):
    torch.manual_seed(0)
    model, x, classes = get_model(arch, num_classes=10).eval().double(), torch.randn(2, 3, 96, 64).double(), [3, 7]
    with pytest.raises(ValueError, match=r"it need not be \(N, C, h, w\) of .* channels_last=True"):
        grad_cam(model, x, layer, classes)
    with pytest.raises(ValueError, match=r"need not be \(N, h, w, C\)"):
        grad_cam(model, x, "features.0.0", classes, channels_last=True)
    maps = grad_cam(model, x, layer, classes, channels_last=True).maps[layer]
    assert maps.shape == (2, 1, 3, 2)
    # The layer turned to (N, C, h, w), where captum reads it, and back.
    turned = nn.Sequential(model.get_submodule(layer), Permute([0, 3, 1, 2]), nn.Identity(), Permute([0, 2, 3, 1]))
    model.set_submodule(layer, turned)
    check_against_captum(maps, model, f"{layer}.2", x, classes)


def test_maps_by_hand():
    """Behind the ReLU follow an average over 64 cells and a matrix: α is the class's weight over 64."""
    model, x = tiny_net().eval(), torch.randn(2, 3, 8, 8)
    expected = torch.einsum("k,nkhw->nhw", model[6].weight[4] / 64, model[:3](x)).detach()
    torch.testing.assert_close(grad_cam(model, x, "2", 4).maps["2"][:, 0], expected.relu())
    torch.testing.assert_close(grad_cam(model, x, "2", 4, signed=True).maps["2"][:, 0], expected)


def test_many_layers_and_classes_in_one_pass_equal_one_each(resnet, images):
    calls = []
    handle = resnet.register_forward_hook(lambda *_: calls.append(1))
    together = grad_cam(resnet, images, ["layer4", "layer1", "layer4.0.conv1"], top_k=2)
    handle.remove()
    assert len(calls) == 1
    assert list(together.maps) == ["layer4", "layer1", "layer4.0.conv1"]  # as asked, not as executed
    assert torch.equal(together.classes, resnet(images).topk(2).indices)
    for layer, maps in together.maps.items():
        second = grad_cam(resnet, images, layer, together.classes[:, 1]).maps[layer]
        torch.testing.assert_close(maps[:, 1:], second)


def test_frozen_no_grad_inference_train_mode_and_channels_last_memory_agree(resnet, images):
    expected = grad_cam(resnet, images, LAYERS).maps
    model = copy.deepcopy(resnet).requires_grad_(False).train().to(memory_format=torch.channels_last)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = grad_cam(model, images + 0, LAYERS).maps
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_ways_to_name_classes():
    several, model = [[0, 1], [2, 3], [4, 0]], tiny_net().eval()
    model.categories = [f"bird {i}" for i in range(5)]
    ways = [(0, [[0]] * 3), ([0, 1, 2], [[0], [1], [2]]), (torch.tensor(several, dtype=torch.uint8), several),
            ("bird 4", [[4]] * 3), (["bird 4", "Bird 0", "bird 3"], [[4], [0], [3]]),
            (np.array([[1, 0], [3, 2], [0, 4]])[:, ::-1], several)]  # fmt: skip
    for classes, expected in ways:
        cam = grad_cam(model, torch.randn(3, 3, 8, 8), "2", classes)
        assert cam.classes.tolist() == expected
        torch.testing.assert_close(cam.probabilities, cam.logits.softmax(1).gather(1, torch.tensor(expected)))


def test_heatmaps_have_the_size_of_the_images_and_a_peak_of_one():
    maps = torch.tensor([[[[2.0, 0.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    cam = cams.ClassMaps({"a": maps, "b": -maps}, torch.tensor([[0, 1]]), torch.zeros(1, 2), (2, 4))
    # Beyond the centre of an outer cell its value stays.
    expected = [[1, 0.75, 0.25, 0], [0, -0.125, -0.375, -0.5]]
    torch.testing.assert_close(cam.heatmaps(), torch.tensor([[expected, [[0.0] * 4] * 2]]))
    torch.testing.assert_close(cam.heatmaps("b"), -cam.heatmaps())
    with pytest.raises(ValueError, match="maps: a value is NaN or infinite"):
        cams.scale_to_one(maps / maps)


def test_one_logit_has_maps_and_no_probability():
    cam = grad_cam(tiny_net(1), torch.randn(2, 3, 8, 8), "0")
    assert cam.maps["0"].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="one logit is always 1"):
        _ = cam.probabilities


def test_proportions_that_no_image_has_can_be_insisted_on():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=(4, 1), padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="False for any proportions"):
        grad_cam(model, torch.rand(1, 1, 64, 64), "0", 1)
    assert grad_cam(model, torch.rand(1, 1, 64, 64), "0", 1, channels_last=False).maps["0"].shape == (1, 1, 16, 64)


# Guided backpropagation


class ReLUs(nn.Module):
    """Two ReLUs: as modules, used once each and out of place, which is what captum can take; or as functions."""

    def __init__(self, functional: bool):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 5)
        self.relus = [torch.relu_, nn.functional.relu] if functional else nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def forward(self, x):
        x = self.relus[1](self.second(self.relus[0](self.first(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Input Tensor 0", "ignore:Setting backward hooks")
@pytest.mark.parametrize("functional", [False, True])
def test_guided_backprop_is_captums(functional):
    torch.manual_seed(0)
    peer, ours, x = ReLUs(False).double(), ReLUs(functional).double(), torch.randn(2, 3, 12, 12).double()
    ours.load_state_dict(peer.state_dict())
    guided = guided_backprop(ours, x, [1, 4])
    assert guided.shape == (2, 1, 3, 12, 12)
    expected = GuidedBackprop(peer).attribute(x, torch.tensor([1, 4]))
    torch.testing.assert_close(guided[:, 0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [nn.Identity(), lambda y: y + torch.ones(5).relu()], ids=["none", "aside"])
def test_guided_backprop_without_a_relu_on_the_way_is_refused(change):
    model = Changed(change)
    model.net = tiny_net(activation=nn.SiLU(inplace=True))
    with pytest.raises(ValueError, match="guided backpropagation needs ReLUs"):
        guided_backprop(model, X, 3)


# What a caller may get wrong


class Changed(nn.Module):
    """A network whose scores are made into something else; `aside` does not lead to them, `spare` is not used."""

    def __init__(self, change=None):
        super().__init__()
        self.net, self.aside, self.spare = tiny_net(), nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
        self.change = change or nn.Identity()
        self.categories = ["jay", "crane", "crane", "hen", "owl"]

    def forward(self, x):
        return self.change(self.net(x) + self.aside(x).mean().detach())


class Twice(Changed):
    """Scores of the images and of their mirror images."""

    def forward(self, x):
        return sum(self.net(torch.cat([x, x.flip(3)])).chunk(2))


MIXED = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
NET, X, ONE_HOT = Changed(), torch.randn(2, 3, 8, 8), nn.functional.one_hot(torch.tensor([3, 4]), 5)
MISTAKES = [
    ({"layers": "net.O"}, "no layer named 'net.O'; did you mean net.6"),
    ({"layers": NET.net}, "no layer named 'Sequential.* did you mean net[?]"),
    ({"layers": "net.5", "channels_last": True}, r"'net.5' gives \(2, 4\); .* more than one cell"),
    ({"layers": "net.4"}, r"'net.4' gives \(2, 4, 1, 1\); .* more than one cell"),
    ({"layers": []}, "name at least one layer"),
    ({"layers": "spare"}, "'spare' takes no part"),
    ({"layers": ["net.0", "aside"]}, "no gradient leads from the scores to aside: "),
    ({"classes": 5}, "classes are 5; for 2 images give one number from 0 to 4"),
    ({"classes": [1, 2, 3]}, r"\(2,\) or \(2, K\)"),
    ({"classes": [True, False]}, "one number"),
    ({"classes": ONE_HOT}, r"of one-hot rows take .argmax\(1\)"),
    ({"classes": "goldfish"}, "classes are goldfish; .* the name of one of the model's `categories`"),
    ({"top_k": 6}, "top_k=6, but the network has 5 classes"),
    ({"images": X[0]}, r"not Tensor \(3, 8, 8\) of .* image\[None\]"),
    ({"images": X.byte()}, "must be floats"),
    ({"images": X / 0}, "scores: a value is NaN"),
    ({"model": Changed(lambda y: (y, y))}, "one tensor .* not a tuple; wrap it"),
    ({"model": Changed(lambda y: y[:, 0])}, r"not Tensor \(2,\)"),
    ({"model": Changed(lambda y: y.softmax(1))}, "ends in a softmax"),
    ({"model": Changed(lambda y: y.sigmoid())}, "ends in a softmax or sigmoid"),
    ({"model": MIXED, "layers": "0"}, r"gives \(2, 8, 8, 8\); it need not be \(N, C, h, w\)"),
    ({"model": Twice(), "layers": "net.2"}, r"gives \(4, 4, 8, 8\)"),
    ({"model": Changed(lambda y: y.detach())}, "no gradient leads from the scores to (net.0|images)"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_named(change, message):
    asked = {"model": NET, "images": X, "layers": "net.0", **change}
    with pytest.raises(ValueError, match=message):
        grad_cam(**asked)
    if asked.pop("layers") == "net.0":
        with pytest.raises(ValueError, match=message):
            guided_backprop(**asked)


def test_a_layer_that_returns_no_tensor_is_named():
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(TypeError, match="'0' returns a tuple"), record_activations(model, "0"):
        model(torch.zeros(2, 3))


# What is left behind, and where it runs


@pytest.mark.parametrize("explain", [lambda m, x: grad_cam(m, x, ["0", "2"]), guided_backprop])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(explain, fails):
    model, x = tiny_net().train(), torch.randn(2, 3, 8, 8)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model[6].register_forward_hook(lambda *_: 1 / 0 if fails else None)

    def condition():
        modules = [(m.training, *m._forward_hooks, *m._backward_hooks) for m in model.modules()]
        parameters = [(p.requires_grad, p.grad.tolist()) for p in model.parameters()]
        values = [value.tolist() for value in model.state_dict().values()]
        return modules, parameters, values, x.requires_grad, torch.is_grad_enabled()

    before = condition()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        explain(model, x)
    assert condition() == before


def test_nothing_is_saved_for_the_layers_before_the_first_explained_one(resnet, images):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        grad_cam(resnet, images, "layer4")
    assert 0 < len(saved) <= 5  # of one average and one matrix; the network has over a hundred


def test_everything_but_the_gradients_runs_on_a_fake_gpu(monkeypatch):
    monkeypatch.setattr(cams.checks, "finite", lambda values, what: values)  # a fake tensor has no values
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = tiny_net().eval()
        with record_activations(model, "1") as seen:
            logits = model(torch.randn(2, 3, 8, 8))
        cam = cams.ClassMaps({"1": seen["1"]}, cams.checks.choose_classes(logits, None, 3), logits, (96, 96))
        assert cam.heatmaps().device.type == cam.probabilities.device.type == "cuda"
