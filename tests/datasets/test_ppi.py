"""PPI: files of the official format, what can go wrong with them, the real ones where they are; the stand-in."""

import importlib
import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.datasets import PPI
from torch_geometric.utils import coalesce

from pdl_utils.datasets import DamagedFile, ppi
from pdl_utils.datasets.synthetic_graphs import FEATURES, LABELS, PPI_SIZED, SMALL, Sizes, ppi_stand_in
from pdl_utils.settings import data_root

MODULE = importlib.import_module("pdl_utils.datasets.ppi")  # not the function of the same name
TINY = Sizes(train=(60, 80), val=(70,), test=(90,), modules=6, complex_size=10, degree=12)
SIZES = {"train": (7, 9, 5), "valid": (6, 8), "test": (4, 6)}  # nodes of each graph

pytestmark = pytest.mark.usefixtures("fresh_data")


def write_raw(raw: Path) -> Path:
    """The twelve raw files of a small PPI: every graph is a ring with a loop. Every other link stands there in one
    direction only, and the first twice."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, sizes in SIZES.items():
        start, links = 0, []
        for size in sizes:
            ring = [(start + i, start + (i + 1) % size) for i in range(size)]
            links += [*ring, *[(b, a) for a, b in ring[::2]], ring[0], (start, start)]
            start += size
        graph = {"directed": False, "multigraph": False, "nodes": [{"id": i} for i in range(start)]}
        graph["links"] = [{"source": a, "target": b} for a, b in links]
        (raw / f"{part}_graph.json").write_text(json.dumps(graph))
        np.save(raw / f"{part}_graph_id.npy", np.repeat(np.arange(len(sizes)) + 21, sizes))
        np.save(raw / f"{part}_feats.npy", rng.normal(size=(start, FEATURES)))
        np.save(raw / f"{part}_labels.npy", rng.integers(2, size=(start, LABELS)))
    return raw


def test_downloaded_once_and_then_read(file_server, monkeypatch, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "ppi"), "zip", write_raw(tmp_path / "official"))
    file_server.files["ppi.zip"] = Path(archive).read_bytes()
    monkeypatch.setattr(MODULE, "URL", file_server.url + "ppi.zip")
    ppi()
    file_server.files.clear()
    assert ppi().provenance.real
    assert len(list(data_root().glob("ppi/**/*.*"))) == 12  # nothing is written beside the files
    (data_root() / "ppi/raw/NOTICE.txt").write_text("three labels\nare unknown\n")
    assert str(ppi().provenance) == "PPI: official files; three labels are unknown"


def test_equals_torch_geometric():
    assert PPI.url == MODULE.URL
    write_raw(data_root() / "ppi" / "raw")
    data = ppi()
    for split in ("train", "val", "test"):
        for ours, theirs in zip(getattr(data, split), PPI(str(data_root() / "ppi"), split), strict=True):
            found, wanted = ((g.x, g.y, coalesce(g.edge_index)) for g in (ours, theirs))  # in one order
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_the_real_files(real_data):
    real_data("ppi/raw")
    data = ppi()
    splits = {"train": data.train, "val": data.val, "test": data.test}
    nodes = {name: tuple(graph.num_nodes for graph in graphs) for name, graphs in splits.items()}
    assert nodes == {name: getattr(PPI_SIZED, name) for name in splits}  # the stand-in has their sizes
    edges = [sum(graph.num_edges for graph in graphs) for graphs in splits.values()]
    assert edges == [1_226_368, 198_920, 161_976]


DAMAGES = [
    ("train_feats.npy", lambda path: path.unlink(), "No such file"),
    ("train_graph.json", lambda path: path.write_bytes(path.read_bytes()[:300]), ""),
    ("valid_graph.json", lambda path: path.write_text('{"links": [{"source": 0, "target": 14}]}'), ""),
    ("test_labels.npy", lambda path: np.save(path, np.load(path) * 2), "labels other than 0 and 1"),
    ("test_labels.npy", lambda path: np.save(path, np.load(path)[:, 1:]), r"its shape is \(10, 120\)"),
    ("valid_feats.npy", lambda path: np.save(path, np.load(path) * np.nan), "NaN or infinity"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGES)
def test_a_damaged_file_is_named_and_left_as_it_is(name, damage, says):
    raw = write_raw(data_root() / "ppi" / "raw")
    damage(raw / name)
    before = {path: path.read_bytes() for path in raw.iterdir()}
    with pytest.raises(DamagedFile, match=rf"(?s){name} is missing or damaged \(.*{says}.* Replace it, or remove"):
        ppi()
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


def test_offline_means_a_stand_in_that_says_so_and_is_the_same_for_the_same_seed(monkeypatch, capsys):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    data = ppi(TINY)
    assert data.provenance.tag == " · stand-in for PPI"
    assert "stand-in: 4 seeded graphs of 60 to 90 nodes" in capsys.readouterr().out
    assert [len(split) for split in (data.train, data.val, data.test)] == [2, 1, 1]
    same, other = (ppi_stand_in(TINY, seed)["test"][0] for seed in (0, 1))
    with pytest.raises(ValueError, match="give more modules"):  # a decoy would do the same job
        ppi_stand_in(replace(TINY, modules=1))
    assert all(torch.equal(part, same[name]) for name, part in data.test[0].to_dict().items())
    assert not torch.equal(other.x, same.x)


def test_stand_in_edges():
    for graph in chain.from_iterable(ppi_stand_in(SMALL).values()):
        source, target = graph.edge_index
        assert len(source) == coalesce(graph.edge_index).shape[1]  # once each,
        assert graph.is_undirected()  # in both directions,
        assert not graph.has_self_loops()
        for same in (graph.complex, graph.y, graph.x[:, :1] > 0):  # of complex, module, compartment
            assert torch.equal(graph.functional, (same[source] == same[target]).view(len(source), -1).all(1))


def test_stand_in_has_the_shape_of_ppi():
    splits = ppi_stand_in(PPI_SIZED)
    graphs = list(chain.from_iterable(splits.values()))
    nodes, edges = (sum(getattr(graph, name) for graph in graphs) for name in ("num_nodes", "num_edges"))
    assert (len(graphs), nodes) == (24, 56_944)
    assert 28 < edges / nodes < 30
    assert 0.45 < sum(int(graph.functional.sum()) for graph in graphs) / edges < 0.55
    x, y = (torch.cat([getattr(graph, name) for graph in splits["train"]]) for name in ("x", "y"))
    assert (x.shape[1], y.shape[1]) == (50, 121)
    torch.testing.assert_close(x.mean(0), torch.zeros(50), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(50), atol=1e-3, rtol=0)
    assert 0.25 < float(y.mean()) < 0.4
    assert 0 < float(y.mean(0).min()) < float(y.mean(0).max()) < 1
