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
    normalize,
    outputs,
    resize,
    share_right,
)

EVERYTHING = Augmentation(flip=True, shift=4, scale=(0.2, 1.0), jitter=0.5, gray=0.2)


def noise(n, height=32, width=32, low=0, high=256, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def ramps(height, width):
    """An image whose red is a pixel's column, and whose green is its row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, rows]).to(torch.uint8)


def batches(**options):
    defaults = {"images": noise(20), "sizes": [16, 24], "augment": EVERYTHING, "batch_size": 8, "seed": 3}
    return Batches(**{**defaults, **options})


def assert_within_one(ours, theirs):
    """Equal up to rounding: torchvision rounds or cuts after every step, we round once."""
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_normalize_standardises_bytes_and_grey_becomes_three_channels():
    pixels, grey = noise(2), noise(2, channels=1)
    expected = (pixels[0, 1, 2, 3] / 255 - 0.456) / 0.224
    torch.testing.assert_close(normalize(pixels)[0, 1, 2, 3], expected)
    assert normalize(pixels, (0, 0, 0), (1, 1, 1))[0, 1, 2, 3] == pixels[0, 1, 2, 3] / 255
    assert torch.equal(normalize(grey), normalize(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    "takes_images",
    [
        normalize, lambda x: resize(x, 16), Augmentation(), lambda x: color_jitter(x, strength=0.5),
        lambda x: outputs(nn.Conv2d(3, 3, 1).eval(), x, 16), lambda x: batches(images=x, batch_size=1),
    ],
)  # fmt: skip
def test_one_guard_names_what_are_no_images_and_the_remedy(takes_images):
    for wrong in (noise(4) / 255, noise(4).numpy()):
        with pytest.raises(TypeError, match=r"uint8 in 0\.\.255, not .*\(255 \* images\)\.round"):
            takes_images(wrong)
    for wrong in (noise(4)[0], noise(4).permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\), grey .*one image: image\[None\]"):
            takes_images(wrong)
    takes_images(noise(4))
    takes_images(noise(4, channels=1))


@pytest.mark.parametrize("size", [20, 65, (20, 30)])
def test_resizing_is_that_of_torchvision(size):
    images = noise(3, 32, 48)
    theirs = TF.resize(images, [size] if isinstance(size, int) else list(size), antialias=True)
    assert_within_one(resize(images, size), theirs)


def test_what_is_not_square_stays_so_and_no_augmentation_changes_nothing():
    images = noise(8, 32, 48)
    assert torch.equal(Augmentation()(images), images)
    for size, shape in {None: (32, 48), 16: (16, 24), (20, 28): (20, 28)}.items():
        assert EVERYTHING(images, size).shape == (8, 3, *shape)


def test_a_shift_is_in_pixels_of_either_side_and_never_wider():
    image = ramps(32, 96)
    moved = Augmentation(shift=8)(image.expand(400, -1, -1, -1)).float() - image
    assert moved[:, :2, 16, 48].abs().amax(0).tolist() == [8, 8]  # in the middle, far from the repeated border


def test_crops_that_shrink_are_smooth_as_evaluation_is():
    images, image = noise(4, 224, 224), ramps(224, 224)[None]
    apart = Augmentation()(images, 32).float() - resize(images, 32)
    assert apart.abs().mean() < 6  # of noise, box against triangle; single samples are 60 apart
    assert_within_one(Augmentation()(image, 32)[..., 1:-1, 1:-1], resize(image, 32)[..., 1:-1, 1:-1])


def test_crops_keep_their_share_and_half_of_them_are_mirrored():
    images = ramps(128, 128).expand(300, -1, -1, -1)
    crops = Augmentation(flip=True, scale=(0.2, 0.5))(images, 32, torch.Generator().manual_seed(0)).float()
    width, height = crops[:, 0, 0, -1] - crops[:, 0, 0, 0], crops[:, 1, -1, 0] - crops[:, 1, 0, 0]
    share = width.abs() * height * (32 / 31) ** 2 / 128**2  # the first pixel's centre to the last one's: 31 of 32
    assert 0.19 < share.min() < 0.22
    assert 0.48 < share.max() < 0.515
    assert 0.7 < (width.abs() / height).min() < 0.8
    assert 0.4 < (width < 0).float().mean() < 0.6


@pytest.mark.parametrize("factors", [(1, 1, 1), (1.3, 1, 1), (1, 0.7, 1), (1, 1, 0.6), (1, 1, 0), (1.2, 0.8, 1.3)])
def test_changed_colours_are_those_of_torchvision(factors):
    images = noise(4, 8, 8, 70, 160)  # values that stay inside 0..255, where neither clips
    brighter = TF.adjust_brightness(images / 255, factors[0])
    theirs = TF.adjust_saturation(TF.adjust_contrast(brighter, factors[1]), factors[2])
    ours = change_colors(images, *torch.tensor(factors)[:, None].expand(3, 4), torch.zeros(4))
    assert_within_one(ours, (255 * theirs).round())


def test_a_turned_hue_keeps_grey_and_turns_red_towards_yellow():
    pixels = torch.tensor([[128, 128, 128], [153, 77, 77]], dtype=torch.uint8).view(2, 3, 1, 1)
    angle = torch.full((2,), math.tau / 10)
    gray, red = change_colors(pixels, *torch.ones(3, 2), angle).flatten(1).float()
    assert gray.tolist() == [128, 128, 128]
    chroma = (153 - 77) * (2 / 3) * torch.tensor([0, -1, 1]).mul(math.tau / 3).add(angle[0]).cos()
    torch.testing.assert_close(red, (153 + 77 + 77) / 3 + chroma, atol=0.51, rtol=0)


def test_jitter_and_grey_keep_to_their_share_and_their_strength():
    images, generator = noise(500, 4, 4, 60, 120), torch.Generator().manual_seed(0)
    changed = color_jitter(images, strength=0.5, generator=generator)
    assert 0.75 < (changed != images).flatten(1).any(1).float().mean() < 0.85
    gray = color_jitter(images, strength=0.0, gray=0.2, generator=generator)
    flat = (gray[:, 0] == gray[:, 1]).flatten(1).all(1)
    assert 0.15 < flat.float().mean() < 0.25
    assert torch.equal(gray[~flat], images[~flat])
    even = torch.full((500, 3, 1, 1), 100, dtype=torch.uint8)  # contrast, saturation, hue: no effect on it
    brightness = color_jitter(even, strength=0.5, generator=generator)[:, 0, 0, 0] / 100
    assert 0.6 <= brightness.min() < 0.65
    assert 1.35 < brightness.max() <= 1.4


def test_batches_hold_every_image_once_and_follow_from_seed_and_epoch():
    labelled = batches(labels=torch.arange(20))
    first, again, other = (list(labelled(epoch)) for epoch in (0, 0, 1))
    assert [x.shape for x, _ in other] == [(8, 3, 24, 24)] * 2
    rows, other_rows = (torch.cat([y for _, y in epoch]) for epoch in (first, other))
    assert len(rows.unique()) == 16  # the incomplete batch is left out
    assert not torch.equal(rows, other_rows)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("20 images make no batch of 32; take a batch size of 1 to 20", {"batch_size": 32}),
        ("20 images make no batch of 0", {"batch_size": 0}),
        ("3 processes do not divide a batch of 8", {"part": (0, 3)}),
        ("20 images have 19 labels", {"labels": torch.arange(19)}),
    ],
)
def test_what_makes_no_batches_is_named(message, options):
    with pytest.raises(ValueError, match=message):
        batches(**options)


def test_without_labels_a_batch_is_two_views_and_parts_share_it():
    alike = noise(1).expand(8, -1, -1, -1)
    first, second = next(iter(batches(images=alike)))
    assert first.shape == second.shape == (8, 3, 16, 16)
    assert not torch.equal(first, second)
    views = [next(iter(batches(images=alike, part=(k, 2))))[0] for k in (0, 1)]
    assert not torch.equal(*views)  # each process augments in its own way
    whole, *parts = (next(iter(batches(labels=torch.arange(20), part=p)))[1] for p in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)


def test_outputs_are_float32_of_the_eval_mode_and_keep_the_shape():
    model, images = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout()).eval(), noise(7, 32, 48)
    model[1].train()
    with pytest.raises(ValueError, match="a part of the model is in train mode"):
        outputs(model, images)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):  # somebody else's
        found, resized = outputs(model, images, batch=3), outputs(model, images, 16)
    torch.testing.assert_close(found, model(normalize(images)))
    torch.testing.assert_close(resized, model(normalize(resize(images, (16, 24)))))


def test_accuracy_counts_what_is_right():
    images, labels = noise(24, high=120), torch.arange(24) % 3
    images[torch.arange(24), labels] += 120
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False)).eval()
    nn.init.eye_(model[2].weight)
    assert accuracy(model, images, labels, size=64) == 1
    labels[:6] += 1
    assert accuracy(model, images, labels) == 0.75
    logits = torch.eye(4)[labels]
    for wrong in [(logits, labels[:, None]), (logits[:, :1], labels), (0 * logits / 0, labels)]:
        with pytest.raises(ValueError, match=r"scores must be \(N, classes\) without NaN"):
            share_right(*wrong)


def test_everything_answers_on_the_device_of_the_images():
    """Without a GPU: fake tensors carry a device and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the module's constants are real
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
        model = nn.Conv2d(3, 3, 1, device="cuda").eval()
        for answer in (EVERYTHING(images, 24), resize(images, 20), normalize(images), outputs(model, images, 24)):
            assert answer.device.type == "cuda"
