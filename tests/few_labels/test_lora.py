"""LoRA: against peft, the frozen network bit for bit, merging, adapters, and what it refuses."""

import copy
import math

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune, weight_norm

from pdl_utils.few_labels.lora import LoRA, adapter, add_lora, merge_lora


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def image_net():
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(6 * 3 * 4, 4))


NETWORKS = {"mlp": (mlp, (9, 12)), "tokens": (mlp, (2, 3, 12)), "image": (image_net, (4, 3, 8, 8))}


def updates(model):
    """Layer's name → its LoRA."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRA)}


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
    assert add_lora(ours, 3, 7, scaling=scaling) == layers == list(updates(ours))
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
def test_the_function_is_unchanged_at_first_and_the_frozen_network_comes_back_bit_for_bit(network):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, x = build().eval(), torch.randn(shape)
    plain, before = model(x), copy.deepcopy(model.state_dict())
    add_lora(model, 2, 4.0)
    start = adapter(model)
    assert torch.equal(model(x), plain)
    fit(model.train(), x)
    assert not torch.allclose(model.eval()(x), plain)
    learned = {k for k, p in model.named_parameters() if p.grad is not None}
    assert learned == {k for k, _ in model.named_parameters() if k.endswith((".A.weight", ".B.weight"))}
    model.load_state_dict(start, strict=False)
    assert torch.equal(model(x), plain)
    merge_lora(model)
    assert equal(model.state_dict(), before)


def test_nothing_as_large_as_the_frozen_weight_is_kept_for_the_backward_pass():
    model, sizes = trained(nn.Sequential(nn.Linear(50, 40, bias=False))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 50)).sum().backward()
    assert 0 < max(sizes) < 50 * 40


def test_a_merged_network_is_plain_with_nothing_hidden_in_it():
    model, x = trained(image_net()).eval(), torch.randn(4, 3, 8, 8)
    out, plain = model(x), image_net()
    merge_lora(model)
    torch.testing.assert_close(model(x), out)
    assert str(model) == str(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
    assert add_lora(model, 1, 1.0) == ["0", "3", "5"]  # and can be adapted again


def test_adapters_take_turns_and_bring_scale_head_and_batch_norm_along(tmp_path):
    """Batch norm's statistics move in training although they are no parameters."""
    torch.manual_seed(0)
    base, x = image_net(), torch.randn(12, 3, 8, 8)
    source, other = copy.deepcopy(base), copy.deepcopy(base)
    add_lora(source, 2, 0.7, "0")
    source[5].requires_grad_(True)
    start = adapter(source)
    fit(source.train(), x)
    torch.save(adapter(source), tmp_path / "adapter.pt")
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    frozen = {"0.base.weight", "0.base.bias", "1.weight", "1.bias", "3.weight"}
    assert saved.keys() == source.state_dict().keys() - frozen
    add_lora(other, 2, 5.0, "0")  # another alpha: the scale is loaded too
    assert not other.load_state_dict(saved, strict=False).unexpected_keys
    assert torch.equal(other.eval()(x), source.eval()(x))
    other.load_state_dict(start, strict=False)
    assert torch.equal(other(x), base.eval()(x))
    add_lora(base, 3, 0.7, "0")
    with pytest.raises(RuntimeError, match="size mismatch"):
        base.load_state_dict(saved, strict=False)


def test_old_gradients_of_frozen_weights_are_gone():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(9, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(x).sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    add_lora(model, 2, 1.0)
    optimizer.step()
    assert equal({k.replace(".base", ""): v for k, v in model.state_dict().items() if ".base" in k}, before)


def test_a_half_precision_layer_has_an_update_of_float32():
    torch.manual_seed(0)
    model, x = trained(mlp().to(torch.bfloat16)), torch.randn(9, 12, dtype=torch.bfloat16)
    assert {layer.A.weight.dtype for layer in updates(model).values()} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    wide = copy.deepcopy(model).float()(x.float())
    torch.testing.assert_close(model(x).float(), wide, rtol=0.05, atol=0.05)
    model[0].A.weight.data.add_(1e-4)  # far below what bfloat16 resolves
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x).float(), wide, rtol=0.05, atol=0.05)


def test_attention_modules_are_left_out_and_what_is_adapted_is_named():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.Sequential(nn.Linear(4, 8), block, nn.MultiheadAttention(8, 2), nn.Linear(8, 3)),
        torch.randn(2, 5, 4),
    )
    assert add_lora(model, 2, 1.0) == ["0", "3"]
    with torch.no_grad():
        assert model.eval()[1](model[0](x)).shape == (2, 5, 8)
    with pytest.raises(ValueError, match="there are none"):
        add_lora(block, 2, 1.0)


def shared_layer():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied_weight():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    model[1].weight = model[0].weight
    return model


def pruned():
    model = mlp()
    prune.random_unstructured(model[2], "weight", amount=0.5)
    return model


def hooked():
    model = mlp()
    model[2].register_forward_pre_hook(lambda layer, inputs: layer.weight.data.clamp_(-1, 1) and None)
    return model


REFUSED = [
    (mlp, {"targets": "layer9"}, "fits 'layer9'; there are 0, 2, 4"),
    (mlp, {"targets": ""}, "fits ''; there are 0, 2, 4"),
    (mlp, {"targets": "1"}, "fits '1'"),  # a ReLU
    (mlp, {"rank": 0}, "rank is a whole number from 1 on"),
    (mlp, {"rank": 2.5}, "rank=2.5"),
    (mlp, {"alpha": math.nan}, "alpha a positive number"),
    (mlp, {"scaling": "none"}, "scaling 'standard' or 'rs'"),
    (lambda: nn.Linear(2, 3), {}, "there are none"),  # no place to wrap it
    (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), {}, "there are none"),
    (shared_layer, {}, r"several names, 0\.weight, 2\.weight"),
    (tied_weight, {}, r"several names, 0\.weight, 1\.weight"),
    (pruned, {}, "the weight of 2 is made anew"),
    (hooked, {}, "the weight of 2 is made anew"),
    (lambda: nn.Sequential(weight_norm(nn.Linear(2, 3))), {}, "the weight of 0 is made anew"),
    (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3))), {}, "the weight of 0 is made anew"),
    (lambda: trained(mlp()), {}, "LoRA layers already"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(("build", "options", "message"), REFUSED)
def test_what_cannot_be_meant_is_an_error_and_nothing_is_changed(build, options, message):
    model = build()
    learning, layers = [p.requires_grad for p in model.parameters()], str(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 1, "alpha": 1.0, **options})
    assert [p.requires_grad for p in model.parameters()] == learning
    assert str(model) == layers


def test_start_and_scale():
    model = nn.Sequential(nn.Conv2d(16, 400, 3), nn.Linear(64, 400))
    add_lora(model, 100, 5.0, scaling="rs")
    for layer, fan_in in zip(updates(model).values(), (16 * 9, 64), strict=True):
        assert layer.scale == 0.5
        assert not layer.B.weight.any()
        assert layer.A.weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)  # U(±1/√in)


def test_on_a_gpu_everything_is_made_there():
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, x = image_net(), torch.randn(4, 3, 8, 8)
        add_lora(model, 2, 4.0)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert model(x).device.type == "cuda"
