"""LoRA: against peft, the base bit for bit, merging, several adapters, saving, and what it refuses."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)).to(dtype)


def conv_net(dtype=torch.float32):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (3, 2), stride=2, bias=False), nn.ReLU(),
        nn.Conv2d(6, 7, 1), nn.Flatten(), nn.Linear(7 * 3 * 4, 4),
    ).to(dtype)  # fmt: skip


NETWORKS = {"mlp": (mlp, (9, 12)), "tokens": (mlp, (2, 3, 12)), "conv": (conv_net, (4, 3, 8, 8))}


def adapters(model, name="default"):
    """Layer's name → its LoRA of this name."""
    return {
        layer.partition(".parametrizations")[0]: m
        for layer, m in model.named_modules()
        if isinstance(m, LoRA) and m.name == name
    }


def disturb(model, std=0.3):
    """As if trained: no A or B at its start."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return model


def trained(build=mlp, seed=0, **options):
    torch.manual_seed(seed)
    model = build()
    add_lora(model, 2, 4.0, **options)
    return disturb(model)


def fit(model, x, steps=3):
    """A few steps with weight decay, which would show on any weight that is not left out."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def close(ours, theirs):
    """Equal but for rounding: relative to the tensor's own size."""
    bound = 1e-14 if theirs.dtype == torch.float64 else 1e-6
    assert (ours - theirs).norm() <= bound * theirs.norm()
    assert theirs.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scaling", ["standard", "rs"])
@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(network, scaling, dtype):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    ours = build(dtype)
    layers = [name for name, m in ours.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=scaling == "rs", target_modules=layers)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(ours))
    add_lora(ours, 3, 7, scaling=scaling)
    disturb(ours)
    assert list(adapters(ours)) == layers
    pairs = []
    for name, lora in adapters(ours).items():
        peer = theirs.get_submodule(name)
        pairs += [(lora.A, peer.lora_A["default"].weight), (lora.B, peer.lora_B["default"].weight)]
        for mine, yours in pairs[-2:]:
            yours.data.copy_(mine.detach().view_as(yours))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, peer_out = ours(x), theirs(y)
    close(out, peer_out)
    target = torch.randn_like(out)
    (out - target).square().sum().backward()
    (peer_out - target).square().sum().backward()
    close(x.grad, y.grad)
    for mine, yours in pairs:
        close(mine.grad, yours.grad.view_as(mine))
    merge_lora(ours)
    for name in layers:
        theirs.get_submodule(name).merge()
        close(ours.get_submodule(name).weight, theirs.get_submodule(name).base_layer.weight)


def test_parameters_of_the_paper_sized_mlp_at_rank_1():
    model = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 5))
    add_lora(model, 1, 1.0)
    counts = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(counts) == 784 + 1000 + 1000 + 2000 + 2000 + 5 == 6789


@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_is_unchanged_at_first_and_the_base_for_good(network):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    model, x = build(), torch.randn(shape)
    plain, before = model(x), copy.deepcopy(model.state_dict())
    add_lora(model, 2, 4.0)
    assert torch.equal(model(x), plain)
    fit(model, x)
    assert not torch.allclose(model(x), plain)
    with without_lora(model):
        assert torch.equal(model(x), plain)
        with without_lora(model):
            pass
        assert torch.equal(model(x), plain)
    changed = model(x)
    with pytest.raises(ZeroDivisionError), without_lora(model):
        _ = 1 / 0
    assert torch.equal(model(x), changed)
    assert not torch.allclose(changed, plain)
    for key, value in model.state_dict().items():
        if not key.endswith((".A", ".B")):
            assert torch.equal(value, before.pop(key.replace("parametrizations.weight.original", "weight")))
    assert not before
    assert {k for k, p in model.named_parameters() if p.grad is not None} == {
        k for k, _ in model.named_parameters() if k.endswith((".A", ".B"))
    }


def test_the_base_has_no_weight_gradient_in_the_graph():
    """The reason for the lazy weight: nothing of W's size is computed backward."""
    model = nn.Linear(50, 40, bias=False)
    add_lora(model, 2, 1.0)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 50)).sum().backward()
    assert sizes
    assert max(sizes) < 50 * 40
    assert model.parametrizations.weight.original.grad is None


