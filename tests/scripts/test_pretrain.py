"""The pretraining programs on a few images: they learn, resume and ship, and two processes do what one does."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pdl_utils.datasets import LabelledImages, Provenance
from pdl_utils.few_labels import SimCLR, simclr
from pdl_utils.resnet import own_network
from pdl_utils.settings import REPOSITORY
from pdl_utils.weights import load_weights, save_weights
from scripts import pretrain_resnet, pretrain_simclr
from scripts.common import data_parallel, process_group, rank_and_world, schedule

tiny = import_module("pdl_utils.datasets.tiny_imagenet")  # the function there has the same name


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Tiny ImageNet with two classes, red and blue, sixteen training and eight validation images each."""
    root = tmp_path_factory.mktemp("data")
    folder = root / tiny.FOLDER
    wnids = {"n00000001": (200, 40, 40), "n00000002": (40, 40, 200)}
    rng = np.random.default_rng(0)

    def write(path, color):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(color) + rng.normal(0, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, "JPEG")

    lines = []
    for wnid, color in wnids.items():
        boxes = []
        for i in range(16):
            write(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", color)
            boxes.append(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
        for _ in range(8):
            write(folder / "val" / "images" / f"val_{len(lines)}.JPEG", color)
            lines.append(f"val_{len(lines)}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n00000001\tred, crimson\nn00000002\tblue\n")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tiny, "VAL_COUNT", 16)
    monkeypatch.setattr(pretrain_resnet, "RESOLUTIONS", (32,))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_PROGRESS", "0")


def train_resnet(run, *more):
    pretrain_resnet.main([
        "--arch", "resnet18", "--state", str(run), "--batch-size", "8",
        "--resolution", "32", "--lr", "0.05", *more,
    ])  # fmt: skip


def last(run):
    return torch.load(run / "last.pt", weights_only=True)


def test_a_resnet_learns_ships_and_goes_on(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(data_root))
    out = tmp_path / "out"
    train_resnet(tmp_path / "run", "--schedule", "32x3,48x1", "--export", str(out))
    monkeypatch.setattr("pdl_utils.resnet.CHECKPOINTS", out)
    network = own_network("resnet18")
    assert network.categories == ["red", "blue"]
    shipped = out / "resnet18_tiny_imagenet.safetensors"
    _, facts = load_weights(shipped)
    assert facts["recipe"]["schedule"] == [32, 32, 32, 48]
    assert facts["top1"]["32"] > 0.9
    assert "16 training images a class" in facts["data"]
    more = ["--schedule", "32x1", "--start-from", str(shipped), "--state", "unused"]
    x = torch.randn(2, 3, 32, 32)
    for arch in ("resnet18", "resnet34"):  # goes on as it is, or grows
        model = pretrain_resnet.build(pretrain_resnet.parse(["--arch", arch, *more]), 2).eval()
        torch.testing.assert_close(model(x), network.model.eval()(x), rtol=1e-3, atol=1e-3)


def test_stopped_or_killed_it_resumes_to_the_same_weights(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(data_root))
    train_resnet(tmp_path / "whole", "--schedule", "32x2")
    train_resnet(tmp_path / "pieces", "--schedule", "32x2", "--stop-after", "1")
    assert len(last(tmp_path / "pieces")["history"]) == 1
    calls = []

    def killed(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pretrain_resnet, "top1", killed)  # in the evaluation of the second epoch
        with pytest.raises(KeyboardInterrupt):
            train_resnet(tmp_path / "pieces", "--schedule", "32x2")
    assert len(calls) == 1
    train_resnet(tmp_path / "pieces", "--schedule", "32x2")
    whole, pieces = last(tmp_path / "whole")["model"], last(tmp_path / "pieces")["model"]
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_teachers_predictions_are_half_of_each_label(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(pretrain_resnet, "tiny_imagenet", lambda split: loaded[split])
    with monkeypatch.context() as patched:
        patched.setenv("PDL_DATA", str(data_root))
        loaded = {split: tiny.tiny_imagenet(split) for split in ("train", "val")}
    teacher = torchvision.models.resnet18(num_classes=3)
    facts = {"source": "a teacher", "categories": ["jay", "hen", "owl"]}
    save_weights(tmp_path / "data" / "weights" / "resnet18.safetensors", teacher.state_dict(), facts)
    out = tmp_path / "out"
    train_resnet(tmp_path / "run", "--schedule", "32x1", "--teacher", "resnet18", "--export", str(out))
    assert load_weights(out / "resnet18_tiny_imagenet.safetensors")[1]["teacher"] == "a teacher"
    predicted = torch.load(tmp_path / "run" / "teacher.pt", weights_only=True)["predictions"]
    args = pretrain_resnet.parse(["--arch", "resnet18", "--state", str(tmp_path / "run"), "--teacher", "none"])
    labels = pretrain_resnet.taught_labels(args, loaded["train"], torch.device("cpu"))  # reads what was kept
    torch.testing.assert_close(2 * labels - predicted, nn.functional.one_hot(loaded["train"].labels).float())
    torch.testing.assert_close(predicted.sum(1), torch.ones(32))


def test_what_ships_may_be_the_mean_of_several_cycles(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(data_root))
    train_resnet(tmp_path / "first", "--schedule", "32x1")
    earlier = str(tmp_path / "first" / "last.pt")
    out = tmp_path / "out"
    more = ["--start-from", earlier, "--average", earlier, "--export", str(out)]
    train_resnet(tmp_path / "second", "--schedule", "32x1", *more)
    shipped, facts = load_weights(out / "resnet18_tiny_imagenet.safetensors")
    assert (facts["average_of"], facts["epochs"]) == (2, 2)
    ends = [last(tmp_path / run)["model"] for run in ("first", "second")]
    for name in ("fc.weight", "bn1.running_var"):
        assert not torch.equal(ends[0][name], ends[1][name])
        torch.testing.assert_close(shipped[name], (ends[0][name] + ends[1][name]) / 2, rtol=1e-3, atol=1e-5)


def test_no_image_is_predicted_by_a_map_that_saw_its_label():
    torch.manual_seed(0)
    labels, noise = torch.randint(4, (300,)), torch.randn(300, 400)  # as many numbers as could store all labels
    right = (pretrain_resnet.cross_fitted(noise, labels, 4).argmax(1) == labels).float().mean()
    assert right < 0.4  # 1/4 by chance
    told = noise[:, :8] + 4 * nn.functional.one_hot(labels, 8)
    assert (pretrain_resnet.cross_fitted(told, labels, 4).argmax(1) == labels).float().mean() > 0.5


def test_schedules():
    assert schedule("64x2,96x1") == [64, 64, 96]
    with pytest.raises(Exception, match="write size x epochs"):
        schedule("64")


def test_a_grown_network_computes_what_the_small_one_does():
    from torchvision.models import resnet18, resnet34

    torch.manual_seed(0)
    small, large = resnet18(num_classes=7).eval(), resnet34(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    pretrain_resnet.grow_depth(small, large)
    torch.testing.assert_close(large(x), small(x))
    large.train()(x).sum().backward()
    assert large.layer3[4].bn2.weight.grad.abs().sum() > 0  # the new blocks can learn
    with pytest.raises(ValueError, match="cannot grow"):
        pretrain_resnet.grow_depth(large, small)


def few_images(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 1] //= 8
    return LabelledImages(images, labels, images[:8], labels[:8], ["bright", "dark"], Provenance("few", "test"))


def test_simclr_ships_an_encoder_and_a_second_cycle_adds_its_facts(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_simclr, "cifar10", lambda: few_images(48))
    monkeypatch.setattr(pretrain_simclr, "BANK", 30)
    monkeypatch.setattr(simclr, "CHECKPOINTS", tmp_path)
    small = ["--width", "16", "--batch-size", "16", "--export", str(tmp_path)]
    pretrain_simclr.main(["--state", str(tmp_path / "run"), "--schedule", "24x1,32x1", *small])
    encoder, provenance, facts = simclr.pretrained_encoder()
    assert facts["width"] == 16
    assert len(facts["knn"]) == 2
    assert "48 training images without labels" in str(provenance)
    trained = last(tmp_path / "run")["model"]
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, trained[f"encoder.{name}"], rtol=1e-3, atol=1e-3)

    # Without a learning rate it ends where it starts: from the state with its projection, from the file without.
    same, first_recipe = {}, facts["recipe"]
    for start in (tmp_path / simclr.FILE, tmp_path / "run" / "last.pt"):
        run = tmp_path / f"from_{start.suffix}"
        still = ["--schedule", "24x1", "--lr", "0", "--seed", "1"]
        pretrain_simclr.main(["--state", str(run), "--start-from", str(start), *still, *small])
        ended = last(run)["model"]
        torch.testing.assert_close(
            ended["encoder.conv1.weight"], trained["encoder.conv1.weight"], rtol=1e-3, atol=1e-3
        )
        same[start.suffix] = torch.equal(ended["projector.0.weight"], trained["projector.0.weight"])
        _, _, facts = simclr.pretrained_encoder()
        assert facts["epochs"] == len(facts["knn"]) == len(facts["loss"]) == 3
        expected = first_recipe if start.suffix == ".safetensors" else "last"
        assert facts["recipe"]["started_from"] == expected
    assert same == {".pt": True, ".safetensors": False}


def small_model():
    """No batch norm: on CPUs its statistics are those of a process's own images."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = SimCLR(encoder, 8, projection=4)
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


def test_two_processes_have_the_loss_the_gradients_and_the_weights_of_one(tmp_path):
    three_steps(tmp_path / "one.pt")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__, tmp_path],
        check=True, capture_output=True, timeout=200, cwd=REPOSITORY, env=environment(),
    )  # fmt: skip
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    assert len(one) == len(two) > 20
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_processes_train_and_one_of_them_saves(tmp_path):
    command = "-m torch.distributed.run --nproc-per-node=2 --standalone -m scripts.pretrain_simclr --width 16"
    options = ["--state", tmp_path, "--schedule", "16x1", "--batch-size", "1000", "--stem-stride", "2"]
    subprocess.run(
        [sys.executable, *command.split(), *options], check=True, capture_output=True, timeout=200,
        cwd=REPOSITORY, env=environment(PDL_DATA=str(tmp_path / "none")),
    )  # fmt: skip
    assert len(last(tmp_path)["history"]) == 1


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


if __name__ == "__main__":  # what torchrun starts, twice
    with process_group():
        three_steps(Path(sys.argv[1]) / "two.pt")
