"""Grad-CAM against a peer, against plain autograd, and against everything that a caller may get wrong."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from pdl_utils.grad_cam.hooks import find_layers, record_activations
from pdl_utils.grad_cam.maps import enlarge, grad_cam, guided_backprop, guided_grad_cam, scale_to_one

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms statistics of their own: at their initial values many a mistake would not show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return lively(torchvision.models.resnet18(num_classes=10)).double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def by_hand(model: nn.Module, layer: str, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2 by plain autograd, one image at a time, on a copy without in-place operations."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    kept, maps = {}, []

    def keep(module, args, output):
        kept["activation"] = output
        return output * 1  # the in-place addition of a residual block would overwrite what is kept

    plain.get_submodule(layer).register_forward_hook(keep)
    for image, label in zip(images, classes, strict=True):
        score = plain(image.unsqueeze(0))[0, label]
        (gradient,) = torch.autograd.grad(score, kept["activation"])
        alpha = gradient[0].mean((1, 2))
        maps.append((alpha[:, None, None] * kept["activation"][0]).sum(0).relu().detach())
    return torch.stack(maps)


@pytest.mark.parametrize("layer", [*LAYERS, "layer4.1.bn2", "layer3.0.conv1", "bn1", "layer2.0.downsample.1"])
def test_maps_are_those_of_the_formula(resnet, images, layer):
    cam = grad_cam(resnet, images, layer, top_k=2)
    for k in range(2):
        expected = by_hand(resnet, layer, images, cam.classes[:, k])
        torch.testing.assert_close(cam.maps[layer][:, k], expected, rtol=1e-9, atol=1e-9 * expected.max())


@pytest.mark.parametrize("layer", [*LAYERS, "layer4.1.bn2", "bn1"])
def test_maps_are_captums(resnet, images, layer):
    from captum.attr import LayerGradCam

    peer = copy.deepcopy(resnet)
    for module in peer.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    classes = torch.tensor([1, 5, 9])
    ours = grad_cam(resnet, images, layer, classes).maps[layer][:, 0]
    theirs = LayerGradCam(peer, peer.get_submodule(layer)).attribute(images, classes, relu_attributions=True)[:, 0]
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9 * theirs.max().item())


def test_many_layers_in_one_pass_equal_one_layer_each(resnet, images):
    calls = []
    handle = resnet.register_forward_hook(lambda *_: calls.append(1))
    together = grad_cam(resnet, images, ["layer4", "layer1", "layer4.0.conv1"], top_k=3)
    handle.remove()
    assert len(calls) == 1
    assert list(together.maps) == ["layer4", "layer1", "layer4.0.conv1"]  # as asked, not as executed
    for layer, maps in together.maps.items():
        alone = grad_cam(resnet, images, layer, together.classes).maps[layer]
        torch.testing.assert_close(maps, alone)


def test_a_layer_beside_the_first_one_is_explained_too():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            both = torch.cat([self.left(x).relu_(), self.right(x).relu_()], 1)
            return self.head(both.mean((2, 3)))

    torch.manual_seed(0)
    model, x = Branches().double(), torch.randn(2, 3, 9, 9).double()
    cam = grad_cam(model, x, ["left", "right"], 3)
    for layer in ("left", "right"):
        torch.testing.assert_close(
            cam.maps[layer][:, 0], by_hand(model, layer, x, torch.tensor([3, 3])), rtol=1e-9, atol=1e-12
        )


def test_signed_maps_hold_the_map_and_the_counterfactual(resnet, images):
    maps = grad_cam(resnet, images, "layer4", 2).maps["layer4"]
    signed = grad_cam(resnet, images, "layer4", 2, signed=True).maps["layer4"]
    assert (signed < 0).any()
    torch.testing.assert_close(signed.relu(), maps)
    against = copy.deepcopy(resnet)
    against.fc.weight.data.neg_()
    against.fc.bias.data.neg_()
    torch.testing.assert_close((-signed).relu(), grad_cam(against, images, "layer4", 2).maps["layer4"])


def test_all_negative_evidence_gives_zeros_not_nan():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model[0].bias.data.fill_(1.0)
    model[4].weight.data.fill_(-1.0)
    maps = grad_cam(model, torch.zeros(1, 3, 8, 8), "1", 0).maps["1"]
    assert (maps == 0).all()
    assert (scale_to_one(enlarge(maps, (8, 8))) == 0).all()


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (4, [[4], [4], [4]]),
        ([0, 1, 2], [[0], [1], [2]]),
        (torch.tensor([[0, 1], [2, 3], [4, 5]]), [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_ways_to_name_classes(resnet, images, classes, expected):
    cam = grad_cam(resnet, images, "layer4", classes)
    assert cam.classes.tolist() == expected
    torch.testing.assert_close(cam.probabilities, cam.logits.softmax(1).gather(1, torch.tensor(expected)))


def test_unasked_for_the_most_probable_classes_are_explained(resnet, images):
    cam = grad_cam(resnet, images, "layer4", top_k=3)
    assert torch.equal(cam.classes, resnet(images).topk(3).indices)


@pytest.mark.parametrize("call", [grad_cam, guided_grad_cam])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "layer5"}, r"no layer 'layer5'; did you mean .*layer4"),
        ({"layer": nn.ReLU()}, "ReLU is not a part of this ResNet"),
        ({"layer": "fc"}, r"'fc' gives shape \(3, 10\)"),
        ({"layer": "avgpool"}, "'avgpool' has a single cell for 96×96 images"),
        ({"classes": 10}, "class 10 is out of range: the model has classes 0 to 9"),
        ({"classes": -1}, "class -1 is out of range"),
        ({"classes": [1, 2]}, r"classes of shape \(2,\) for 3 images"),
        ({"classes": torch.zeros(3, 0, dtype=torch.long)}, "for 3 images"),
        ({"classes": 1.5}, "whole numbers"),
        ({"top_k": 11}, "top_k=11: choose 1 to 10"),
        ({"top_k": 0}, "top_k=0"),
        ({"images": torch.zeros(3, 96, 96)}, r"unsqueeze"),
        ({"images": torch.zeros(1, 3, 96, 96, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.zeros(0, 3, 96, 96)}, "shape"),
        ({"images": torch.zeros(3, 1, 96, 96)}, "images have 1 channels; the model takes 3"),
    ],
)
def test_mistakes_are_named(resnet, images, call, change, message):
    asked = {"images": images, "layer": "layer4", "classes": None, "top_k": 1, **change}
    with pytest.raises(ValueError, match=message):
        call(resnet, asked["images"], asked["layer"], asked["classes"], top_k=asked["top_k"])
    assert not any(module._forward_hooks for module in resnet.modules())


def test_a_layer_that_does_not_run_is_named():
    model = tiny_net()
    model[0].spare = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"'0.spare' takes no part"):
        grad_cam(model, torch.zeros(1, 3, 8, 8), "0.spare")


def test_a_model_that_gives_no_scores_is_named():
    with pytest.raises(ValueError, match="class scores of shape"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 8, 8), "0")


@pytest.mark.parametrize("explain", [lambda m, x: grad_cam(m, x, ["0", "2"]), guided_backprop])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(explain, fails):
    model = tiny_net().train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    model[0].weight.requires_grad_(False)
    mine = model[0].register_forward_hook(lambda *_: None)
    if fails:
        model[6].register_forward_hook(lambda *_: 1 / 0)
    state = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    if fails:
        with pytest.raises(ZeroDivisionError):
            explain(model, x)
    else:
        explain(model, x)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()] == hooks
    assert mine.id in model[0]._forward_hooks
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert not model[0].weight.requires_grad
    assert not x.requires_grad
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_frozen_no_grad_inference_train_mode_and_channels_last_agree(resnet, images):
    expected = grad_cam(resnet, images, LAYERS, top_k=2).maps
    model = copy.deepcopy(resnet).requires_grad_(False).train().to(memory_format=torch.channels_last)
    with torch.no_grad():
        frozen = grad_cam(model, images, LAYERS, top_k=2).maps
    with torch.inference_mode():
        inferred = grad_cam(model, images + 0, LAYERS, top_k=2).maps
    for layer in LAYERS:
        torch.testing.assert_close(frozen[layer], expected[layer], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(inferred[layer], expected[layer], rtol=1e-6, atol=1e-9)


def test_autocast_gives_float32_maps_close_to_the_exact_ones(resnet, images):
    model = copy.deepcopy(resnet).float()
    exact = grad_cam(model, images.float(), "layer3", 1).maps["layer3"]
    with torch.autocast("cpu", torch.bfloat16):
        cam = grad_cam(model, images.float(), "layer3", 1)
    assert cam.maps["layer3"].dtype == cam.logits.dtype == torch.float32
    assert (cam.maps["layer3"] - exact).norm() < 0.1 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(resnet, images):
    expected = grad_cam(resnet, images, LAYERS).maps
    on_gpu = grad_cam(copy.deepcopy(resnet).cuda(), images.cuda(), LAYERS).maps
    for layer in LAYERS:
        torch.testing.assert_close(on_gpu[layer].cpu(), expected[layer], rtol=1e-5, atol=1e-8)


def test_a_non_resnet_needs_no_other_call():
    torch.manual_seed(0)
    model = lively(torchvision.models.mobilenet_v3_small(num_classes=7))
    x = torch.randn(2, 3, 96, 96)
    cam = grad_cam(model, x, "features.8", top_k=2)
    assert cam.maps["features.8"].shape == (2, 2, 6, 6)
    expected = by_hand(model, "features.8", x, cam.classes[:, 0])
    torch.testing.assert_close(
        cam.maps["features.8"][:, 0], expected, rtol=1e-4, atol=1e-5 * expected.max().item()
    )


class PlainReLUs(nn.Module):
    """Two ReLU modules used once each and out of place: what captum's guided backpropagation can take."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class FunctionalReLUs(PlainReLUs):
    """The same function with functional and in-place ReLUs."""

    def forward(self, x):
        hidden = torch.relu_(self.body[0](x))
        return self.head(nn.functional.relu(self.body[2](hidden), inplace=True).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("network", [PlainReLUs, FunctionalReLUs])
def test_guided_backprop_is_captums(network):
    from captum.attr import GuidedBackprop

    torch.manual_seed(0)
    peer = PlainReLUs().double()
    ours = network().double()
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


def test_guided_grad_cam_is_the_product(resnet, images):
    classes = torch.tensor([[1, 2]] * 3)
    product = guided_grad_cam(resnet, images, "layer3", classes)
    maps = enlarge(grad_cam(resnet, images, "layer3", classes).maps["layer3"], (96, 96))
    torch.testing.assert_close(product, guided_backprop(resnet, images, classes) * maps.unsqueeze(2))


def test_enlarged_cells_cover_their_part_of_the_image():
    maps = torch.zeros(1, 1, 2, 2)
    maps[..., 0, 0] = 1
    large = enlarge(maps, (8, 8))[0, 0]
    assert large[0, 0] == 1  # beyond the outer cell's centre the value stays
    assert large[1, 1] == 1
    assert large[3, 3] > large[4, 4]
    torch.testing.assert_close(large.mean(), torch.tensor(0.25))


def test_recorded_activations_survive_in_place_operations_and_lead_to_gradients():
    model, x = tiny_net().eval(), torch.randn(2, 3, 8, 8)
    with record_activations(model, ["1", model[2]]) as seen:
        logits = model(x)
    assert list(seen) == ["1", "2"]
    assert (seen["1"] < 0).any()
    assert (seen["2"] >= 0).all()
    (gradient,) = torch.autograd.grad(logits[0, 0], seen["1"])
    expected = model[6].weight[0, :, None, None] / 64 * (seen["1"][0] > 0)
    torch.testing.assert_close(gradient[0], expected)
    assert not model[1]._forward_hooks


def test_layers_are_found_by_name_and_module_and_none_is_an_error(resnet):
    assert list(find_layers(resnet, ["layer3.0", resnet.layer4])) == ["layer3.0", "layer4"]
    with pytest.raises(ValueError, match="at least one layer"):
        find_layers(resnet, [])


def test_a_layer_that_returns_no_tensor_is_named():
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(TypeError, match=r"'0' \(LSTM\) returns tuple"), record_activations(model, "0"):
        model(torch.zeros(2, 3))
