"""LoRA: against peft, the frozen network bit for bit, merging, several adapters, saving, and what it refuses."""

import copy
import math

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils.few_labels.lora import (
    LoRA,
    add_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    unmerge_lora,
    use_lora,
    without_lora,
)


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def image_net():
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(6 * 3 * 4, 4))


NETWORKS = {"mlp": (mlp, (9, 12)), "tokens": (mlp, (2, 3, 12)), "image": (image_net, (4, 3, 8, 8))}


def updates(model, name="default"):
    """Layer's name → its update in the adapter `name`."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRA) and name in m.updates}
    return {layer: module.updates[name] for layer, module in layers.items()}


def trained(model, **options):
    """The network with an adapter whose A and B look trained."""
    torch.manual_seed(0)
    add_lora(model, 2, 4.0, **options)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def fit(model, x):
    """A few steps with weight decay, which would show on any weight that is not left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def assert_close(ours, theirs):
    """Equal but for rounding: relative to the tensor's own size."""
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= (1e-14 if theirs.dtype == torch.float64 else 1e-6) * theirs.norm()


@pytest.mark.parametrize(
    ("network", "scaling", "dtype"),
    [
        ("mlp", "standard", torch.float64),
        ("tokens", "rs", torch.float64),
        ("image", "standard", torch.float64),
        ("image", "rs", torch.float32),
    ],
)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(network, scaling, dtype):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    ours = build().to(dtype)
    layers = [name for name, m in ours.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=scaling == "rs", target_modules=layers)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(ours))
    add_lora(ours, 3, 7, scaling=scaling)
    assert list(updates(ours)) == layers
    pairs = []
    for name, update in updates(ours).items():
        nn.init.normal_(update.B.weight, std=0.3)
        peer = theirs.get_submodule(name)
        pairs += [(update.A, peer.lora_A["default"]), (update.B, peer.lora_B["default"])]
    for mine, yours in pairs:
        yours.load_state_dict(mine.state_dict())
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, peer_out = ours(x), theirs(y)
    assert_close(out, peer_out)
    target = torch.randn_like(out)
    (out - target).square().sum().backward()
    (peer_out - target).square().sum().backward()
    assert_close(x.grad, y.grad)
    for mine, yours in pairs:
        assert_close(mine.weight.grad, yours.weight.grad)
    merge_lora(ours)
    for name in layers:
        theirs.get_submodule(name).merge()
        assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).base_layer.weight)


def test_a_convolution_that_peft_cannot_merge_gives_the_same_output_merged():
    layer = nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="reflect")
    model, x = trained(nn.Sequential(layer)), torch.randn(2, 4, 9, 9)
    out = model(x)
    assert not torch.allclose(out, layer(x))
    merge_lora(model)
    torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize("network", ["mlp", "image"])
def test_the_function_is_unchanged_at_first_and_the_frozen_network_for_good(network):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, x = build().eval(), torch.randn(shape)
    plain, before = model(x), copy.deepcopy(model.state_dict())
    add_lora(model, 2, 4.0)
    assert torch.equal(model(x), plain)
    fit(model, x)
    changed = model(x)
    assert not torch.allclose(changed, plain)
    with without_lora(model):
        with pytest.raises(ZeroDivisionError), without_lora(model):
            _ = 1 / 0
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), changed)
    assert equal({k.replace(".base", ""): v for k, v in model.state_dict().items() if "updates" not in k}, before)
    learned = {k for k, p in model.named_parameters() if p.grad is not None}
    assert learned == {k for k, _ in model.named_parameters() if "updates" in k}


def test_nothing_as_large_as_the_frozen_weight_is_kept_for_the_backward_pass():
    model, sizes = trained(nn.Sequential(nn.Linear(50, 40, bias=False))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 50)).sum().backward()
    assert 0 < max(sizes) < 50 * 40


def test_merged_layers_are_plain_and_merging_is_undone_bit_for_bit():
    model, x = trained(image_net()).eval(), torch.randn(4, 3, 8, 8)
    before, out = copy.deepcopy(model.state_dict()), model(x)
    merge_lora(model)
    assert str(model) == str(image_net())
    assert model.state_dict().keys() == image_net().state_dict().keys()
    refused = (merge_lora, lora_state_dict, lambda m: use_lora(m, "default"), lambda m: add_lora(m, 1, 1.0))
    for call in refused:
        with pytest.raises(RuntimeError, match=r"call unmerge_lora\(model\) first"):
            call(model)
    other = copy.deepcopy(model)
    unmerge_lora(other)
    fit(other, x)
    unmerge_lora(model)
    assert equal(model.state_dict(), before)
    assert torch.equal(model(x), out)


