"""What several test files share: a server on this machine, small data sets in their official formats, and chosen
cells of a notebook."""

import contextlib
import gzip
import hashlib
import importlib
import io
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from IPython.display import DisplayHandle
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, Imagenette

from pdl_utils.datasets import photos, small_images, sources
from pdl_utils.settings import REPOSITORY, data_root

tiny_imagenet = importlib.import_module("pdl_utils.datasets.tiny_imagenet")  # the module, not the function
REAL_DATA = Path(os.environ.get("PDL_DATA", "nowhere")).expanduser()  # before a test sets its own


class Answer(BaseHTTPRequestHandler):
    """An official source on this machine: `files` by path. `fault`: "cut" sends half of one, "stalled" nothing."""

    def do_GET(self):
        self.server.requests += 1
        body = self.server.files.get(self.path.lstrip("/"))
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.fault == "stalled":
            self.connection.settimeout(60)  # not the default, which the client lowers in this process
            self.connection.recv(1)  # until the client gives up
        else:
            self.wfile.write(body[: len(body) // 2] if self.server.fault == "cut" else body)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def file_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.url, server.files = f"http://127.0.0.1:{server.server_port}/", {}
        server.fault, server.requests = None, 0
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def real_data(monkeypatch):
    """`real_data("ppi")` skips a test where the user's data root lacks that folder."""

    def need(folder):
        if not (REAL_DATA / folder).is_dir():
            pytest.skip(f"PDL_DATA holds no {folder}")
        for name, value in (("DATA", str(REAL_DATA)), ("OFFLINE", "1"), ("REQUIRE_REAL", "1")):
            monkeypatch.setenv(f"PDL_{name}", value)

    return need


@pytest.fixture
def fresh_data(monkeypatch, tmp_path):
    """An empty data root, a network not yet judged, and none of the user's settings."""
    for name in ("PDL_OFFLINE", "PDL_REQUIRE_REAL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PDL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sources, "_no_answer", [])


# Small data sets in their official formats, served on this machine


@dataclass
class Official:
    """`files`: the tree of a data set below `folder` in the data root; `damaged`: the one that tests damage."""

    load: Callable[[], object]
    folder: str
    files: dict[str, bytes]
    damaged: str

    def write(self, root=None):
        root = root or data_root()
        for name, content in self.files.items():
            path = root / self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root

    def packed(self, form):
        """An archive, "gztar" or "zip"."""
        with TemporaryDirectory() as folder:
            self.write(Path(folder, "files"))
            return Path(shutil.make_archive(f"{folder}/archive", form, f"{folder}/files")).read_bytes()


def md5(content):
    return hashlib.md5(content).hexdigest()


def jpeg(side, colour):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def set_all(patch, target, **values):
    for name, value in values.items():
        patch.setattr(target, name, value)


def make_cifar10(server, patch):
    rng = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(10, size=4).tolist()
        files[name] = pickle.dumps({"data": pixels, "labels": labels})
    official = Official(small_images.cifar10, "cifar-10-batches-py", files, "data_batch_3")
    archive = server.files["cifar.tar.gz"] = official.packed("gztar")
    (_, meta), *batches = [(name, md5(content)) for name, content in files.items()]
    patch.setitem(CIFAR10.meta, "md5", meta)
    set_all(patch, CIFAR10, train_list=batches[:5], test_list=batches[5:])
    set_all(patch, CIFAR10, url=server.url + "cifar.tar.gz", tgz_md5=md5(archive))
    return official


def make_mnist(server, patch):
    files = {}
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, count, 28, 28) + pixels
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, count) + bytes(range(count))
    archives = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    server.files.update(archives)
    patch.setattr(MNIST, "resources", [(name, md5(content)) for name, content in archives.items()])
    unpacked = {name: md5(content) for name, content in files.items()}
    set_all(patch, small_images, MNIST_URL=server.url, MNIST_MD5=unpacked)
    return Official(small_images.mnist, "MNIST/raw", files, "train-labels-idx1-ubyte")


def make_imagenette(server, patch):
    files = {}
    for k, wnid in enumerate(Imagenette._WNID_TO_CLASS):
        files |= {f"val/{wnid}/{wnid}_{i}.JPEG": jpeg(40, (20 * k, 100, 200)) for i in range(2)}
    official = Official(photos.imagenet_photos, "imagenette2-320", files, damaged=list(files)[-1])
    archive = server.files["imagenette2-320.tgz"] = official.packed("gztar")
    set_all(patch, photos, IMAGENETTE_URL=server.url + "imagenette2-320.tgz", IMAGENETTE_MD5=md5(archive))
    patch.setattr(photos, "IMAGENETTE_COUNT", len(files))
    return official


def make_tiny_imagenet(server, patch):
    fish, cat = "n01443537", "n02123045"
    boxes = f"val_0.JPEG\t{cat}\t0\t5\t63\t50\nval_1.JPEG\t{fish}\t9\t9\t9\t9\n"
    lists = {"wnids.txt": f"{cat}\n{fish}", "words.txt": f"{fish}\tgoldfish\n{cat}\ttabby, cat\n"}
    lists["val/val_annotations.txt"] = boxes
    files = {f"val/images/val_{i}.JPEG": jpeg(64, (100 * i, 0, 30)) for i in range(2)}
    for k, wnid in enumerate((fish, cat)):
        lists[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(f"{wnid}_{i}.JPEG\t1\t2\t3\t{i}\n" for i in range(3))
        for i in range(3):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(64, (200 * k, 50 * i, 100))
    files |= {name: text.encode() for name, text in lists.items()}
    load, damaged = partial(tiny_imagenet.tiny_imagenet, "train"), f"train/{cat}/images/{cat}_2.JPEG"
    official = Official(load, "tiny-imagenet-200", files, damaged)
    archive = server.files["tiny.zip"] = official.packed("zip")
    set_all(patch, tiny_imagenet, URL=server.url + "tiny.zip", MD5=md5(archive), VAL_COUNT=2)
    return official


MAKERS = {"cifar10": make_cifar10, "mnist": make_mnist, "photos": make_imagenette, "tiny": make_tiny_imagenet}


@pytest.fixture
def make_official(file_server, fresh_data, monkeypatch):
    """`make_official("cifar10")`; also "mnist", "photos" and "tiny"."""
    return lambda name: MAKERS[name](file_server, monkeypatch)


@pytest.fixture(params=MAKERS)
def official(request, make_official):
    """Each data set in turn."""
    return make_official(request.param)


def run_cells(path, *texts, change=None):
    """Run a notebook's set-up and each later cell that holds one of `texts`, in their order, with each old text in
    `change` replaced by the new one; gives the namespace. LookupError: a text is in no cell that runs."""
    change = change or {}
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    last = max(i for i, cell in enumerate(cells) if "run.config(" in cell or "Run(" in cell)
    chosen = cells[: last + 1] + [cell for cell in cells[last + 1 :] if any(text in cell for text in texts)]
    for text in (*texts, *change):
        if not any(text in cell for cell in chosen):
            raise LookupError(f"no cell that runs holds {text!r}")
    space = {"__name__": "__main__"}
    for source in chosen:
        for old, new in change.items():
            source = source.replace(old, new)
        lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
        with contextlib.redirect_stdout(io.StringIO()):
            exec("\n".join(lines), space)
    return space


@pytest.fixture
def notebook_cells(monkeypatch, tmp_path):
    """`notebook_cells("1_grad_cam")("def class_map", change={"relu()": "abs()"})`: in `fast`, without a
    network, on stand-ins unless PDL_DATA is set. PDL_NOTEBOOKS names another folder of notebooks."""
    folder = Path(os.environ.get("PDL_NOTEBOOKS", REPOSITORY / "notebooks"))
    settings = {"PDL_PROFILE": "fast", "PDL_OFFLINE": "1", "PDL_PROGRESS": "0", "PDL_FIGURES": str(tmp_path)}
    settings["PDL_DATA"] = os.environ.get("PDL_DATA", str(tmp_path / "data"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for module in ("IPython.display", "pdl_utils.notebook"):
        monkeypatch.setattr(f"{module}.display", lambda *_, **__: DisplayHandle(), raising=False)
    yield lambda name: partial(run_cells, folder / f"{name}.ipynb")
    plt.close("all")
