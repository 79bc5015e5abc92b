"""The pretraining programs on a few images: they learn, resume and ship, and two processes do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet34

from pdl_utils.datasets import LabelledImages, Provenance, TinyImageNet
from pdl_utils.few_labels import simclr
from pdl_utils.images import outputs
from pdl_utils.resnet import own_network
from pdl_utils.settings import REPOSITORY, data_root
from pdl_utils.weights import load_weights
from scripts import pretrain_resnet, pretrain_simclr
from scripts.common import data_parallel, process_group, rank_and_world, schedule


def few_images(count, side):
    """Bright images of class 0 in turn with dark ones of class 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 1] //= 8
    return images, labels


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    for name, value in {"PDL_OFFLINE": "1", "PDL_PROGRESS": "0", "PDL_DATA": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    images, labels = few_images(48, 32)
    origin, classes = Provenance("few", "48 images"), ["bright, light", "dark"]
    tiny = TinyImageNet(images, labels, torch.zeros(48, 4), ["n1", "n2"], classes, origin)
    monkeypatch.setattr(pretrain_resnet, "tiny_imagenet", lambda split: tiny)
    monkeypatch.setattr(pretrain_resnet, "RESOLUTIONS", (32,))
    few = LabelledImages(images, labels, images[:8], labels[:8], classes, origin)
    monkeypatch.setattr(pretrain_simclr, "cifar10", lambda: few)


def train_resnet(*more):
    options = ["--arch", "resnet18", "--batch-size", "8", "--resolution", "32", "--lr", "0.05", *more]
    pretrain_resnet.main(options)


def kept():
    """The states of trainings, oldest first."""
    files = sorted((data_root() / "runs").glob("*.pt"), key=lambda file: file.stat().st_mtime)
    return [torch.load(file, weights_only=True) for file in files]


def test_a_resnet_learns_ships_and_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "out"
    train_resnet("--schedule", "32x2,40x1", "--export", str(out))
    monkeypatch.setattr("pdl_utils.resnet.CHECKPOINTS", out)
    network = own_network("resnet18")
    assert network.categories == ["bright", "dark"]
    shipped = out / "resnet18_tiny_imagenet.safetensors"
    _, facts = load_weights(shipped)
    assert facts["recipe"]["schedule"] == [32, 32, 40]
    assert facts["top1"]["32"] > 0.9
    assert facts["data"] == "few (48 images)"
    more = ["--schedule", "32x1", "--start-from", str(shipped)]
    x = torch.randn(2, 3, 32, 32)
    for arch in ("resnet18", "resnet34"):  # goes on as it is, or grows
        model = pretrain_resnet.build(pretrain_resnet.parse(["--arch", arch, *more]), 2).eval()
        torch.testing.assert_close(model(x), network.model.eval()(x), rtol=1e-3, atol=1e-3)
    train_resnet(*more, "--export", str(out))
    _, again = load_weights(shipped)
    assert again["epochs"] == len(again["loss"]) == 4
    assert again["recipe"]["started_from"] == facts["recipe"]


def test_killed_it_goes_on_to_the_same_weights_and_another_recipe_starts_anew(monkeypatch, tmp_path):
    train_resnet("--schedule", "32x2")
    (whole,) = kept()
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "other"))
    accuracy, calls = pretrain_resnet.accuracy, []

    def killed_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*arguments)

    monkeypatch.setattr(pretrain_resnet, "accuracy", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_resnet("--schedule", "32x2")
    assert len(kept()[0]["history"]) == 1
    train_resnet("--schedule", "32x2")
    assert len(calls) == 3
    assert all(torch.equal(weight, kept()[0]["model"][name]) for name, weight in whole["model"].items())
    train_resnet("--schedule", "32x1,40x1")
    assert len(kept()) == 2


def test_a_grown_network_computes_what_the_small_one_does_and_its_new_blocks_can_learn():
    torch.manual_seed(0)
    small, large = resnet18(num_classes=7).eval(), resnet34(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    pretrain_resnet.grow_depth(small, large)
    torch.testing.assert_close(large(x), small(x))
    large.train()(x).sum().backward()
    assert large.layer3[4].bn2.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="cannot grow"):
        pretrain_resnet.grow_depth(large, small)


def test_schedules():
    assert schedule("64x2,96x1") == [64, 64, 96]
    with pytest.raises(Exception, match="write size x epochs"):
        schedule("64")


def test_simclr_ships_an_encoder_and_a_second_cycle_adds_its_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "CHECKPOINTS", tmp_path)
    options = ["--width", "16", "--batch-size", "16", "--export", str(tmp_path)]
    pretrain_simclr.main(["--schedule", "24x1,32x1", *options])
    encoder, provenance, facts = simclr.pretrained_encoder()
    assert (facts["width"], len(facts["knn"])) == (16, 2)  # of 48 images, 8 are queries
    assert "48 training images without labels" in str(provenance)
    images, _ = few_images(8, 32)
    features = outputs(encoder, images)
    still = ["--schedule", "24x1", "--lr", "0", "--start-from", str(tmp_path / simclr.FILE)]
    pretrain_simclr.main([*still, *options])
    again, _, more = simclr.pretrained_encoder()
    torch.testing.assert_close(again.conv1.weight, encoder.conv1.weight, rtol=0.02, atol=0.02)
    assert features.shape == outputs(again, images).shape
    assert more["epochs"] == len(more["knn"]) == len(more["loss"]) == 3
    assert more["recipe"]["started_from"] == facts["recipe"]


# Two processes, started by torchrun


def small_model():
    """No batch norm: on CPUs its statistics are those of a process's own images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = simclr.SimCLR(nn.Sequential(*layers), 8, projection=4)
    model.projector[1] = nn.Identity()
    return model


def three_steps(file):
    """Loss, gradients, and weights after three steps on given views; every process gets its share of the rows."""
    rank, world = rank_and_world()
    views = torch.randn(3, 2, 12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = data_parallel(small_model())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    seen = []
    for first, second in views[:, :, rank::world]:
        z1, z2 = network(torch.cat([first, second])).chunk(2)
        loss = pretrain_simclr.joint_loss(z1, z2, temperature=0.3)
        optimizer.zero_grad()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in network.parameters())]
        optimizer.step()
    if rank == 0:
        torch.save([*seen, *(p.detach() for p in network.parameters())], file)


def in_two_processes(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PDL_DEVICE": "cpu"}
    return subprocess.run(
        [*launcher, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )


def test_two_processes_have_the_loss_the_gradients_and_the_weights_of_one(tmp_path):
    three_steps(tmp_path / "one.pt")
    ran = in_two_processes(__file__, str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert len(one) == len(two) > 20
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "trains"), [(1000, True), (999, False)])
def test_two_processes_train_and_one_of_them_saves_if_they_divide_the_batch(batch, trains):
    program = ["-m", "scripts.pretrain_simclr", "--width", "16", "--schedule", "16x1", "--stem-stride", "2"]
    ran = in_two_processes(*program, "--batch-size", str(batch))
    assert (ran.returncode == 0) == trains, ran.stderr
    assert len(kept()) == trains
    assert trains or "2 processes do not divide a batch of 999" in ran.stderr


if __name__ == "__main__":  # what torchrun starts, twice
    with process_group():
        three_steps(Path(sys.argv[1]) / "two.pt")
