"""SimCLR: the loss against lightly's, its edge cases, the views, kNN, and pretraining that learns, resumes and
runs on two processes."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from lightly.loss import NTXentLoss
from torch import nn

from pdl_utils import images as augment
from pdl_utils.data_parallel import data_parallel, process_group, rank_and_world
from pdl_utils.evaluation import knn_accuracy, outputs
from pdl_utils.few_labels.simclr import SimCLR, cifar_encoder, nt_xent_loss, two_views
from pdl_utils.images import Augmentation, color_jitter
from pdl_utils.resnet import cifar_resnet18
from scripts import pretrain_simclr


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(2, 3), (8, 16), (33, 5)])
def test_the_loss_and_its_gradient_equal_those_of_lightly(shape, temperature):
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [z.detach().clone().requires_grad_() for z in ours]
    loss, peer = nt_xent_loss(*ours, temperature), NTXentLoss(temperature)(*theirs)
    torch.testing.assert_close(loss, peer, rtol=1e-12, atol=0)
    loss.backward()
    peer.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_the_loss_by_hand():
    """Two images whose views agree perfectly and are orthogonal to each other: e^(1/t) / (e^(1/t) + 2)."""
    z = torch.eye(2)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert nt_xent_loss(3 * z, 7 * z, 0.5).item() == pytest.approx(expected, rel=1e-6)  # length is no matter


def test_nobody_is_its_own_negative_or_positive():
    """With one image the only other embedding is the right answer: the loss is 0 whatever it is."""
    torch.manual_seed(0)
    assert nt_xent_loss(torch.randn(1, 4), torch.randn(1, 4)).item() == pytest.approx(0, abs=1e-6)


def test_uninformed_embeddings_score_log_of_the_number_of_others():
    z = torch.ones(10, 4)
    assert nt_xent_loss(z, z, 0.2).item() == pytest.approx(math.log(19), rel=1e-5)


def test_the_loss_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    z = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent_loss(z[0], z[1], 0.1)
        half = nt_xent_loss(z[0].bfloat16(), z[1].bfloat16(), 0.1)
    assert inside.dtype == half.dtype == torch.float32
    assert inside.item() == nt_xent_loss(z[0], z[1], 0.1).item()
    assert half.item() == pytest.approx(inside.item(), rel=2e-2)


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_views_that_do_not_match_are_refused(shapes):
    with pytest.raises(ValueError, match="two views of the same images"):
        nt_xent_loss(*map(torch.zeros, shapes))


def test_colors_change_as_torchvision_changes_them(monkeypatch):
    """With one ingredient fixed at a time; values that stay inside 0..1, where neither clips."""
    torch.manual_seed(0)
    images = 0.3 + 0.3 * torch.rand(4, 3, 8, 8)
    draws = iter([])
    monkeypatch.setattr(augment.torch, "rand", lambda n, generator=None: torch.full((n,), next(draws)))

    def jitter(brightness=1.0, contrast=1.0, saturation=1.0, gray=False):
        # color_jitter draws the three factors, the angle, who is jittered, and who is grey.
        factors = [(f - 1) / 0.4 / 2 + 0.5 for f in (brightness, contrast, saturation)]
        nonlocal draws
        draws = iter([*factors, 0.5, 0.0, 0.0 if gray else 1.0])
        return color_jitter(images, strength=0.5, gray=0.5)

    torch.testing.assert_close(jitter(), images)
    torch.testing.assert_close(jitter(brightness=1.3), TF.adjust_brightness(images, 1.3))
    torch.testing.assert_close(jitter(contrast=0.7), TF.adjust_contrast(images, 0.7), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(jitter(saturation=0.6), TF.adjust_saturation(images, 0.6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(jitter(gray=True), TF.rgb_to_grayscale(images, 3), rtol=1e-3, atol=1e-3)
    together = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(images, 1.2), 0.8), 1.3)
    torch.testing.assert_close(jitter(1.2, 0.8, 1.3), together, rtol=2e-3, atol=2e-3)


def test_a_turned_hue_keeps_grey_and_turns_red_towards_yellow(monkeypatch):
    draws = iter([0.5, 0.5, 0.5, 1.0, 0.0, 1.0])  # the angle alone: a tenth of a turn
    monkeypatch.setattr(augment.torch, "rand", lambda n, generator=None: torch.full((n,), next(draws)))
    pixels = torch.tensor([[0.5, 0.5, 0.5], [0.6, 0.3, 0.3]]).view(2, 3, 1, 1)
    gray, red = color_jitter(pixels, strength=0.5).flatten(1)
    torch.testing.assert_close(gray, torch.full((3,), 0.5))
    angle = math.tau / 10
    chroma = (0.6 - 0.3) * (2 / 3) * torch.tensor([0, -1, 1]).mul(math.tau / 3).add(angle).cos()
    torch.testing.assert_close(red, 0.4 + chroma)


def test_gray_and_jitter_keep_to_their_share():
    images = torch.rand(500, 3, 4, 4)
    changed = color_jitter(images, strength=0.5, generator=torch.Generator().manual_seed(0))
    assert 0.75 < ((changed - images).abs() > 1e-4).flatten(1).any(1).float().mean() < 0.85
    gray = color_jitter(images, strength=0.0, gray=0.2, generator=torch.Generator().manual_seed(0))
    flat = (gray[:, 0] - gray[:, 1]).abs().flatten(1).amax(1) < 1e-6
    assert 0.15 < flat.float().mean() < 0.25
    torch.testing.assert_close(gray[~flat], images[~flat])


def test_augmentations():
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Augmentation()(images), images / 255, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    moved = Augmentation(shift=4)(images) * 255
    inner = images[:, :, 8:24, 8:24].float()
    assert not torch.allclose(moved[:, :, 8:24, 8:24], inner, atol=1)  # it did move, but never further than 4
    ramp = torch.arange(32, dtype=torch.uint8).mul(4).expand(50, 3, 32, 32)
    step = (Augmentation(shift=4)(ramp) * 255 - ramp)[:, 0, 16, 16] / 4
    assert 3 < step.abs().max() <= 4 + 1e-4
    flipped = Augmentation(flip=True)(ramp)[:, 0, 0, 0] > 0.2
    assert 10 < flipped.sum() < 40


def test_views_differ_from_each_other_and_follow_from_the_generator():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    first, second = two_views(images, generator=torch.Generator().manual_seed(0))
    again, _ = two_views(images, generator=torch.Generator().manual_seed(0))
    assert first.shape == (4, 3, 32, 32)
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(first, again)
    assert ((first - second).abs().flatten(1).mean(1) > 0.01).all()
    assert two_views(images, 24)[0].shape == (4, 3, 24, 24)


def test_the_small_resnet_is_that_of_torchvision_behind_another_stem():
    """The same weights give the same features, once torchvision's stem is exchanged."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    ours, theirs = cifar_resnet18(7).eval(), resnet18(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    small = cifar_resnet18(width=16, stem_stride=2)
    assert small.fc.in_features == 128
    assert small[:4](x).shape == (2, 16, 16, 16)


