"""LoRA: against peft, the frozen network bit for bit, merging, adapters, and what it refuses."""

import copy
import math

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from pdl_utils.few_labels.lora import LoRA, adapter, add_lora, merge_lora


def mlp():
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def image_net():
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, (3, 2), stride=2, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(6 * 3 * 4, 4))


def updates(model):
    """Layer's name → its LoRA."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRA)}


def trained(model):
    """The network with an adapter whose A and B look trained."""
    torch.manual_seed(0)
    add_lora(model, 2, 4.0)
    for layer in updates(model).values():
        nn.init.normal_(layer.A.weight, std=0.3)
        nn.init.normal_(layer.B.weight, std=0.3)
    return model


def fit(model, x):
    """A few steps with weight decay, which would show on any weight that is not left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_close(ours, theirs):
    """Equal but for rounding: relative to the tensor's own size."""
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-14 * theirs.norm()


@pytest.mark.parametrize(
    ("build", "shape", "scaling"), [(mlp, (2, 3, 12), "rs"), (image_net, (4, 3, 8, 8), "standard")]
)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(build, shape, scaling):
    torch.manual_seed(0)
    ours = build().double()
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
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, peer_out = ours(x), theirs(y)
    assert_close(out, peer_out)
    out.square().sum().backward()
    peer_out.square().sum().backward()
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
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
    assert add_lora(model, 1, 1.0) == ["0", "3", "5"]  # and can be adapted again


def test_adapters_take_turns_and_the_frozen_network_comes_back_bit_for_bit():
    """With an adapter come its scale, a head of its own, and batch norm's statistics, which move."""
    torch.manual_seed(0)
    base, x = image_net(), torch.randn(12, 3, 8, 8)
    source, other = copy.deepcopy(base), copy.deepcopy(base)
    add_lora(source, 2, 0.7, "0")
    assert torch.equal(source.eval()(x), base.eval()(x))  # the function is unchanged at first
    source[5].requires_grad_(True)
    start = adapter(source)
    fit(source.train(), x)
    learned = adapter(source)
    frozen = {"0.base.weight", "0.base.bias", "1.weight", "1.bias", "3.weight"}
    assert learned.keys() == source.state_dict().keys() - frozen
    assert {"0.A.weight", "0.B.weight"} < adapter(source.requires_grad_(False)).keys()  # frozen after training
    add_lora(other, 2, 5.0, "0")  # another alpha: the scale is loaded too
    other.load_state_dict(other.state_dict() | learned)
    assert torch.equal(other.eval()(x), source.eval()(x))
    assert not torch.allclose(other(x), base(x))
    other.load_state_dict(other.state_dict() | start)
    merge_lora(other)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in other.state_dict().items())


def test_old_gradients_of_frozen_weights_are_gone():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(9, 12)).sum().backward()
    optimizer.step()
    before = model[0].weight.clone()
    add_lora(model, 2, 1.0)
    optimizer.step()
    assert torch.equal(model[0].base.weight, before)


def test_a_half_precision_layer_has_an_update_of_float32():
    model, x = trained(mlp().to(torch.bfloat16)), torch.randn(9, 12, dtype=torch.bfloat16)
    assert {layer.A.weight.dtype for layer in updates(model).values()} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    wide = copy.deepcopy(model).float()(x.float())
    torch.testing.assert_close(model(x).float(), wide, rtol=0.05, atol=0.05)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x).float(), wide, rtol=0.05, atol=0.05)


def test_modules_that_read_the_weights_of_their_parts_read_the_updated_ones():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = trained(nn.Sequential(nn.Linear(4, 8), block).eval()), torch.randn(2, 5, 4)
    assert list(updates(model)) == ["0", "1.self_attn.out_proj", "1.linear1", "1.linear2"]
    out = model(x)
    out.sum().backward()
    assert all(layer.A.weight.grad.any() for layer in updates(model).values())
    with torch.no_grad():  # in which torch computes the block in one go
        torch.testing.assert_close(model(x), out)
    merge_lora(model)
    torch.testing.assert_close(model(x), out)


class Doubled(nn.Linear):
    """A linear layer with an arithmetic of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register):
    model = mlp()
    getattr(model[0], register)(lambda *_: None)
    return model


REFUSED = [
    (mlp, {"targets": "1"}, "fits '1'; there are 0, 2, 4"),  # a ReLU
    (mlp, {"rank": 2.5}, "rank=2.5.* rank is a whole number from 1 on"),
    (mlp, {"alpha": math.nan}, "alpha a positive number"),
    (mlp, {"scaling": "none"}, "scaling 'standard' or 'rs'"),
    (lambda: nn.Linear(2, 3), {}, "there are none"),  # no place to wrap it
    (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), {}, "there are none"),
    (lambda: nn.Sequential(*2 * [nn.Linear(4, 4)]), {}, r"several names, 0\.weight, 1\.weight"),
    (lambda: nn.Sequential(Doubled(4, 4)), {}, "there are none"),
    (lambda: hooked("register_forward_pre_hook"), {}, "0 is changed in each pass"),
    (lambda: hooked("register_forward_hook"), {}, "0 is changed in each pass"),
    (lambda: nn.Sequential(prune.identity(nn.Linear(2, 3), "weight")), {}, "0 is changed in each pass"),
    (lambda: trained(mlp()), {}, "LoRA layers already"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSED)
def test_what_cannot_be_meant_is_an_error_and_nothing_is_changed(build, options, message):
    model = build()
    learning, layers = [p.requires_grad for p in model.parameters()], str(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 1, "alpha": 1.0, **options})
    assert [p.requires_grad for p in model.parameters()] == learning
    assert str(model) == layers


def test_on_a_gpu_everything_is_made_there():
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, x = image_net(), torch.randn(4, 3, 8, 8)
        add_lora(model, 2, 4.0)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert model(x).device.type == "cuda"
