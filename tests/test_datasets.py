"""Data sets: files of the official formats, read by the official loaders, and all that can go wrong.

No test needs the network or the real data: `official` writes a small data set in its official format,
serves its archives on this machine, and points the loader there.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import multiprocessing
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FileServer
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, Imagenette

from pdl_utils.datasets import network, photos, small_images, sources, stand_ins
from pdl_utils.datasets.sources import Provenance

tiny_imagenet = importlib.import_module("pdl_utils.datasets.tiny_imagenet")  # not the function

REAL_DATA = Path(os.environ.get("PDL_DATA", "")).expanduser()
WNIDS = ["n01443537", "n02123045"]

pytestmark = pytest.mark.usefixtures("fresh_data")


@dataclass
class Official:
    """A small data set in its official format: `files` is its tree below the data root."""

    load: Callable[[], object]
    folder: str
    files: dict[str, bytes]
    damaged: str  # the file that tests damage
    archive: str  # its name at the official source
    has_stand_in: bool = True

    def write(self) -> Path:
        root = sources.data_root()
        for name, content in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def jpeg(side: int, colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_cifar10(server: FileServer, patch: pytest.MonkeyPatch) -> Official:
    rng = np.random.default_rng(0)
    parts = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            "labels": rng.integers(10, size=4).tolist(),
        }
        parts[name] = pickle.dumps(batch)
    parts["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    files = {f"cifar-10-batches-py/{name}": content for name, content in parts.items()}
    server.files["cifar.tar.gz"] = tar(files)
    patch.setattr(CIFAR10, "url", server.url + "cifar.tar.gz")
    patch.setattr(CIFAR10, "filename", "cifar.tar.gz")
    patch.setattr(CIFAR10, "tgz_md5", md5(server.files["cifar.tar.gz"]))
    patch.setattr(CIFAR10, "train_list", [[n, md5(c)] for n, c in parts.items() if n.startswith("data")])
    patch.setattr(CIFAR10, "test_list", [["test_batch", md5(parts["test_batch"])]])
    patch.setitem(CIFAR10.meta, "md5", md5(parts["batches.meta"]))
    damaged = "cifar-10-batches-py/data_batch_3"
    return Official(small_images.cifar10, "cifar-10-batches-py", files, damaged, "cifar.tar.gz")


def make_mnist(server: FileServer, patch: pytest.MonkeyPatch) -> Official:
    rng = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        parts[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, count, 28, 28) + pixels
        parts[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, count) + bytes(range(count))
    packed = {f"{name}.gz": gzip.compress(content) for name, content in parts.items()}
    server.files.update(packed)
    patch.setattr(small_images, "MNIST_URL", server.url)
    patch.setattr(MNIST, "resources", [(name, md5(content)) for name, content in packed.items()])
    patch.setattr(small_images, "MNIST_MD5", {name: md5(content) for name, content in parts.items()})
    files = {f"MNIST/raw/{name}": content for name, content in parts.items()}
    damaged = "MNIST/raw/train-labels-idx1-ubyte"
    return Official(small_images.mnist, "MNIST", files, damaged, "train-images-idx3-ubyte.gz")


def make_imagenette(server: FileServer, patch: pytest.MonkeyPatch) -> Official:
    wnids = list(Imagenette._WNID_TO_CLASS)
    files = {
        f"imagenette2-320/{part}/{wnid}/{wnid}_{i}.JPEG": jpeg(40, (20 * k, 100, 200))
        for part in ("train", "val") for k, wnid in enumerate(wnids) for i in range(2)
    }  # fmt: skip
    server.files["imagenette2-320.tgz"] = content = tar(files)
    url = server.url + "imagenette2-320.tgz"
    patch.setattr(photos, "IMAGENETTE_URL", url)
    patch.setattr(photos, "IMAGENETTE_COUNT", 2 * len(wnids))
    patch.setitem(Imagenette._ARCHIVES, "320px", (url, md5(content)))
    damaged = f"imagenette2-320/val/{wnids[3]}/{wnids[3]}_1.JPEG"
    return Official(photos.imagenet_photos, "imagenette2-320", files, damaged, "imagenette2-320.tgz")


def make_tiny_imagenet(server: FileServer, patch: pytest.MonkeyPatch) -> Official:
    files = {
        "wnids.txt": "\n".join(reversed(WNIDS)),
        "words.txt": f"{WNIDS[0]}\tgoldfish\n{WNIDS[1]}\ttabby, cat\n",
    }
    for k, wnid in enumerate(WNIDS):
        names = [f"{wnid}_{i}.JPEG" for i in range(3)]
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(f"{n}\t1\t2\t3\t{i}\n" for i, n in enumerate(names))
        files |= {f"train/{wnid}/images/{n}": jpeg(64, (200 * k, 50 * i, 100)) for i, n in enumerate(names)}
    files["val/val_annotations.txt"] = (
        f"val_0.JPEG\t{WNIDS[1]}\t0\t5\t63\t50\nval_1.JPEG\t{WNIDS[0]}\t9\t9\t9\t9\n"
    )
    files |= {f"val/images/val_{i}.JPEG": jpeg(64, (100 * i, 0, 30)) for i in range(2)}
    files = {f"tiny-imagenet-200/{n}": c.encode() if isinstance(c, str) else c for n, c in files.items()}
    server.files["tiny.zip"] = zipped(files)
    patch.setattr(tiny_imagenet, "URL", server.url + "tiny.zip")
    patch.setattr(tiny_imagenet, "MD5", md5(server.files["tiny.zip"]))
    patch.setattr(tiny_imagenet, "VAL_COUNT", 2)
    damaged = f"tiny-imagenet-200/train/{WNIDS[1]}/images/{WNIDS[1]}_2.JPEG"
    load = partial(tiny_imagenet.tiny_imagenet, "train")
    return Official(load, "tiny-imagenet-200", files, damaged, "tiny.zip", has_stand_in=False)


MAKERS = {"cifar10": make_cifar10, "mnist": make_mnist, "photos": make_imagenette, "tiny": make_tiny_imagenet}


@pytest.fixture(params=MAKERS)
def official(request, file_server, monkeypatch) -> Official:
    """Each data set in turn."""
    return MAKERS[request.param](file_server, monkeypatch)


def contents(data: object) -> dict[str, object]:
    """What a data set holds, so that two can be compared with ==."""
    plain = {
        torch.Tensor: torch.Tensor.tolist,
        list: lambda v: [getattr(x, "tobytes", lambda x=x: x)() for x in v],
    }
    return {name: plain.get(type(value), lambda v: v)(value) for name, value in vars(data).items()}


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


# What every data set does


def test_whole_local_files_are_read_without_network_and_without_writing(official, file_server, capsys):
    root = official.write()
    before = tree(root)
    data = official.load()
    assert data.provenance.real
    assert capsys.readouterr().out == f"{data.provenance}\n"
    assert file_server.requests == 0
    assert tree(root) == before  # so a read-only root is enough


def test_download_gives_the_same_as_local_files_and_leaves_nothing_behind(
    official, file_server, tmp_path, monkeypatch
):
    downloaded = official.load()
    assert downloaded.provenance.real
    left = {path.name for path in sources.data_root().iterdir()} - {f".{official.folder}.lock"}
    assert left == {official.folder}
    asked = file_server.requests
    again = official.load()
    assert file_server.requests == asked  # nothing is downloaded twice
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "elsewhere"))
    official.write()
    assert contents(downloaded) == contents(again) == contents(official.load())


def test_truncated_download_is_named_removed_and_fetched_again(official, file_server, capsys):
    file_server.truncated = 2  # torchvision asks twice: for redirects, then for the file
    assert official.load().provenance.real
    out = capsys.readouterr().out
    assert "attempt 1 of 3" in out
    assert "attempt 2 of 3" not in out
    assert official.archive in out
    assert not list(sources.data_root().glob("*.partial"))


def test_download_that_never_comes_whole_is_not_used(official, file_server, capsys, monkeypatch):
    file_server.truncated = 10**6
    if official.has_stand_in:
        assert not official.load().provenance.real
    else:
        with pytest.raises(sources.NoRealData, match="failed 3 times"):
            official.load()
    assert "attempt 3 of 3" in capsys.readouterr().out
    assert not (sources.data_root() / official.folder).exists()


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", None], ids=["half", "empty", "missing"]
)
def test_damaged_local_file_is_named_and_fetched_again(official, damage, capsys):
    whole = contents(official.load())
    path = sources.data_root() / official.damaged
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    capsys.readouterr()
    assert contents(official.load()) == whole
    out = capsys.readouterr().out
    assert f"{path} is" in out or f"{path} cannot be decoded" in out or "val has 19 photographs, not 20\n" in out
    assert path.read_bytes() == official.files[official.damaged]


def test_damaged_local_file_is_never_used_offline(official, capsys, monkeypatch):
    path = official.write() / official.damaged
    path.write_bytes(path.read_bytes()[:-30] if path.suffix else bytes(len(path.read_bytes())))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    if official.has_stand_in:
        data = official.load()
        assert not data.provenance.real
        assert data.provenance.tag
    else:
        with pytest.raises(sources.NoRealData):
            official.load()
    out = capsys.readouterr().out
    assert f"{path} is" in out or f"{path} cannot be decoded" in out
    assert "was removed" in out
    assert not path.exists()


def test_no_network_means_a_stand_in_that_says_so(official, file_server, capsys):
    file_server.shutdown()
    file_server.server_close()
    if not official.has_stand_in:
        with pytest.raises(sources.NoRealData, match=r"127\.0\.0\.1 does not answer"):
            official.load()
        return
    data = official.load()
    assert not data.provenance.real
    assert capsys.readouterr().out == f"{data.provenance}, because 127.0.0.1 does not answer (no network?)\n"


def test_require_real_says_what_to_do(official, monkeypatch, file_server):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData) as caught:
        official.load()
    message = str(caught.value)
    assert "PDL_OFFLINE is set" in message
    assert str(sources.data_root() / official.folder) in message
    assert ("unset PDL_REQUIRE_REAL" in message) == official.has_stand_in
    assert file_server.requests == 0
    official.write()
    assert official.load().provenance.real


def test_what_a_killed_download_left_is_cleared(official):
    stale = sources.data_root() / f".{official.folder}.partial" / official.folder / "half.bin"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    assert official.load().provenance.real
    assert not list(sources.data_root().rglob("half.bin"))


def test_unwritable_root_is_said(official, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "file" / "data"))
    if official.has_stand_in:
        assert not official.load().provenance.real
        assert "cannot be written to" in capsys.readouterr().out
    else:
        with pytest.raises(sources.NoRealData, match="cannot be written to"):
            official.load()


# The formats, value by value


def test_cifar10_values(file_server, monkeypatch):
    official = make_cifar10(file_server, monkeypatch)
    official.write()
    data = small_images.cifar10()
    batches = [pickle.loads(official.files[f"cifar-10-batches-py/data_batch_{i}"]) for i in range(1, 6)]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert torch.equal(data.train_images, torch.from_numpy(pixels))
    assert data.train_labels.tolist() == [label for batch in batches for label in batch["labels"]]
    assert data.test_images.shape == (4, 3, 32, 32)
    assert data.classes[3] == "class 3"


def test_mnist_values(file_server, monkeypatch):
    official = make_mnist(file_server, monkeypatch)
    official.write()
    data = small_images.mnist()
    assert data.train_images.numpy().tobytes() == official.files["MNIST/raw/train-images-idx3-ubyte"][16:]
    assert data.train_images.shape == (6, 1, 28, 28)
    assert data.test_images.shape == (3, 1, 28, 28)
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])


def test_tiny_imagenet_values(file_server, monkeypatch):
    make_tiny_imagenet(file_server, monkeypatch).write()
    train, val = (tiny_imagenet.tiny_imagenet(split) for split in ("train", "val"))
    assert (train.wnids, train.names) == (WNIDS, ["goldfish", "tabby, cat"])
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.boxes[2].tolist() == [1, 2, 3, 2]
    assert "3 training images a class" in str(train.provenance)
    assert val.labels.tolist() == [1, 0]
    assert val.boxes.tolist() == [[0, 5, 63, 50], [9, 9, 9, 9]]
    assert val.images.dtype == torch.uint8
    assert val.images[:, :, 30, 30].sub(torch.tensor([[0, 0, 30], [100, 0, 30]])).abs().max() <= 3
    with pytest.raises(ValueError, match="'train' or 'val'"):
        tiny_imagenet.tiny_imagenet("test")


def test_tiny_imagenet_limit_is_spread_and_decodes_no_more(file_server, monkeypatch):
    make_tiny_imagenet(file_server, monkeypatch).write()
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **kw: opened.append(path) or real_open(path, **kw))
    first, same = (tiny_imagenet.tiny_imagenet("train", limit=4) for _ in range(2))
    assert first.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(first.images, same.images)
    assert len(opened) == 8
    labels = np.repeat(np.arange(20), 30)
    assert np.bincount(labels[tiny_imagenet.spread(labels, 110, seed=1)]).tolist().count(5) == 10
    assert not np.array_equal(tiny_imagenet.spread(labels, 110, 1), tiny_imagenet.spread(labels, 110, 2))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("val/val_annotations.txt", b"val_0.JPEG\tn02123045\t0\t5\t63\t50\n", "has 1 lines, not 2"),
        ("val/val_annotations.txt", b"val_0.JPEG\tn0212", "has a line that cannot be read"),
        ("wnids.txt", b"n01443537\n", "does not have n02123045"),
        ("words.txt", b"n01443537\tgoldfish\nn021", "has no words for n02123045"),
    ],
)
def test_tiny_imagenet_lists_are_verified(name, content, complaint, file_server, monkeypatch, capsys):
    root = make_tiny_imagenet(file_server, monkeypatch).write()
    (root / "tiny-imagenet-200" / name).write_bytes(content)
    assert tiny_imagenet.tiny_imagenet("val").labels.tolist() == [1, 0]
    assert f"{Path(name).name} {complaint}" in capsys.readouterr().out


def test_tiny_imagenet_misses_what_its_lists_promise(file_server, monkeypatch, capsys):
    official = make_tiny_imagenet(file_server, monkeypatch)
    missing = official.write() / official.damaged
    missing.unlink()
    assert tiny_imagenet.tiny_imagenet("val").labels.tolist() == [1, 0]  # though of the other split
    assert f"{missing} is missing, although {WNIDS[1]}_boxes.txt lists it" in capsys.readouterr().out
    assert missing.exists()


def test_imagenette_values_and_choice(file_server, monkeypatch):
    make_imagenette(file_server, monkeypatch).write()
    data = photos.imagenet_photos()
    assert data.names[:3] == ["tabby", "tench", "tench"]  # a cat, though Imagenette has none
    assert len(data.images) == len(data.names) == len(data.wnids) == 21
    assert all(image.mode == "RGB" for image in data.images)
    few = photos.imagenet_photos(5, prefer=["n03888257", "n02123045"])
    assert few.names[:3] == ["parachute", "parachute", "tabby"]
    assert len(few.images) == 5
    assert few.names == photos.imagenet_photos(5, prefer=["n03888257", "n02123045"]).names


def test_own_photographs_come_first_and_unreadable_ones_stay(capsys):
    folder = sources.data_root() / "imagenet-samples" / "one_per_class"
    folder.mkdir(parents=True)
    (folder.parent / "a holiday.jpg").write_bytes(jpeg(50, (0, 0, 255)))
    (folder / "n02123045_tabby.jpg").write_bytes(jpeg(60, (255, 0, 0)))
    (folder / "n01443537_gold_fish.JPG").write_bytes(jpeg(70, (0, 255, 0)))
    (folder / "n02099601_half.jpg").write_bytes(jpeg(80, (0, 255, 0))[:-40])
    (folder / "notes.txt").touch()
    data = photos.imagenet_photos(prefer=["n02123045"])
    assert data.names == ["tabby", "gold fish", None]
    assert data.wnids == ["n02123045", "n01443537", None]
    assert [image.width for image in data.images] == [60, 70, 50]
    assert data.provenance.real
    assert "n02099601_half.jpg cannot be decoded" in capsys.readouterr().out
    assert (folder / "n02099601_half.jpg").exists()


# The network


@pytest.mark.parametrize(("blocked", "patience"), [("getaddrinfo", None), ("create_connection", 0.5)])
def test_offline_is_noticed_in_under_5_seconds_for_all_data_sets(blocked, patience, monkeypatch):
    """Names that are never looked up, with the real patience; hosts that never answer, in less time."""
    if patience:
        monkeypatch.setattr(network.Network, "patience", patience)
        monkeypatch.setattr(network, "_network", network.Network())
    release = threading.Event()

    def hang(*_: object, **__: object) -> None:
        release.wait(60)
        raise OSError("no answer")

    monkeypatch.setattr(socket, blocked, hang)
    urls = [
        CIFAR10.url,
        MNIST.mirrors[0],
        photos.IMAGENETTE_URL,
        tiny_imagenet.URL,
        "https://a.test",
        "http://b.test",
    ]
    started = time.monotonic()
    assert all(network.network_problem(url) for url in urls * 2)
    assert time.monotonic() - started < (patience or 4) + 1
    release.set()


def test_failing_dns_is_noticed_at_once_and_asked_once(monkeypatch):
    asked = []

    def fail(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    started = time.monotonic()
    assert "a.test does not answer" in network.network_problem("https://a.test/x")
    assert network.network_problem("https://a.test/y")
    assert network.network_problem("https://b.test/x")
    assert time.monotonic() - started < 1
    assert asked == ["a.test", "b.test"]


def test_one_silent_host_does_not_hide_another(file_server, monkeypatch):
    connect = socket.create_connection

    def slow_for_one(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == "a.test":
            time.sleep(timeout)
            raise TimeoutError
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", slow_for_one)
    monkeypatch.setattr(network.Network, "patience", 0.4)
    monkeypatch.setattr(network, "_network", network.Network())
    assert network.network_problem("http://a.test/x")
    assert network.network_problem(file_server.url) is None


def test_behind_a_proxy_the_proxy_is_asked(file_server, monkeypatch):
    monkeypatch.setenv("http_proxy", file_server.url)
    assert network.network_problem("http://a.test/x") is None
    monkeypatch.setenv("PDL_OFFLINE", "1")
    assert network.network_problem("http://a.test/x") == "PDL_OFFLINE is set"


def test_stalled_download_ends(file_server, monkeypatch, capsys):
    make_mnist(file_server, monkeypatch)
    file_server.stalled.set()
    monkeypatch.setattr(network, "STALL", 0.2)
    started = time.monotonic()
    assert not small_images.mnist().provenance.real
    assert time.monotonic() - started < 5
    assert "timed out" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", ["../evil", "/tmp/pdl-utils-evil"])
@pytest.mark.parametrize("maker", [make_cifar10, make_tiny_imagenet])
def test_hostile_archive_writes_nothing_outside_its_folder(
    maker, name, file_server, monkeypatch, tmp_path, capsys
):
    official = maker(file_server, monkeypatch)
    hostile = {name: b"evil", f"../../{tmp_path.name}/evil": b"evil"}
    if maker is make_cifar10:
        file_server.files[official.archive] = content = tar(hostile)
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    else:
        file_server.files[official.archive] = content = zipped(hostile)
        monkeypatch.setattr(tiny_imagenet, "MD5", md5(content))
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    with pytest.raises(sources.NoRealData):
        official.load()
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/tmp/pdl-utils-evil").exists()


def read_whole(folder: Path) -> SimpleNamespace:
    if (folder / "a.bin").read_bytes() != b"whole":
        raise sources.DamagedFile(folder / "a.bin", "is half")
    return SimpleNamespace(provenance=Provenance("x", "official"))


def download_slowly(started: Path, root: Path) -> None:
    (root / "x").mkdir()
    with (root / "x" / "a.bin").open("wb", buffering=0) as file:
        file.write(b"wh")
        started.touch()
        time.sleep(0.5)
        file.write(b"ole")


def test_tar_files_are_unpacked_carefully_by_loaders_that_are_not(tmp_path):
    """torchvision 0.21 calls `extractall` without a filter."""
    archive = tarfile.open(fileobj=io.BytesIO(tar({"../evil": b"evil"})))  # noqa: SIM115
    with archive, network.careful_downloads(), pytest.raises(tarfile.FilterError):
        archive.extractall(tmp_path / "inside")
    assert not (tmp_path / "evil").exists()
    assert tarfile.TarFile.extraction_filter is None


def test_two_processes_that_want_the_same_download_it_once(file_server, tmp_path):
    started = tmp_path / "started"
    arguments = {"read": read_whole, "download": partial(download_slowly, started), "url": file_server.url}
    other = multiprocessing.get_context("spawn").Process(target=sources.obtain, args=("x", "x"), kwargs=arguments)
    other.start()
    while not started.exists():
        time.sleep(0.01)
    assert not (sources.data_root() / "x").exists()  # nothing half shows
    started.unlink()
    assert str(sources.obtain("x", "x", **arguments).provenance) == "x: official"
    assert not started.exists()  # it waited for the other one, and did not download again
    other.join(30)
    assert other.exitcode == 0


# Where things are


def test_data_root_does_not_depend_on_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PDL_DATA")
    before = sources.data_root()
    monkeypatch.chdir(tmp_path)
    assert sources.data_root() == before
    assert before == Path(sources.__file__).resolve().parents[2] / "data"
    monkeypatch.setenv("PDL_DATA", "~/somewhere")
    assert sources.data_root() == Path.home() / "somewhere"


def test_obtain_takes_another_root(tmp_path):
    (tmp_path / "there" / "x").mkdir(parents=True)
    data = SimpleNamespace(provenance=Provenance("x", "official"))
    found = sources.obtain("x", "x", read=lambda _: data, download=None, url="", root=tmp_path / "there")
    assert found is data


# Stand-ins


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stand-in must not touch the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_texture_crops_follow_from_the_seed(no_sockets):
    (train, labels), (test, test_labels) = stand_ins.texture_crops(40, 20, seed=3)
    (same, _), (same_test, _) = stand_ins.texture_crops(40, 20, seed=3)
    (other, _), _ = stand_ins.texture_crops(40, 20, seed=4)
    assert torch.equal(train, same)
    assert torch.equal(test, same_test)
    assert not torch.equal(train, other)
    assert train.shape == (40, 3, 32, 32)
    assert train.dtype == torch.uint8
    assert labels.bincount().tolist() == [4] * 10
    assert test_labels.bincount().tolist() == [2] * 10
    assert len(stand_ins.TEXTURES) == 10


def test_texture_crops_of_train_and_test_share_no_pixel(monkeypatch):
    """Photographs whose cells for testing are white and whose other cells are black: crops must be one or
    the other, whole."""

    def marked(load: Callable[[], np.ndarray]) -> np.ndarray:
        pixels = np.zeros_like(load())
        for left, top, side in stand_ins.grid_cells(pixels.shape[1], pixels.shape[0], held_out=True):
            pixels[top : top + side, left : left + side] = 255
        return pixels

    monkeypatch.setattr(
        stand_ins, "TEXTURES", {name: partial(marked, load) for name, load in stand_ins.TEXTURES.items()}
    )
    (train, _), (test, _) = stand_ins.texture_crops(300, 300)
    assert train.max() == 0
    assert test.min() > 150


def test_grid_cells_do_not_overlap_and_both_kinds_are_everywhere():
    covered = np.zeros((300, 451), dtype=int)
    for held_out in (False, True):
        cells = stand_ins.grid_cells(451, 300, held_out)
        for left, top, side in cells:
            assert left + side <= 451
            assert top + side <= 300
            covered[top : top + side, left : left + side] += 1
        assert len({left for left, _, _ in cells}) == 7
        assert len({top for _, top, _ in cells}) == 5
    assert covered.max() == 1


def test_digits_are_split_without_overlap(no_sockets):
    (train, labels), (test, test_labels) = stand_ins.digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape[1:] == (1, 28, 28)
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert torch.equal(stand_ins.digits()[0][0], train)


def test_stand_in_photographs_show_a_cat_first(no_sockets, monkeypatch):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    data = photos.imagenet_photos(8)
    assert len(data.images) == 8
    assert (data.names[0], data.wnids[0]) == ("tabby", "n02123045")
    assert data.images[0].size == (451, 300)
    assert all(image.mode == "RGB" for image in data.images)
    assert photos.imagenet_photos(prefer=["n07920052"]).names[0] == "espresso"
    assert len(photos.imagenet_photos(100).images) == len(stand_ins.PHOTOGRAPHS)


# The real thing, where it is


@pytest.mark.skipif(not (REAL_DATA / "MNIST").is_dir(), reason="PDL_DATA holds no real data")
def test_real_data(monkeypatch):
    monkeypatch.setenv("PDL_DATA", str(REAL_DATA))
    monkeypatch.setenv("PDL_OFFLINE", "1")
    monkeypatch.setenv("PDL_REQUIRE_REAL", "1")
    digits = small_images.mnist()
    assert digits.train_images.shape == (60000, 1, 28, 28)
    assert digits.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    if (REAL_DATA / "cifar-10-batches-py").is_dir():
        images = small_images.cifar10()
        assert images.train_images.shape == (50000, 3, 32, 32)
        assert images.classes[int(images.test_labels[0])] == "cat"
    if (REAL_DATA / "tiny-imagenet-200").is_dir():
        val = tiny_imagenet.tiny_imagenet("val", limit=200)
        assert val.labels.bincount().tolist() == [1] * 200
