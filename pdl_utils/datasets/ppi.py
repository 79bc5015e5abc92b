"""PPI (Zitnik & Leskovec 2017; splits of Hamilton et al. 2017): proteins of 24 human tissues, 121 labels each."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.datasets import PPI

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain
from pdl_utils.datasets.synthetic_graphs import FEATURES, LABELS, PPI_SIZED, Recipe, ppi_stand_in

PARTS = {"train": "train", "val": "valid", "test": "test"}  # split → what its raw files begin with


@dataclass(frozen=True)
class TissueGraphs:
    """Graphs for inductive multi-label classification: no test node is seen in training.

    Each graph has x (N, 50), float32; y (N, 121), float32 of 0 and 1; and edge_index (2, E). A stand-in's
    graphs also have `functional` (E,), the true kind of every edge, and `complex` (N,).
    """

    train: list[Data]
    val: list[Data]
    test: list[Data]
    provenance: Provenance


def ppi(stand_in: Recipe = PPI_SIZED) -> TissueGraphs:
    """PPI: 20, 2 and 2 graphs of 591 to 3,480 nodes, in the official split.

    Offline: the graphs of `ppi_stand_in(stand_in)`.

    Raises:
        NoRealData: `PDL_REQUIRE_REAL=1` and PPI cannot be had.
    """
    return obtain(
        "PPI", "ppi",
        read=_read, download=_download, url=PPI.url, stand_in=lambda: _stand_in(stand_in),
    )  # fmt: skip


def _stand_in(recipe: Recipe) -> TissueGraphs:
    sizes = [*recipe.train, *recipe.val, *recipe.test]
    source = (
        f"stand-in: {len(sizes)} seeded graphs of {min(sizes):,} to {max(sizes):,} nodes in PPI's shape, "
        "the kind of every edge known"
    )
    return TissueGraphs(**ppi_stand_in(recipe), provenance=Provenance("PPI", source, real=False))


def _download(root: Path) -> None:
    with _quiet():
        PPI(str(root / "ppi"))


def _read(folder: Path) -> TissueGraphs:
    """Read through torch_geometric, whose processed copy is used only where it agrees with the raw files."""
    raw = {split: _raw_arrays(folder / "raw", part) for split, part in PARTS.items()}
    graphs = None
    if (folder / "processed").exists():
        with contextlib.suppress(Exception):  # an unpickler raises all kinds of things for half a file
            for path in (folder / "processed").glob("*.pt"):
                torch.load(path, weights_only=True)  # torch_geometric would run the code in a hostile one
            graphs = _load(folder)
        if graphs is None or not _agree(graphs, raw):
            print(f"PPI: {folder / 'processed'} does not match the raw files and is made again")
            graphs = None
    if graphs is None:
        graphs = _process(folder)
    return TissueGraphs(**graphs, provenance=Provenance("PPI", "official files, read by torch_geometric"))


def _raw_arrays(raw: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a split, in the order of its graphs.

    Raises:
        DamagedFile: a raw file of the split is missing, truncated, or does not fit the others.
    """
    arrays = {}
    for name in ("graph_id", "feats", "labels"):
        path = raw / f"{part}_{name}.npy"
        try:
            arrays[name] = np.load(path)
        except FileNotFoundError:
            raise DamagedFile(path, "is missing") from None
        except (ValueError, EOFError, OSError) as error:
            raise DamagedFile(path, f"is truncated or corrupt ({error})") from error
    nodes = len(arrays["graph_id"])
    for name, shape in {"graph_id": (nodes,), "feats": (nodes, FEATURES), "labels": (nodes, LABELS)}.items():
        if arrays[name].shape != shape:
            raise DamagedFile(raw / f"{part}_{name}.npy", f"has shape {arrays[name].shape}, not {shape}")
    graph = raw / f"{part}_graph.json"
    if not graph.is_file():
        raise DamagedFile(graph, "is missing")
    with graph.open("rb") as file:  # to read all of it takes seconds; half a file shows at its end
        file.seek(max(0, graph.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise DamagedFile(graph, "is truncated or corrupt (it does not end as JSON does)")
    order = np.argsort(arrays["graph_id"], kind="stable")
    return arrays["feats"][order], arrays["labels"][order]


def _load(folder: Path, *, anew: bool = False) -> dict[str, list[Data]]:
    with _quiet():
        return {split: list(PPI(str(folder), split, force_reload=anew and split == "train")) for split in PARTS}


def _process(folder: Path) -> dict[str, list[Data]]:
    try:
        try:
            return _load(folder, anew=True)
        except OSError:  # a data root that can only be read, or is full: keep the processed copy elsewhere
            with tempfile.TemporaryDirectory() as elsewhere:
                (Path(elsewhere) / "raw").symlink_to(folder.absolute() / "raw")
                return _load(Path(elsewhere))
    except Exception:
        for part in PARTS.values():  # torch_geometric does not say which file was wrong
            _check_json(folder / "raw" / f"{part}_graph.json")
        raise


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFile(path, f"is truncated or corrupt ({error})") from error


def _agree(graphs: dict[str, list[Data]], raw: dict[str, tuple[np.ndarray, np.ndarray]]) -> bool:
    """Do the graphs hold the raw files' features and labels?"""
    for split, (features, labels) in raw.items():
        x, y = (torch.cat([graph[name] for graph in graphs[split]]).numpy() for name in ("x", "y"))
        if not np.array_equal(x, features.astype(np.float32)) or not np.array_equal(y, labels.astype(np.float32)):
            return False
    return True


def _quiet() -> contextlib.redirect_stderr:
    """Keep torch_geometric's "Processing..." and "Done!" out of the notebook."""
    return contextlib.redirect_stderr(io.StringIO())