def test_features_are_those_of_the_eval_mode_and_the_encoder_is_left_alone():
    encoder, features = cifar_encoder(16, 2)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="train mode"):
        outputs(encoder, images)
    encoder.eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    whole, pieces = outputs(encoder, images), outputs(encoder, images, batch=2)
    assert whole.shape == (7, features)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, pieces, rtol=0.05, atol=0.05)  # bfloat16
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_knn_accuracy():
    bank = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 1, 1])
    queries = torch.tensor([[5.0, 0.5], [0.2, 3], [1, 0]])
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 1]), k=2) == pytest.approx(2 / 3)


def tiny_model():
    """No batch norm: its statistics are those of a process's own images."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = SimCLR(encoder, 8, projection=4, temperature=0.3)
    model.projector[1] = nn.Identity()
    return model


def images_and_labels(count=64):
    """Two kinds of image: reddish noise, and stripes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    stripes = torch.arange(32).remainder(8).ge(4).mul(200).to(torch.uint8).expand(3, 32, 32)
    noise[labels == 1] = noise[labels == 1] // 8 + stripes
    return noise, labels


def parallel_run(state_file):
    images, labels = images_and_labels(32)
    pretrain_simclr.pretrain(
        tiny_model(), images, labels, [16, 24], batch_size=8, bank=16, queries=8, autocast=False,
        checkpoint=state_file, progress=False,
    )  # fmt: skip


