"""Grad-CAM against captum, against plain autograd, and against what a caller may get wrong."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import get_model
from torchvision.ops import Permute

from pdl_utils import grad_cam as cams
from pdl_utils.grad_cam import (
    ClassMaps,
    enlarge,
    grad_cam,
    guided_backprop,
    guided_grad_cam,
    record_activations,
    scale_to_one,
)

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@pytest.fixture(scope="module")
def resnet():
    """Its batch norms have statistics of their own: at their initial values many a mistake would not show."""
    torch.manual_seed(0)
    model = get_model("resnet18", num_classes=10)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval().double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def tiny_net(outputs: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs),
    )  # fmt: skip


def by_hand(model: nn.Module, layer: str, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 by plain autograd, one image at a time."""
    kept, maps = {}, []

    def keep(module, args, output):
        kept["activation"] = output
        return output * 1  # or an in-place operation that follows would overwrite what is kept

    plain = copy.deepcopy(model)
    plain.get_submodule(layer).register_forward_hook(keep)
    for image, label in zip(images, classes, strict=True):
        (gradient,) = torch.autograd.grad(plain(image.unsqueeze(0))[0, label], kept["activation"])
        alpha = gradient[0].mean((1, 2))
        maps.append((alpha[:, None, None] * kept["activation"][0]).sum(0).relu().detach())
    return torch.stack(maps)


def captums(model: nn.Module, layer: str, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    from captum.attr import LayerGradCam

    peer = copy.deepcopy(model)
    for module in peer.modules():  # captum keeps what in-place operations overwrite
        if isinstance(module, nn.ReLU):
            module.inplace = False
    explain = LayerGradCam(peer, peer.get_submodule(layer))
    return explain.attribute(images, classes, relu_attributions=True)[:, 0].detach()


@pytest.mark.parametrize("layer", ["layer4.1.bn2", "layer3.0.conv1", "layer2.0.downsample.1"])
def test_maps_are_those_of_the_formula(resnet, images, layer):
    cam = grad_cam(resnet, images, layer, top_k=2)
    for k in range(2):
        expected = by_hand(resnet, layer, images, cam.classes[:, k])
        torch.testing.assert_close(cam.maps[layer][:, k], expected, rtol=1e-9, atol=1e-9 * expected.max())


@pytest.mark.parametrize("layer", ["layer1", "layer4", "layer4.1.bn2", "bn1"])
def test_maps_are_captums(resnet, images, layer):
    classes = torch.tensor([1, 5, 9])
    ours, theirs = (
        grad_cam(resnet, images, layer, classes).maps[layer][:, 0],
        captums(resnet, layer, images, classes),
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.max().item())


@pytest.mark.parametrize(("arch", "layer"), [("swin_t", "features.7"), ("convnext_tiny", "features.7.2.block.2")])
def test_layers_that_give_channels_last_are_captums_on_the_permuted_layer(arch, layer):
    torch.manual_seed(0)
    model, x, classes = get_model(arch, num_classes=10).eval().double(), torch.randn(2, 3, 96, 64).double(), [3, 7]
    with pytest.raises(ValueError, match=r"cannot be \(N, C, h, w\) .* channels_last=True"):
        grad_cam(model, x, layer, classes)
    with pytest.raises(ValueError, match=r"cannot be \(N, h, w, C\)"):
        grad_cam(model, x, "features.0.0", classes, channels_last=True)
    ours = grad_cam(model, x, layer, classes, channels_last=True).maps[layer][:, 0]
    assert ours.shape == (2, 3, 2)
    peer = copy.deepcopy(model)  # the layer, turned to (N, C, h, w), where captum reads it, and back
    there, back = Permute([0, 3, 1, 2]), Permute([0, 2, 3, 1])
    peer.set_submodule(layer, nn.Sequential(peer.get_submodule(layer), there, nn.Identity(), back))
    theirs = captums(peer, f"{layer}.2", x, torch.tensor(classes))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.max().item())


def test_proportions_that_no_image_has_can_be_insisted_on():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=(4, 1), padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spectrogram = torch.rand(1, 1, 64, 64)
    assert grad_cam(model, spectrogram, "0", 1, channels_last=False).maps["0"].shape == (1, 1, 16, 64)
    with pytest.raises(ValueError, match="channels_last=False takes it"):
        grad_cam(model, spectrogram, "0", 1)


