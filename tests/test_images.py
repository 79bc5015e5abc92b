"""Images: resizing, crops and colours against torchvision, augmentations, batches, and a network's outputs."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdl_utils.images import (
    Augmentation,
    Batches,
    accuracy,
    change_colors,
    color_jitter,
    crop,
    crop_parameters,
    normalize,
    outputs,
    resize,
)
from pdl_utils.resnet import cifar_resnet18

EVERYTHING = Augmentation(flip=True, shift=4, scale=(0.2, 1.0), jitter=0.5, gray=0.2)


def noise(n, side=32, low=0, high=256, width=None, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (n, channels, side, width or side), dtype=torch.uint8, generator=generator)


def assert_within_one(ours, theirs):
    """Equal up to rounding: torchvision rounds or cuts after every step, we round once."""
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_normalize_standardises_bytes_and_grey_becomes_three_channels():
    pixels = noise(2, 4)
    expected = (pixels[0, 1, 2, 3] / 255 - 0.456) / 0.224
    torch.testing.assert_close(normalize(pixels)[0, 1, 2, 3], expected)
    assert normalize(pixels, (0, 0, 0), (1, 1, 1))[0, 1, 2, 3] == pixels[0, 1, 2, 3] / 255
    grey = noise(2, 4, channels=1)
    assert torch.equal(normalize(grey), normalize(grey.expand(-1, 3, -1, -1)))


def a_network():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()


@pytest.mark.parametrize(
    "takes_images",
    [
        normalize, lambda x: resize(x, 16), Augmentation(flip=True), Augmentation(),
        lambda x: color_jitter(x, strength=0.5), lambda x: outputs(a_network(), x, 16),
        lambda x: outputs(a_network(), x),
        lambda x: Batches(images=x, sizes=[16], augment=Augmentation(), batch_size=1),
    ],
)  # fmt: skip
def test_one_guard_names_what_are_no_images_and_the_remedy(takes_images):
    for wrong in (noise(4) / 255, noise(4).long(), noise(4).numpy()):
        with pytest.raises(TypeError, match=r"uint8 in 0\.\.255, not .*\(255 \* images\)\.round"):
            takes_images(wrong)
    for wrong in (noise(4)[0], noise(4).permute(0, 2, 3, 1), noise(4).expand(2, -1, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\), grey .*one image: image\[None\]"):
            takes_images(wrong)
    takes_images(noise(4))
    takes_images(noise(4, channels=1))


@pytest.mark.parametrize("size", [20, 32, 65, (20, 30)])
@pytest.mark.parametrize("width", [32, 48])
def test_resizing_is_that_of_torchvision(size, width):
    images = noise(3, width=width)
    theirs = TF.resize(images, [size] if isinstance(size, int) else list(size), antialias=True)
    assert_within_one(resize(images, size), theirs)


def test_what_is_not_square_stays_so():
    images = noise(40, 32, width=48)
    assert torch.equal(Augmentation()(images), images)
    assert EVERYTHING(images).shape == (40, 3, 32, 48)
    assert EVERYTHING(images, 16).shape == (40, 3, 16, 24)
    assert EVERYTHING(images, (20, 28)).shape == (40, 3, 20, 28)
    ramps = torch.arange(96, dtype=torch.uint8).expand(3, 32, 96), torch.arange(32, dtype=torch.uint8).view(32, 1)
    for ramp, axis in ((ramps[0], 2), (ramps[1].expand(3, 32, 96), 1)):  # a pixel's value: its column, its row
        moved = Augmentation(shift=8)(ramp.expand(400, -1, -1, -1)).float() - ramp
        inside = moved.narrow(axis + 1, 12, 8).flatten(1).mean(1).abs()
        assert 7 < inside.max() <= 8.01
    network = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()).append(nn.Linear(6, 6)).eval()
    torch.testing.assert_close(outputs(network, images), network(normalize(images)))
    torch.testing.assert_close(outputs(network, images, 16), network(normalize(resize(images, (16, 24)))))
    drawn = next(iter(Batches(images=images, sizes=[16], augment=EVERYTHING, batch_size=4)))
    assert drawn[0].shape == (4, 3, 16, 24)


def test_crops_that_shrink_are_smooth_as_evaluation_is():
    images = noise(4, 224)
    apart = Augmentation()(images, 32).float() - resize(images, 32)
    assert apart.abs().mean() < 6  # of noise, box against triangle; single samples are 60 apart
    ramp = torch.arange(224, dtype=torch.uint8).expand(1, 3, 224, 224)
    assert_within_one(Augmentation()(ramp, 32)[..., 1:-1], resize(ramp, 32)[..., 1:-1])


def test_each_change_of_colours_is_that_of_torchvision():
    images = noise(4, 8, 70, 160)  # values that stay inside 0..255, where neither clips
    one, zero = torch.ones(4), torch.zeros(4)
    assert torch.equal(change_colors(images, one, one, one, zero), images)
    pairs = [
        (change_colors(images, 1.3 * one, one, one, zero), TF.adjust_brightness(images, 1.3)),
        (change_colors(images, one, 0.7 * one, one, zero), TF.adjust_contrast(images, 0.7)),
        (change_colors(images, one, one, 0.6 * one, zero), TF.adjust_saturation(images, 0.6)),
        (change_colors(images, one, one, zero, zero), TF.rgb_to_grayscale(images, 3)),
    ]
    for ours, theirs in pairs:
        assert_within_one(ours, theirs)
    together = change_colors(images, 1.2 * one, 0.8 * one, 1.3 * one, zero)
    step_by_step = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(images / 255, 1.2), 0.8), 1.3)
    assert_within_one(together, (255 * step_by_step).round().to(torch.uint8))


def test_a_turned_hue_keeps_grey_and_turns_red_towards_yellow():
    pixels = torch.tensor([[128, 128, 128], [153, 77, 77]], dtype=torch.uint8).view(2, 3, 1, 1)
    angle = torch.full((2,), math.tau / 10)
    gray, red = change_colors(pixels, *torch.ones(3, 2), angle).flatten(1).float()
    assert gray.tolist() == [128, 128, 128]
    chroma = (153 - 77) * (2 / 3) * torch.tensor([0, -1, 1]).mul(math.tau / 3).add(angle[0]).cos()
    torch.testing.assert_close(red, (153 + 77 + 77) / 3 + chroma, atol=0.51, rtol=0)


def test_jitter_and_grey_keep_to_their_share_and_their_strength():
    images = noise(500, 4, 60, 120)
    generator = torch.Generator().manual_seed(0)
    changed = color_jitter(images, strength=0.5, generator=generator)
    assert 0.75 < (changed != images).flatten(1).any(1).float().mean() < 0.85
    gray = color_jitter(images, strength=0.0, gray=0.2, generator=generator)
    flat = (gray[:, 0] == gray[:, 1]).flatten(1).all(1)
    assert 0.15 < flat.float().mean() < 0.25
    assert torch.equal(gray[~flat], images[~flat])
    white = torch.full((500, 3, 1, 1), 100, dtype=torch.uint8)  # contrast, saturation, hue: no effect on it
    brightness = color_jitter(white, strength=0.5, probability=1.0, generator=generator)[:, 0, 0, 0] / 100
    assert 0.6 <= brightness.min() < 0.65
    assert 1.35 < brightness.max() <= 1.4


def test_crops_stay_inside_keep_their_share_and_are_mirrored_half_the_time():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(5, 3, 64, 64)  # a pixel's value: its column
    generator = torch.Generator().manual_seed(0)
    cropped = Augmentation(scale=(0.2, 0.5))(ramp, 32, generator).float()
    assert cropped.shape == (5, 3, 32, 32)
    assert (cropped[:, 0, 0, -1] > cropped[:, 0, 0, 0]).all()
    assert cropped.max() <= 4 * 63
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    assert_within_one(crop(ramp[:1], mirror, 64), ramp[:1].flip(3))
    theta = crop_parameters(2000, scale=(0.2, 0.5), ratio=(1, 1), generator=generator)
    area = theta[:, :, :2].abs().amax(2).prod(1)
    assert area.min() >= 0.2 - 1e-6
    assert area.max() <= 0.5 + 1e-6
    assert 0.45 < (theta[:, 0, 0] < 0).float().mean() < 0.55


def test_no_augmentation_changes_nothing_and_a_shift_is_never_wider():
    images = noise(50)
    assert torch.equal(Augmentation()(images), images)
    ramp = torch.arange(32, dtype=torch.uint8).mul(4).expand(50, 3, 32, 32)
    moved = (Augmentation(shift=4)(ramp).float() - ramp)[:, 0, 16, 16] / 4
    assert 3 < moved.abs().max() <= 4.13


def test_augmentation_follows_from_the_generator():
    images = noise(4)
    first, again, other = (EVERYTHING(images, 24, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (4, 3, 24, 24)
    assert torch.equal(first, again)
    assert ((first.float() - other.float()).abs().flatten(1).mean(1) > 2).all()


def batches(**options):
    defaults = {"sizes": [16, 24], "augment": EVERYTHING, "batch_size": 8, "seed": 3}
    return Batches(images=noise(20), **{**defaults, **options})


def test_batches_hold_every_image_once_and_follow_from_seed_and_epoch():
    labelled = batches(labels=torch.arange(20))
    drawn = [list(labelled(epoch)) for epoch in (0, 0, 1)]
    assert [x.shape for x, _ in drawn[2]] == [(8, 3, 24, 24)] * 2
    rows = [torch.cat([y for _, y in epoch]) for epoch in drawn]
    assert len(rows[0].unique()) == 16  # the incomplete batch is left out
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert torch.equal(drawn[0][1][0], drawn[1][1][0])
    wrong = [
        ({"batch_size": 32}, "20 images make no batch of 32; lower the batch size"),
        ({"batch_size": 0}, "no batch of 0"),
        ({"part": (0, 3)}, "3 processes do not divide a batch of 8"),
        ({"labels": torch.arange(19)}, "20 images have 19 labels"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            batches(**options)


def test_without_labels_a_batch_is_two_views_and_parts_share_it():
    first, second = next(iter(batches()(0)))
    assert first.shape == second.shape == (8, 3, 16, 16)
    assert not torch.equal(first, second)
    labels = torch.arange(20)
    whole = next(iter(batches(labels=labels)(0)))[1]
    parts = [next(iter(batches(labels=labels, part=(k, 2))(0)))[1] for k in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    views = [next(iter(Batches(images=noise(1).expand(8, -1, -1, -1), sizes=[16], augment=EVERYTHING,
                               batch_size=8, part=(k, 2))(0)))[0] for k in (0, 1)]  # fmt: skip
    assert not torch.equal(*views)  # each process augments in its own way


def test_outputs_are_float32_of_the_eval_mode_and_leave_the_model_alone():
    torch.manual_seed(0)
    model, images = cifar_resnet18(5, width=8, stem_stride=2), noise(7)
    with pytest.raises(ValueError, match="train mode"):
        outputs(model, images)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(normalize(images))
    with torch.autocast("cpu", torch.bfloat16):  # somebody else's
        whole = outputs(model, images, batch=3)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_accuracy_counts_what_is_right():
    images = noise(24, high=120)
    labels = torch.arange(24) % 3
    images[torch.arange(24), labels] += 120
    model = a_network()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(3))
        model[2].bias.zero_()
    assert accuracy(model, images, labels) == 1
    assert accuracy(model, images, labels, size=64) == 1
    assert accuracy(model, images, (labels + 1) % 3) == 0


def test_everything_answers_on_the_device_of_the_images():
    """Without a GPU: fake tensors carry a device and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the module's constants are real
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        for answer in (EVERYTHING(images, 24), resize(images, 20), normalize(images)):
            assert answer.device.type == "cuda"
        with torch.device("cuda"):
            model = cifar_resnet18(5, width=8).eval()
        assert outputs(model, images, 24).device.type == "cuda"
