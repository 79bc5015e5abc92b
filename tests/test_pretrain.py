"""The pretraining program on a data set of a few images: learns, resumes, ships, and runs on two processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pdl_utils import weights as checkpoints
from pdl_utils.data_parallel import LabelledBatches
from pdl_utils.datasets import tiny_imagenet as module
from pdl_utils.images import Augmentation, crop, crop_parameters, normalize
from pdl_utils.resnet import grow_depth, own_network
from pdl_utils.training import fit
from scripts import pretrain_resnet as pretrain


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Two classes, red and blue, sixteen training and eight validation images each."""
    root = tmp_path_factory.mktemp("data")
    folder = root / module.FOLDER
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
    monkeypatch.setattr(module, "VAL_COUNT", 16)
    monkeypatch.setattr(pretrain, "RESOLUTIONS", (32,))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_PROGRESS", "0")


def arguments(data_root, run, schedule="32x2", *more):
    return [
        "--arch", "resnet18", "--data", str(data_root), "--run", str(run), "--schedule", schedule,
        "--batch-size", "8", "--resolution", "32", "--lr", "0.05", *more,
    ]  # fmt: skip


def test_it_learns_and_ships_weights_that_load_strictly(data_root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    pretrain.main(arguments(data_root, tmp_path / "run", "32x3,48x1", "--export", str(out)))
    assert "top-1 on 16 validation images" in capsys.readouterr().out
    monkeypatch.setattr("pdl_utils.resnet.CHECKPOINTS", out)
    network = own_network("resnet18")
    assert network.categories == ["red", "blue"]
    assert network.model.fc.out_features == 2
    _, facts = checkpoints.load_weights(out / "resnet18_tiny_imagenet.safetensors")
    assert facts["recipe"]["schedule"] == [32, 32, 32, 48]
    assert facts["top1"]["32"] > 0.9
    assert "16 training images a class" in facts["data"]
    shipped = str(out / "resnet18_tiny_imagenet.safetensors")
    args = pretrain.parse(arguments(data_root, tmp_path / "more", "32x1", "--start-from", shipped))
    x = torch.randn(2, 3, 32, 32)
    for args.arch in ("resnet18", "resnet34"):  # goes on as it is, or grows
        torch.testing.assert_close(
            pretrain.build(args, 2).eval()(x), network.model.eval()(x), rtol=1e-3, atol=1e-3
        )
    red = Image.new("RGB", (300, 200), (200, 40, 40))
    network.model.eval()
    crops = network.crop([red, red.rotate(90, expand=True)])
    assert crops.shape == (2, 3, 128, 128)
    assert network.model(network.preprocess(crops)).argmax(1).tolist() == [0, 0]


def test_stopped_after_an_epoch_it_resumes_to_the_same_weights(data_root, tmp_path, monkeypatch):
    pretrain.main(arguments(data_root, tmp_path / "whole", "32x2", "--stop-after", "1"))
    assert len(torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["history"]) == 1
    pretrain.main(arguments(data_root, tmp_path / "whole"))
    calls = []

    def stop_in_the_second_epoch(self):
        calls.append(self.epoch)
        if self.epoch == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    original = LabelledBatches.__iter__
    monkeypatch.setattr(LabelledBatches, "__iter__", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(arguments(data_root, tmp_path / "pieces"))
    pretrain.main(arguments(data_root, tmp_path / "pieces"))
    assert calls == [0, 1, 1]
    whole, pieces = (
        torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("whole", "pieces")
    )
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_schedules():
    assert pretrain.schedule("64x2,96x1") == [64, 64, 96]
    with pytest.raises(Exception, match="write resolution x epochs"):
        pretrain.schedule("64")


def test_a_grown_network_computes_what_the_small_one_does():
    from torchvision.models import resnet18, resnet34

    torch.manual_seed(0)
    small, large = resnet18(num_classes=7).eval(), resnet34(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    grow_depth(small, large)
    torch.testing.assert_close(large(x), small(x))
    large.train()(x).sum().backward()
    assert large.layer3[4].bn2.weight.grad.abs().sum() > 0  # the new blocks can learn
    with pytest.raises(ValueError, match="cannot grow"):
        grow_depth(large, small)


def test_crops_stay_inside_and_keep_their_size():
    ramp = torch.arange(64.0).expand(5, 3, 64, 64)  # a pixel's value is its column
    generator = torch.Generator().manual_seed(0)
    cropped = 255 * Augmentation(scale=(0.2, 0.5))(ramp, 32, generator)
    assert cropped.shape == (5, 3, 32, 32)
    width = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    assert (width > 0).all()
    assert (cropped >= 0).all()
    assert (cropped <= 63.001).all()
    mirrored = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(crop(ramp[:1], mirrored, 64), ramp[:1].flip(3))
    area = crop_parameters(1000, scale=(0.2, 0.5), ratio=(1, 1))[:, :, :2].abs().amax(2).prod(1)
    assert area.min() >= 0.2 - 1e-6
    assert area.max() <= 0.5 + 1e-6


def test_half_of_the_images_are_mirrored():
    theta = crop_parameters(2000, generator=torch.Generator().manual_seed(0))
    assert 0.45 < (theta[:, 0, 0] < 0).float().mean() < 0.55


def test_normalize_takes_bytes_and_floats_alike():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(normalize(pixels), normalize(pixels / 255))
    expected = (pixels[0, 1, 2, 3] / 255 - 0.456) / 0.224
    torch.testing.assert_close(normalize(pixels)[0, 1, 2, 3], expected)


def parallel_run(state_file):
    """Three steps over joint batches of 8, on however many processes there are; rank 0 saves."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 2, (24,))
    parallel = torch.distributed.is_initialized()
    batches = LabelledBatches(
        images=images, labels=labels, resolutions=[16], batch_size=8, augment=Augmentation(scale=(0.3, 1)), seed=5
    )
    network = nn.parallel.DistributedDataParallel(model) if parallel else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    fit(
        network, batches, lambda net, b: F.cross_entropy(net(b[0]), b[1]), optimizer, epochs=1,
        checkpoint=state_file, progress=False,
    )  # fmt: skip


def test_two_processes_take_the_steps_of_one(tmp_path):
    parallel_run(tmp_path / "one.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r})\n"
        "import torch.distributed as dist\nfrom pathlib import Path\n"
        "dist.init_process_group('gloo')\n"
        f"import test_pretrain; test_pretrain.parallel_run(Path({str(tmp_path / 'two.pt')!r}))\n"
        "dist.destroy_process_group()\n"
    )
    script = tmp_path / "two.py"
    script.write_text(code)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-5, atol=1e-6)
