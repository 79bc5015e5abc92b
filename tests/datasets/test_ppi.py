"""PPI: files of the official format, what can go wrong with them, the real ones where they are; the stand-in."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.datasets import PPI

from pdl_utils.datasets import DamagedFile, TissueGraphs, ppi
from pdl_utils.datasets.synthetic_graphs import FEATURES, LABELS, PPI_SIZED, SMALL, Sizes, ppi_stand_in
from pdl_utils.settings import data_root

REAL = os.environ.get("PDL_DATA", "")  # as it was before a test sets its own
TINY = Sizes(train=(60, 80), val=(70,), test=(90,), modules=6, complex_size=10, degree=12)
SIZES = {"train": (7, 9, 5), "valid": (6, 8), "test": (4, 6)}  # nodes of each graph
FIRST_ID = {"train": 1, "valid": 21, "test": 23}

pytestmark = pytest.mark.usefixtures("fresh_data")


def write_raw(raw: Path | None = None) -> Path:
    """The twelve raw files of a small PPI: node-link JSON, every graph a ring with a loop. Every other link stands
    there in one direction only, and the first twice. By default they are written where PPI is looked for."""
    raw = raw or data_root() / "ppi" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, sizes in SIZES.items():
        start, links = 0, []
        for size in sizes:
            ring = [(start + i, start + (i + 1) % size) for i in range(size)]
            back = [(b, a) for a, b in ring[::2]]
            links += [*ring, *back, ring[0], (start, start)]
            start += size
        graph = {
            "directed": False, "multigraph": False, "graph": {}, "nodes": [{"id": i} for i in range(start)],
            "links": [{"source": a, "target": b} for a, b in links],
        }  # fmt: skip
        (raw / f"{part}_graph.json").write_text(json.dumps(graph))
        np.save(raw / f"{part}_graph_id.npy", np.repeat(np.arange(len(sizes)) + FIRST_ID[part], sizes))
        np.save(raw / f"{part}_feats.npy", rng.normal(size=(start, FEATURES)))
        np.save(raw / f"{part}_labels.npy", rng.integers(2, size=(start, LABELS)))
    return raw


@pytest.fixture
def serve(file_server, monkeypatch, tmp_path):
    """The official archive, served on this machine."""
    archive = shutil.make_archive(str(tmp_path / "ppi"), "zip", write_raw(tmp_path / "official"))
    file_server.files["ppi.zip"] = Path(archive).read_bytes()
    monkeypatch.setattr(importlib.import_module("pdl_utils.datasets.ppi"), "URL", file_server.url + "ppi.zip")
    return file_server


def check(data: TissueGraphs) -> None:
    """The small PPI, whole: every graph of n nodes is a ring, of n edges in both directions."""
    assert data.provenance.real
    for part, graphs in {"train": data.train, "valid": data.val, "test": data.test}.items():
        assert [graph.num_nodes for graph in graphs] == list(SIZES[part])
        assert [graph.num_edges for graph in graphs] == [2 * n for n in SIZES[part]]


def test_local_files(serve, capsys):
    raw = write_raw()
    check(ppi())
    captured = capsys.readouterr()
    assert captured.out == "PPI: official files\n"
    assert captured.err == ""
    assert serve.requests == 0
    (raw / "NOTICE.txt").write_text("three labels\nare unknown\n")
    assert str(ppi().provenance) == "PPI: official files; three labels are unknown"
    assert {path.name for path in raw.parent.iterdir()} == {"raw"}  # nothing is written beside the files


def test_equals_torch_geometric():
    assert PPI.url == importlib.import_module("pdl_utils.datasets.ppi").URL
    write_raw()
    data = ppi()
    for split in ("train", "val", "test"):
        for ours, theirs in zip(getattr(data, split), PPI(str(data_root() / "ppi"), split), strict=True):
            assert torch.equal(ours.x, theirs.x)
            assert torch.equal(ours.y, theirs.y)
            assert sorted(ours.edge_index.t().tolist()) == sorted(theirs.edge_index.t().tolist())


@pytest.mark.skipif(not (Path(REAL) / "ppi" / "raw").is_dir() or not REAL, reason="PPI is not in PDL_DATA")
def test_the_real_files(monkeypatch):
    monkeypatch.setenv("PDL_DATA", REAL)
    data = ppi()
    splits = data.train, data.val, data.test
    assert [len(graphs) for graphs in splits] == [20, 2, 2]
    assert [sum(graph.num_edges for graph in graphs) for graphs in splits] == [1_226_368, 198_920, 161_976]
    assert sum(graph.num_nodes for graphs in splits for graph in graphs) == 56_944


@pytest.mark.parametrize("name", ["train_feats.npy", "valid_labels.npy", "test_graph_id.npy", "train_graph.json"])
@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated"])
def test_damaged_file_is_named_and_left_as_it_is(name, damage):
    path = write_raw() / name
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(DamagedFile, match=rf"{name} is missing or damaged .* Replace it, or remove"):
        ppi()
    assert path.exists() == (damage != "removed")


def shifted(labels: np.ndarray) -> np.ndarray:
    return labels * 2


def without_a_column(labels: np.ndarray) -> np.ndarray:
    return labels[:, 1:]


def with_nan(features: np.ndarray) -> np.ndarray:
    features[3, 2] = np.nan
    return features


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("test_labels.npy", shifted, "labels other than 0 and 1"),
        ("test_labels.npy", without_a_column, r"its shape is \(10, 120\)"),
        ("valid_feats.npy", with_nan, "NaN or infinity"),
    ],
)
def test_values_that_cannot_be_are_named(name, change, says):
    path = write_raw() / name
    np.save(path, change(np.load(path)))
    with pytest.raises(DamagedFile, match=rf"{name} is missing or damaged \(.*{says}"):
        ppi()


def test_links_to_nodes_that_are_not_there_are_named():
    path = write_raw() / "valid_graph.json"
    path.write_text('{"links": [{"source": 0, "target": 14}]}')
    with pytest.raises(DamagedFile, match=r"valid_graph.json is missing or damaged"):
        ppi()


def test_offline_means_a_stand_in_that_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PDL_OFFLINE", "1")
    data = ppi(TINY)
    assert not data.provenance.real
    assert data.provenance.tag == " · stand-in for PPI"
    assert "stand-in: 4 seeded graphs of 60 to 90 nodes" in capsys.readouterr().out
    assert [len(split) for split in (data.train, data.val, data.test)] == [2, 1, 1]


# The stand-in


def test_stand_in_is_the_same_for_the_same_seed():
    first, same, other = (list(chain.from_iterable(ppi_stand_in(TINY, seed).values())) for seed in (1, 1, 2))
    for graph, again in zip(first, same, strict=True):
        assert all(torch.equal(part, again[name]) for name, part in graph.to_dict().items())
    assert not torch.equal(first[0].x, other[0].x)


def test_stand_in_edges():
    for graph in chain.from_iterable(ppi_stand_in(SMALL).values()):
        source, target = graph.edge_index
        assert (source != target).all()
        pairs = set(map(tuple, graph.edge_index.t().tolist()))
        assert len(pairs) == len(source)
        assert {pair[::-1] for pair in pairs} == pairs
        assert torch.equal(graph.functional, graph.complex[source] == graph.complex[target])
        labels_agree = (graph.y[source] == graph.y[target]).all(1)
        assert labels_agree[graph.functional].all()
        assert not labels_agree[~graph.functional].any()
        marker = graph.x[:, 0] > 0
        assert torch.equal(marker[source] == marker[target], graph.functional)


def test_stand_in_has_the_shape_of_ppi():
    splits = ppi_stand_in(PPI_SIZED)
    assert [len(graphs) for graphs in splits.values()] == [20, 2, 2]
    graphs = list(chain.from_iterable(splits.values()))
    sizes = torch.tensor([graph.num_nodes for graph in graphs])
    assert (int(sizes.min()), int(sizes.max()), round(float(sizes.float().mean()))) == (591, 3480, 2373)
    edges = sum(graph.num_edges for graph in graphs)
    assert 28 < edges / int(sizes.sum()) < 30
    assert 0.45 < sum(int(graph.functional.sum()) for graph in graphs) / edges < 0.55
    x, y = (torch.cat([getattr(graph, name) for graph in splits["train"]]) for name in ("x", "y"))
    assert (x.shape[1], y.shape[1]) == (50, 121)
    torch.testing.assert_close(x.mean(0), torch.zeros(50), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(50), atol=1e-3, rtol=0)
    assert 0.25 < float(y.mean()) < 0.4
    assert 0 < float(y.mean(0).min()) < float(y.mean(0).max()) < 1