def test_two_adapters_take_turns():
    model, x = trained(mlp()), torch.randn(6, 12)
    with without_lora(model):
        plain = model(x)
    first = model(x)
    add_lora(model, 3, 3.0, "[24]", name="second")
    assert torch.equal(model(x), plain)  # the new one is active, and starts at nothing
    before = copy.deepcopy(lora_state_dict(model))
    fit(model, x)
    second = model(x)
    assert equal(lora_state_dict(model), before)
    use_lora(model, "default")
    assert torch.equal(model(x), first)
    assert not any(p.requires_grad for update in updates(model, "second").values() for p in update.parameters())
    merge_lora(model)
    torch.testing.assert_close(model(x), first)
    unmerge_lora(model)
    use_lora(model, "second")
    assert torch.equal(model(x), second)


def test_an_adapter_alone_is_enough_also_with_a_head_of_its_own(tmp_path):
    torch.manual_seed(0)
    base, x = image_net().eval(), torch.randn(5, 3, 8, 8)
    source, copied = copy.deepcopy(base), copy.deepcopy(base)
    add_lora(source, 2, 0.7, "0")
    source[5].requires_grad_(True)
    fit(source, x)
    torch.save(lora_state_dict(source), tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert state.keys() == {"0.lora_A", "0.lora_B", "0.lora_scale", "5.weight", "5.bias"}
    add_lora(copied, 2, 0.7, "0", name="mine")
    copied[5].requires_grad_(True)
    load_lora_state_dict(copied, state, "mine")
    assert torch.equal(copied(x), source(x))
    add_lora(source, 1, 1.0, name="second")  # beside the first; the head goes on learning, for both
    assert list(updates(source, "second")) == ["0"]
    assert lora_state_dict(source).keys() == state.keys()


def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing():
    model = trained(mlp())
    before = copy.deepcopy(model.state_dict())
    other = {key: value + 1 for key, value in lora_state_dict(model).items() if key != "4.lora_B"}
    with pytest.raises(ValueError, match="no state of adapter 'default'") as caught:
        load_lora_state_dict(model, other | {"0.lora_A": torch.zeros(3, 12), "9.lora_A": torch.zeros(1)})
    problems = [
        "0.lora_A is (3, 12), (2, 12) in the model",
        "4.lora_B is missing, (5, 2)",
        "9.lora_A is (1,), missing",
    ]
    for problem in [*problems, "2.lora_scale is 3, 2 in the model"]:
        assert problem in str(caught.value)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "layer9"}, "fits 'layer9'; there are 0, 2, 4"),
        ({"targets": "1"}, "fits '1'"),  # a ReLU
        ({"rank": 0}, "rank < 1"),
        ({"scaling": "none"}, "unknown scaling"),
        ({"name": "v1.2"}, "name with a dot"),
    ],
)
def test_what_cannot_be_meant_is_an_error_and_nothing_is_changed(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 1, "alpha": 1.0, **options})
    assert all(p.requires_grad for p in model.parameters())
    assert str(model) == str(mlp())


def test_adapters_that_are_there_already_or_are_not():
    model = mlp()
    add_lora(model, 1, 1.0, "[02]")
    with pytest.raises(ValueError, match="an adapter 'default' already"):
        add_lora(model, 1, 1.0)
    with pytest.raises(ValueError, match="no adapter 'third'; there are default"):
        use_lora(model, "third")
    for layer in (nn.Linear(2, 3), nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))):  # no place to wrap it; groups
        with pytest.raises(ValueError, match="there are none"):
            add_lora(layer, 1, 1.0)


def test_start_and_scale():
    model = nn.Sequential(nn.Conv2d(16, 400, 3), nn.Linear(64, 400))
    add_lora(model, 100, 5.0, scaling="rs")
    for update, fan_in in zip(updates(model).values(), (16 * 9, 64), strict=True):
        assert update.scale == 0.5
        assert not update.B.weight.any()
        assert update.A.weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)  # U(±1/√in)
    add_lora(model, 2, 1.0, name="ones", init_a=nn.init.ones_)
    assert all((update.A.weight == 1).all() for update in updates(model, "ones").values())


def test_on_a_gpu_everything_is_made_there():
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, x = image_net(), torch.randn(4, 3, 8, 8)
        add_lora(model, 2, 4.0)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert model(x).device.type == "cuda"