def parallel_loss(file):
    """Loss and gradients of one joint batch; every process gets its share of the rows."""
    rank, world = rank_and_world()
    views = torch.rand(2, 12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = data_parallel(tiny_model())
    loss = network(views[:, rank::world])
    loss.backward()
    joint = loss.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(joint)
    if rank == 0:
        gradients = [p.grad for p in network.parameters()]
        torch.save([joint / world, *gradients], file)


def main(folder):
    """What torchrun starts, twice."""
    with process_group():
        parallel_loss(folder / "two_loss.pt")
        parallel_run(folder / "two_run.pt")


def test_two_processes_have_the_loss_the_gradients_and_the_training_of_one(tmp_path):
    parallel_loss(tmp_path / "one_loss.pt")
    parallel_run(tmp_path / "one_run.pt")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__, tmp_path],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    one, two = (torch.load(tmp_path / f"{n}_loss.pt", weights_only=True) for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    one, two = (torch.load(tmp_path / f"{n}_run.pt", weights_only=True) for n in ("one", "two"))
    assert [row["epoch"] for row in two["history"]] == [1, 2]
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-4, atol=1e-5)


def test_batches_leave_out_the_incomplete_one_and_refuse_to_be_none():
    images, labels = images_and_labels(20)
    batches = pretrain_simclr.ViewBatches(images=images, resolutions=[16], batch_size=8, seed=0)
    assert [len(first) for first, _ in batches(0)] == [8, 8]
    with pytest.raises(ValueError, match="20 images make no batch of 32; lower the batch size"):
        pretrain_simclr.pretrain(simclr_of_width_16(), images, labels, [16], batch_size=32, progress=False)


def simclr_of_width_16():
    torch.manual_seed(0)
    return SimCLR(*cifar_encoder(16, 2), temperature=0.2)


def test_pretraining_learns_and_the_labels_are_only_watched():
    images, labels = images_and_labels()
    runs = []
    for watched in (labels, 1 - labels):
        model = simclr_of_width_16()
        history = pretrain_simclr.pretrain(
            model, images, watched, [32] * 4, batch_size=16, lr=0.05, bank=40, queries=24, progress=False
        )
        runs.append((history, model.state_dict()))
    (history, weights), (_, others) = runs
    assert history["loss"][-1] < history["loss"][0]
    assert history["knn"][-1] > 0.9
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_killed_it_resumes_to_the_same_weights(tmp_path):
    images, labels = images_and_labels(32)

    def run(file, stop_after=None):
        model = simclr_of_width_16()
        pretrain_simclr.pretrain(
            model, images, labels, [16, 24, 32], batch_size=16, bank=16, queries=8,
            checkpoint=tmp_path / file, stop_after=stop_after, progress=False,
        )  # fmt: skip
        return model.state_dict()

    whole = run("whole.pt")
    run("pieces.pt", stop_after=1)
    pieces = run("pieces.pt")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_the_program_ships_an_encoder_and_goes_on_from_it(tmp_path, monkeypatch, capsys):
    from pdl_utils.few_labels import simclr

    images, labels = images_and_labels(48)
    data = pretrain_simclr.LabelledImages(
        images, labels, images[:8], labels[:8], ["noise", "stripes"], pretrain_simclr.cifar10().provenance
    )
    monkeypatch.setattr(pretrain_simclr, "cifar10", lambda: data)
    monkeypatch.setattr(simclr, "CHECKPOINTS", tmp_path)
    small = ["--width", "16", "--batch-size", "16"]
    pretrain_simclr.main(
        ["--run", str(tmp_path / "run"), "--export", str(tmp_path), "--schedule", "24x1,32x1", *small]
    )
    assert "kNN accuracy" in capsys.readouterr().out
    encoder, provenance, facts = simclr.pretrained_encoder()
    assert facts["width"] == 16
    assert len(facts["knn"]) == 2
    assert "48 training images without labels" in str(provenance)
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, trained[f"encoder.{name}"], rtol=1e-3, atol=1e-3)

    # Without a learning rate it ends where it starts: from the state with its projection, from the file without.
    same = {}
    for start in (tmp_path / "run" / "last.pt", tmp_path / simclr.FILE):
        run = tmp_path / f"from_{start.suffix}"
        still = ["--schedule", "24x1", "--lr", "0", "--seed", "1"]
        pretrain_simclr.main(["--run", str(run), "--start-from", str(start), *still, *small])
        ended = torch.load(run / "last.pt", weights_only=True)["model"]
        first = "encoder.conv1.weight"
        torch.testing.assert_close(ended[first], trained[first], rtol=1e-3, atol=1e-3)
        same[start.suffix] = torch.equal(ended["projector.0.weight"], trained["projector.0.weight"])
    assert same == {".pt": True, ".safetensors": False}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