def test_many_layers_in_one_pass_equal_one_layer_each(resnet, images):
    calls = []
    handle = resnet.register_forward_hook(lambda *_: calls.append(1))
    together = grad_cam(resnet, images, ["layer4", "layer1", "layer4.0.conv1"], top_k=3)
    handle.remove()
    assert len(calls) == 1
    assert list(together.maps) == ["layer4", "layer1", "layer4.0.conv1"]  # as asked, not as executed
    assert torch.equal(together.classes, resnet(images).topk(3).indices)
    for layer, maps in together.maps.items():
        torch.testing.assert_close(maps, grad_cam(resnet, images, layer, together.classes).maps[layer])


def test_branches_and_a_batch_of_one_image():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            both = torch.cat([self.left(x).relu_(), self.right(x).relu_()], 1)
            return self.head(both.mean((2, 3)))

    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(1, 3, 9, 9).double()
    cam = grad_cam(model, x, ["left", "right"], 0)
    for layer in ("left", "right"):
        expected = by_hand(model, layer, x, torch.tensor([0]))
        torch.testing.assert_close(cam.maps[layer][:, 0], expected, rtol=1e-9, atol=1e-12)


def test_signed_maps_hold_the_map_and_the_counterfactual_and_say_so(resnet, images):
    plain, signed = (grad_cam(resnet, images, "layer4", 2, signed=signed) for signed in (False, True))
    assert (plain.signed, signed.signed) == (False, True)
    assert (signed.maps["layer4"] < 0).any()
    torch.testing.assert_close(signed.maps["layer4"].relu(), plain.maps["layer4"])
    against = copy.deepcopy(resnet)
    against.fc.weight.data.neg_()
    opposite = grad_cam(against, images, "layer4", 2).maps["layer4"]
    torch.testing.assert_close((-signed.maps["layer4"]).relu(), opposite)


def test_ways_to_name_classes(resnet, images):
    several, model = [[0, 1], [2, 3], [4, 9]], copy.deepcopy(resnet)
    model.categories = [f"bird {i}" for i in range(10)]
    ways = [(0, [[0]] * 3), ([0, 1, 2], [[0], [1], [2]]), (torch.tensor(several, dtype=torch.uint8), several),
            ("bird 4", [[4]] * 3), (["bird 4", "Bird 0", "bird 9"], [[4], [0], [9]]),
            ([["bird 4", "bird 5"]] * 3, [[4, 5]] * 3)]  # fmt: skip
    for classes, expected in ways:
        cam = grad_cam(model, images, "layer4", classes)
        assert cam.classes.tolist() == expected
        torch.testing.assert_close(cam.probabilities, cam.logits.softmax(1).gather(1, torch.tensor(expected)))


def test_heatmaps_have_the_size_of_the_images_and_a_peak_of_one(resnet, images):
    cam = grad_cam(resnet, images[..., :64], ["layer3", "layer4"], top_k=2, signed=True)
    heat = cam.heatmaps("layer4")
    assert heat.shape == (3, 2, 96, 64)
    torch.testing.assert_close(heat.abs().amax((2, 3)), torch.ones(3, 2).double())
    torch.testing.assert_close(heat, scale_to_one(enlarge(cam.maps["layer4"], (96, 64))))
    assert torch.equal(cam.heatmaps(), cam.heatmaps("layer3"))
    nothing = ClassMaps({"a": torch.zeros(1, 1, 2, 2)}, cam.classes, cam.logits, (4, 4))
    assert (nothing.heatmaps() == 0).all()  # all evidence negative: zeros, not NaN


def test_enlarged_cells_cover_their_part_of_the_image():
    maps = torch.zeros(1, 1, 2, 2)
    maps[..., 0, 0] = 1
    large = enlarge(maps, (8, 8))[0, 0]
    assert large[0, 0] == large[1, 1] == 1  # beyond the outer cell's centre the value stays
    assert large[3, 3] > large[4, 4]
    torch.testing.assert_close(large.mean(), torch.tensor(0.25))


