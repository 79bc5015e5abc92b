"""The pretraining programs on a few images: they learn and ship, and two processes do what one does."""

import os
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
import torch
from torch import nn
from torchvision.models import resnet34

from pdl_utils.datasets import LabelledImages, Provenance, TinyImageNet
from pdl_utils.few_labels import simclr
from pdl_utils.resnet import own_network
from pdl_utils.settings import REPOSITORY, data_root
from pdl_utils.weights import load_weights
from scripts import common, pretrain_resnet, pretrain_simclr


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    """In place of both data sets: bright images of class 0 in turn with dark ones of class 1."""
    for name, value in {"PDL_OFFLINE": "1", "PDL_PROGRESS": "0", "PDL_DATA": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8)
    images[1::2] //= 8
    labels, classes, origin = torch.arange(48) % 2, ["bright, light", "dark"], Provenance("few", "48 images")
    tiny = TinyImageNet(images, labels, torch.zeros(48, 4), ["n1", "n2"], classes, origin)
    few = LabelledImages(images, labels, images[:8], labels[:8], classes, origin)
    monkeypatch.setattr(pretrain_resnet, "tiny_imagenet", lambda split: tiny)
    monkeypatch.setattr(pretrain_resnet, "RESOLUTIONS", (32,))
    monkeypatch.setattr(pretrain_simclr, "cifar10", lambda: few)


def train_resnet(*more):
    pretrain_resnet.main(["--arch", "resnet18", "--batch-size", "8", "--resolution", "32", "--lr", "0.05", *more])


def kept_trainings():
    return [torch.load(file, weights_only=True) for file in (data_root() / "runs").glob("*.pt")]


def test_a_resnet_learns_ships_grows_and_goes_on(tmp_path, monkeypatch):
    train_resnet("--schedule", "32x2,40x1", "--export", str(tmp_path))
    shipped = tmp_path / "resnet18_tiny_imagenet.safetensors"
    _, facts = load_weights(shipped)
    assert facts["recipe"]["schedule"] == [32, 32, 40]
    assert facts["top1"]["32"] > 0.9
    assert facts["data"] == "few (48 images)"
    monkeypatch.setattr("pdl_utils.resnet.CHECKPOINTS", tmp_path)
    network = own_network("resnet18")
    assert network.categories == ["bright", "dark"]
    grown, x = resnet34(num_classes=2), torch.randn(2, 3, 32, 32)
    pretrain_resnet.grow_depth(network.model.state_dict(), grown)
    torch.testing.assert_close(grown.eval()(x), network.model.eval()(x))  # the same function at first,
    grown.train()(x).sum().backward()
    assert grown.layer3[4].bn2.weight.grad.abs().sum() > 0  # and new blocks that can learn
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer3\.2"):
        pretrain_resnet.grow_depth(grown.state_dict(), network.model)
    more = ["--schedule", "32x1", "--start-from", str(shipped)]
    built = pretrain_resnet.build(pretrain_resnet.parse(["--arch", "resnet18", *more]), 2)
    assert torch.equal(built.fc.weight, network.model.fc.weight)
    train_resnet(*more, "--export", str(tmp_path))
    assert sorted(len(state["history"]) for state in kept_trainings()) == [1, 3]  # another recipe starts anew
    _, again = load_weights(shipped)
    assert again["epochs"] == len(again["loss"]) == 4
    assert again["recipe"]["started_from"] == facts["recipe"]


def test_schedules():
    assert common.schedule("64x2,96x1") == [64, 64, 96]
    for text in ("64", "64x0", "0x3", "64x-1", "64x1,", ""):
        with pytest.raises(ArgumentTypeError, match="write size x epochs"):
            common.schedule(text)


def test_simclr_ships_an_encoder_and_a_second_cycle_adds_its_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "CHECKPOINTS", tmp_path)
    options = ["--width", "16", "--batch-size", "16", "--export", str(tmp_path)]
    pretrain_simclr.main(["--schedule", "24x1,32x1", *options])
    encoder, provenance, facts = simclr.pretrained_encoder()
    assert (facts["width"], len(facts["knn"])) == (16, 2)  # of 48 images, 8 are queries
    assert "48 training images without labels" in str(provenance)
    still = ["--schedule", "24x1", "--lr", "0", "--start-from", str(tmp_path / simclr.FILE)]
    pretrain_simclr.main([*still, *options])
    again, _, more = simclr.pretrained_encoder()
    torch.testing.assert_close(again.conv1.weight, encoder.conv1.weight, rtol=0.02, atol=0.02)
    assert more["epochs"] == len(more["knn"]) == len(more["loss"]) == 3
    assert more["recipe"]["started_from"] == facts["recipe"]


# Two processes, started by torchrun


def save_loss_and_gradients(file):
    """Of a small network on given views; every process gets its share of the rows. No batch norm: on CPUs its
    statistics are those of a process's own images."""
    rank, world = common.rank_and_world()
    torch.manual_seed(0)
    network = common.data_parallel(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)))
    first, second = torch.randn(2, 12, 20)[:, rank::world]
    loss = pretrain_simclr.joint_loss(*network(torch.cat([first, second])).chunk(2), temperature=0.3)
    loss.backward()
    if rank == 0:
        torch.save([loss.detach(), *(p.grad for p in network.parameters())], file)


def in_two_processes(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PDL_DEVICE": "cpu"}
    ran = subprocess.run([*launcher, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    save_loss_and_gradients(tmp_path / "one.pt")
    in_two_processes(__file__, str(tmp_path / "two.pt"))
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_two_processes_train_and_save(tmp_path):
    options = ["--width", "16", "--schedule", "16x1", "--batch-size", "1000", "--export", str(tmp_path)]
    in_two_processes("-m", "scripts.pretrain_simclr", *options)
    (state,) = kept_trainings()
    assert len(state["history"]) == 1
    assert (tmp_path / simclr.FILE).exists()


if __name__ == "__main__":  # what torchrun starts, twice
    with common.process_group():
        save_loss_and_gradients(sys.argv[1])