def test_a_weight_that_is_looked_at_is_the_updated_one():
    model = trained()
    layer, lora = model[0], adapters(model)["0"]
    expected = layer.parametrizations.weight.original + 2.0 * lora.B @ lora.A
    assert layer.weight.shape == (20, 12)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer.weight + 0, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.weight.T @ layer.weight, expected.T @ expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.weight.clone(), expected, rtol=0, atol=1e-6)
    layer.weight.sum().backward()
    assert lora.B.grad.norm() > 0
    x = torch.randn(3, 12)
    torch.testing.assert_close(F.linear(input=x, weight=layer.weight), F.linear(x, expected))
    torch.testing.assert_close(F.linear(x, layer.weight), F.linear(x, expected))
    torch.testing.assert_close(F.linear(layer.weight, x), F.linear(expected, x))
    torch.testing.assert_close(F.linear(layer.weight, layer.weight), F.linear(expected, expected))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4, stride=2),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Conv3d(4, 5, 2),
        nn.Linear(9, 3),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'groups', '')}",
)
def test_a_layer_computes_what_its_weight_says(layer):
    x = torch.randn(2, *[4, 9, 9, 9][: layer.weight.ndim - 1]) if layer.weight.ndim > 2 else torch.randn(2, 9)
    add_lora(layer, 2, 4.0)  # a model that is a layer
    disturb(layer)
    assert set(lora_state_dict(layer)) == {"lora_A", "lora_B", "lora_scale"}
    out = layer(x)
    merge_lora(layer)
    torch.testing.assert_close(out, layer(x))


def test_merging_is_explicit_exact_and_undone_bit_for_bit():
    model, x = trained(conv_net), torch.randn(4, 3, 8, 8)
    model.train()
    before, out = copy.deepcopy(model.state_dict()), model(x)
    model.eval()
    assert equal(model.state_dict(), before)  # no merging here
    merge_lora(model)
    assert equal(copy.deepcopy(model).state_dict(), model.state_dict())
    assert {type(m) for m in model} == {nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}
    assert type(model[0].weight) is nn.Parameter
    assert model.state_dict().keys() == conv_net().state_dict().keys()
    torch.testing.assert_close(model(x), out)
    again = copy.deepcopy(model)
    for network in (model, again):
        unmerge_lora(network)
        assert equal(network.state_dict(), before)
        assert torch.equal(network(x), out)
        network.train()
    assert "'default', rank=2, scale=2" in str(model)
    merge_lora(again)
    assert torch.equal(model(x), out)  # nothing shared with its copy


def test_merged_it_refuses_what_would_go_wrong():
    model = trained()
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge_lora(model)
    merge_lora(model)
    state, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    refused = [
        lambda: merge_lora(model), lambda: use_lora(model, "default"), model.train, copied.train,
        lambda: without_lora(model).__enter__(), lambda: add_lora(model, 1, 1.0, name="b"),
        lambda: lora_state_dict(model), lambda: load_lora_state_dict(model, {}),
    ]  # fmt: skip
    for call in refused:
        with pytest.raises(RuntimeError, match=r"call unmerge_lora\(model\) first"):
            call()
    assert equal(model.state_dict(), state)
    assert not model.eval().training
    unmerge_lora(model)
    assert model.train().training
    with pytest.raises(RuntimeError, match="merged"):
        copied.train()


def test_unmerging_follows_a_model_that_moved():
    model = trained()
    before = copy.deepcopy(model).double().state_dict()
    merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert equal(model.state_dict(), before)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_two_adapters_take_turns():
    model, x = trained(), torch.randn(6, 12)
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
    assert {p.requires_grad for m in adapters(model, "second").values() for p in m.parameters()} == {False}
    merge_lora(model)
    torch.testing.assert_close(model(x), first)
    unmerge_lora(model)
    use_lora(model, "second")
    assert torch.equal(model(x), second)
    with pytest.raises(ValueError, match="no adapter 'third'; there are default, second"):
        use_lora(model, "third")