ONE_HOT = nn.functional.one_hot(torch.tensor([3, 4, 0]), 10)
MISTAKES = {
    "no such layer": ({"layers": "layer5"}, r"no layer 'layer5'; did you mean .*layer4"),
    "a layer as a module": ({"layers": lambda model: model.layer4}, "by its name .* this Sequential is 'layer4'"),
    "no map": ({"layers": "fc"}, r"'fc' gives shape \(3, 10\)"),
    "one cell": ({"layers": "avgpool"}, r"'avgpool' gives shape \(3, 512, 1, 1\).* more than one cell"),
    "no layer": ({"layers": []}, "name at least one layer"),
    "an unused layer": ({"layers": "spare"}, "'spare' takes no part"),
    "class too high": ({"classes": 10}, r"classes 0 to 9, and no class \[10\]"),
    "class below 0": ({"classes": -1}, "no class"),
    "too few classes": ({"classes": [1, 2]}, r"for 3 images give one integer, \(3,\) or \(3, K\)"),
    "a float": ({"classes": 1.5}, "one integer"),
    "truth values": ({"classes": [True, False, True]}, "one integer"),
    "one-hot rows": ({"classes": ONE_HOT}, "one-hot rows would be read as the classes 0 and 1"),
    "one-hot truth values": ({"classes": ONE_HOT.bool()}, r"take .argmax\(1\)"),
    "a name without categories": ({"classes": "goldfish"}, "has the name 'goldfish'; try its number"),
    "top_k too high": ({"top_k": 11}, "top_k=11, but the network has 10 classes"),
    "one image": ({"images": torch.rand(3, 96, 96)}, r"not Tensor \(3, 96, 96\) of .* image\[None\]"),
    "pixels": ({"images": torch.zeros(3, 3, 96, 96, dtype=torch.uint8)}, "batch of floats"),
    "not finite": ({"images": torch.full((3, 3, 96, 96), torch.nan).double()}, "scores: a value is NaN"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(resnet, images, mistake):
    model, (change, message) = copy.deepcopy(resnet), MISTAKES[mistake]
    model.spare = nn.Conv2d(3, 3, 1)
    asked = {"images": images, "layers": "layer4", "classes": None, "top_k": 1, **change}
    if callable(asked["layers"]):
        asked["layers"] = asked["layers"](model)
    with pytest.raises(ValueError, match=message):
        grad_cam(model, **asked)
    if "layers" not in change:
        with pytest.raises(ValueError, match=message):
            guided_backprop(model, asked["images"], asked["classes"], top_k=asked["top_k"])
    assert not any(module._forward_hooks for module in model.modules())


class Changed(nn.Module):
    """A network whose scores are made into something else."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny_net(), change

    def forward(self, x):
        return self.change(self.net(x))


OUTPUTS = {
    "a tuple": (lambda y: (y, y), "one tensor .* not a tuple; wrap it"),
    "a dictionary": (lambda y: {"out": y}, "not a dict; wrap it"),
    "one score an image": (lambda y: y[:, 0], r"not Tensor \(2,\)"),
    "a softmax": (lambda y: y.softmax(1), "ends in a softmax"),
    "detached": (lambda y: y.detach(), "no gradient leads from the scores to .*0|images"),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_that_cannot_be_explained_are_named(output):
    (change, message), x = OUTPUTS[output], torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        grad_cam(Changed(change), x, "net.0")
    with pytest.raises(ValueError, match=message):
        guided_backprop(Changed(change), x)


def test_a_layer_that_does_not_lead_to_the_scores_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = tiny_net(), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.net(x) + self.aside(x).mean().detach()

    with pytest.raises(ValueError, match="no gradient leads from the scores to aside: "):
        grad_cam(Aside(), torch.randn(2, 3, 8, 8), ["net.0", "aside"])


def test_one_logit_has_maps_and_no_probability():
    cam = grad_cam(tiny_net(1), torch.randn(2, 3, 8, 8), "0")
    assert cam.maps["0"].shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="one logit is always 1"):
        _ = cam.probabilities


def test_a_value_that_is_not_finite_is_an_error_and_not_a_scale():
    maps = torch.rand(2, 1, 4, 4) * 5
    maps[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="maps: a value is NaN or infinite"):
        scale_to_one(maps)


@pytest.mark.parametrize("explain", [lambda m, x: grad_cam(m, x, ["0", "2"]), guided_backprop])
@pytest.mark.parametrize(
    "fails", [False, pytest.param(True, marks=pytest.mark.fault("exception inside a hook context"))]
)
def test_the_model_is_left_as_it_was(explain, fails):
    model = tiny_net().train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model[0].weight.requires_grad_(False)
    mine = model[0].register_forward_hook(lambda *_: None)
    if fails:
        model[6].register_forward_hook(lambda *_: 1 / 0)

    def condition():
        modules, parameters = list(model.modules()), list(model.parameters())
        hooks = [[*m._forward_hooks, *m._backward_hooks, *m._forward_pre_hooks] for m in modules]
        return [m.training for m in modules], hooks, [p.requires_grad for p in parameters], torch.is_grad_enabled()

    before, state, x = condition(), copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
    try:
        explain(model, x)
        assert not fails
    except ZeroDivisionError:
        assert fails
    assert condition() == before
    assert mine.id in model[0]._forward_hooks
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert not x.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_frozen_no_grad_inference_train_mode_and_channels_last_memory_agree(resnet, images):
    expected = grad_cam(resnet, images, LAYERS, top_k=2).maps
    model = copy.deepcopy(resnet).requires_grad_(False).train().to(memory_format=torch.channels_last)
    with torch.no_grad():
        frozen = grad_cam(model, images, LAYERS, top_k=2).maps
    with torch.inference_mode():
        inferred = grad_cam(model, images + 0, LAYERS, top_k=2).maps
    for layer in LAYERS:
        torch.testing.assert_close(frozen[layer], expected[layer], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(inferred[layer], expected[layer], rtol=1e-6, atol=1e-9)


def test_nothing_is_saved_for_the_layers_before_the_first_explained_one(resnet, images):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        grad_cam(resnet, images, "layer4")
    assert saved
    assert len(saved) <= 5  # of one average and one matrix; the network has over a hundred


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(resnet, images):
    on_gpu = grad_cam(copy.deepcopy(resnet).cuda(), images.cuda(), LAYERS).maps
    for layer, expected in grad_cam(resnet, images, LAYERS).maps.items():
        torch.testing.assert_close(on_gpu[layer].cpu(), expected, rtol=1e-5, atol=1e-8)


def test_everything_but_the_gradients_runs_on_a_fake_gpu(monkeypatch):
    monkeypatch.setattr(cams.maps, "finite", lambda values, what: values)  # a fake tensor has no values
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = tiny_net().eval()
        with record_activations(model, "1") as seen:
            logits = model(torch.randn(2, 3, 8, 8))
        cam = ClassMaps({"1": seen["1"]}, cams.checks.choose_classes(logits, None, 3), logits, (96, 96))
        assert cam.heatmaps().device.type == cam.probabilities.device.type == "cuda"


class ReLUs(nn.Module):
    """Two ReLUs: as modules, used once each and out of place, which is what captum can take; or as functions."""

    def __init__(self, functional: bool):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 5)
        self.relus, self.functional = nn.ModuleList([nn.ReLU(), nn.ReLU()]), functional

    def forward(self, x):
        x = torch.relu_(self.first(x)) if self.functional else self.relus[0](self.first(x))
        x = self.second(x)
        x = nn.functional.relu(x, inplace=True) if self.functional else self.relus[1](x)
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("functional", [False, True])
def test_guided_backprop_is_captums(functional):
    from captum.attr import GuidedBackprop

    torch.manual_seed(0)
    peer, ours = ReLUs(False).double(), ReLUs(functional).double()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 12, 12).double()
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = GuidedBackprop(peer).attribute(x, torch.tensor([1, 4]))
    guided = guided_backprop(ours, x, [1, 4])
    assert guided.shape == (2, 1, 3, 12, 12)
    torch.testing.assert_close(guided[:, 0], expected, rtol=1e-9, atol=1e-12)
    x.requires_grad_()
    (plain,) = torch.autograd.grad(ours(x).gather(1, torch.tensor([[1], [4]])).sum(), x)
    assert not torch.allclose(plain, expected)  # guidance makes a difference here


@pytest.mark.parametrize(("arch", "met"), [("efficientnet_b0", "sigmoid, silu"), ("convnext_tiny", "gelu")])
def test_guided_backprop_without_a_relu_names_what_it_met(arch, met):
    with pytest.raises(ValueError, match=f"needs ReLUs; this network's forward pass met {met}"):
        guided_backprop(get_model(arch, num_classes=10), torch.randn(1, 3, 64, 64), 3)


def test_guided_grad_cam_is_the_product(resnet, images):
    classes = torch.tensor([[1, 2]] * 3)
    product = guided_grad_cam(resnet, images, "layer3", classes)
    maps = enlarge(grad_cam(resnet, images, "layer3", classes).maps["layer3"], (96, 96))
    torch.testing.assert_close(product, guided_backprop(resnet, images, classes) * maps.unsqueeze(2))


def test_recorded_activations_survive_in_place_operations_and_lead_to_gradients():
    model, x = tiny_net().eval(), torch.randn(2, 3, 8, 8)
    with record_activations(model, ["1", "2"]) as seen:
        logits = model(x)
    assert list(seen) == ["1", "2"]
    assert (seen["1"] < 0).any()
    assert (seen["2"] >= 0).all()
    (gradient,) = torch.autograd.grad(logits[0, 0], seen["1"])
    expected = model[6].weight[0, :, None, None] / 64 * (seen["1"][0] > 0)
    torch.testing.assert_close(gradient[0], expected)
    assert not model[1]._forward_hooks


def test_a_layer_that_returns_no_tensor_is_named():
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(TypeError, match="'0' returns a tuple"), record_activations(model, "0"):
        model(torch.zeros(2, 3))