def head_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def test_an_adapter_alone_is_enough_also_with_a_head_of_its_own(tmp_path):
    torch.manual_seed(0)
    base, x = head_net().eval(), torch.randn(5, 3, 8, 8)
    source, copied = copy.deepcopy(base), copy.deepcopy(base)
    add_lora(source, 2, 0.7, train=("4", "1"))
    assert list(adapters(source)) == ["0"]
    source.train()
    fit(source, x)
    torch.save(lora_state_dict(source), tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    batch_norm = {f"1.{key}" for key in base[1].state_dict()}
    assert state.keys() == {"0.lora_A", "0.lora_B", "0.lora_scale", "4.weight", "4.bias"} | batch_norm
    add_lora(copied, 2, 0.7, name="mine", train=("4", "1"))
    load_lora_state_dict(copied, {k: v.half() for k, v in state.items()}, "mine")  # as a small file
    torch.testing.assert_close(copied(x), source.eval()(x), rtol=2e-2, atol=2e-2)
    load_lora_state_dict(copied, state, "mine")
    assert torch.equal(copied(x), source(x))


def test_a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing():
    model = trained()
    state = copy.deepcopy(lora_state_dict(model))
    before = copy.deepcopy(model.state_dict())
    other = {key: value + 1 for key, value in state.items() if key != "4.lora_B"}
    other |= {"0.lora_A": torch.zeros(3, 12), "9.lora_A": torch.zeros(1)}
    with pytest.raises(ValueError, match="no state of adapter 'default'") as caught:
        load_lora_state_dict(model, other)
    for problem in (
        r"0.lora_A is (3, 12), (2, 12) in the model", "4.lora_B is missing", "9.lora_A is unexpected",
        "2.lora_scale is 3, 2 in the model",
    ):  # fmt: skip
        assert problem in str(caught.value)
    assert equal(model.state_dict(), before)
    with pytest.raises(ValueError, match="no adapter 'other'; there are default"):
        load_lora_state_dict(model, state, "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "layer9"}, "fits 'layer9'; there are 0, 2, 4"),
        ({"targets": ["0", "1"]}, "fits '1'"),  # a ReLU
        ({"targets": "0", "train": "0"}, "fits '0'; there are 2, 4"),
        ({"targets": []}, "no targets"),
        ({"train": "head"}, "fits 'head'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"scaling": "none"}, "scaling 'standard' or 'rs'"),
    ],
)
def test_what_cannot_be_meant_is_an_error_and_nothing_is_frozen(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 1, "alpha": 1.0, **options})
    assert all(p.requires_grad for p in model.parameters())
    assert not adapters(model)


def test_adding_twice_and_merging_nothing_are_errors():
    model = mlp()
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(model)
    add_lora(model, 1, 1.0, "2")
    with pytest.raises(ValueError, match="layer '2' has an adapter 'default' already"):
        add_lora(model, 1, 1.0)
    assert list(adapters(model)) == ["2"]
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="'0' is parametrized by something else"):
        add_lora(model, 1, 1.0, "0")


def test_patterns_choose_layers():
    model = nn.ModuleDict({"body": mlp(), "side": mlp()})
    add_lora(model, 1, 1.0, ["body.*", "side.4"])
    assert list(adapters(model)) == ["body.0", "body.2", "body.4", "side.4"]


def test_start_and_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 400, 3), nn.Linear(64, 400))
    add_lora(model, 100, 5.0, scaling="rs")
    for lora, fan_in in zip(adapters(model).values(), (16 * 9, 64), strict=True):
        assert lora.scale == 0.5
        assert not lora.B.any()
        assert lora.A.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)  # U(±1/√in)
    add_lora(model, 2, 1.0, name="ones", init_a=nn.init.ones_)
    assert all((lora.A == 1).all() for lora in adapters(model, "ones").values())


def test_a_copy_learns_on_its_own():
    model, x = trained(), torch.randn(6, 12)
    out, other = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), out)
    fit(other, x)
    assert torch.equal(model(x), out)
    assert not torch.allclose(other(x), out)


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast(network):
    build, shape = NETWORKS[network]
    model, x = trained(build), torch.randn(shape)
    out = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16
    assert (half - out).norm() < 0.03 * out.norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
