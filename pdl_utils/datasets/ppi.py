"""PPI (Zitnik & Leskovec 2017; splits of Hamilton et al. 2017): proteins of 24 human tissues, 121 labels each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets.sources import DamagedFile, Provenance, obtain, with_notice
from pdl_utils.datasets.synthetic_graphs import FEATURES, LABELS, PPI_SIZED, Recipe, Tissue, ppi_stand_in

URL = "https://data.dgl.ai/dataset/ppi.zip"  # which torch_geometric.datasets.PPI downloads too
PARTS = {"train": "train", "val": "valid", "test": "test"}  # split → what its raw files begin with


@dataclass(frozen=True)
class TissueGraphs:
    """Graphs for inductive multi-label classification: no test node is seen in training.

    Each graph has 50 features and 121 labels a node. In a stand-in's graphs the kind of every edge is known.
    """

    train: list[Tissue]
    val: list[Tissue]
    test: list[Tissue]
    provenance: Provenance


def ppi(stand_in: Recipe = PPI_SIZED) -> TissueGraphs:
    """PPI: 20, 2 and 2 graphs of 591 to 3,480 nodes, in the official split.

    Offline: the graphs of `ppi_stand_in(stand_in)`.

    Raises:
        NoRealData: `PDL_REQUIRE_REAL=1` and PPI cannot be had.
    """
    return obtain("PPI", "ppi", read=_read, download=_download, stand_in=lambda: _stand_in(stand_in))


def _stand_in(recipe: Recipe) -> TissueGraphs:
    sizes = [*recipe.train, *recipe.val, *recipe.test]
    source = (
        f"stand-in: {len(sizes)} seeded graphs of {min(sizes):,} to {max(sizes):,} nodes in PPI's shape, "
        "the kind of every edge known"
    )
    return TissueGraphs(**ppi_stand_in(recipe), provenance=Provenance("PPI", source, real=False))


def _download(root: Path) -> None:
    """As torch_geometric does, without the copy that it would make of the files."""
    download_and_extract_archive(URL, root, root / "ppi" / "raw", remove_finished=True)


def _read(folder: Path) -> TissueGraphs:
    raw = folder / "raw"
    graphs = {split: _graphs(raw, part) for split, part in PARTS.items()}
    return TissueGraphs(**graphs, provenance=with_notice("PPI", "official files", raw))


def _graphs(raw: Path, part: str) -> list[Tissue]:
    """The graphs of one split. Edges are given in both directions, once each, without self-loops."""
    ids, x, y = (_load(raw / f"{part}_{name}.npy", np.load) for name in ("graph_id", "feats", "labels"))
    for name, array, width in (("feats", x, FEATURES), ("labels", y, LABELS)):
        if array.shape != (len(ids), width):
            raise DamagedFile(f"{raw}/{part}_{name}.npy has shape {array.shape}, not {(len(ids), width)}")
    source, target = links = _load(raw / f"{part}_graph.json", _links)
    if links.size and not 0 <= links.min() <= links.max() < len(ids):
        raise DamagedFile(f"{raw}/{part}_graph.json names other nodes than the {len(ids)} that have features")
    both = np.sort(np.concatenate([source * len(ids) + target, target * len(ids) + source]))
    source, target = np.divmod(both[np.diff(both, prepend=-1) > 0], len(ids))  # each once, sorted by source
    kept = (source != target) & (ids[source] == ids[target])
    links = np.stack([source, target])[:, kept]
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    graphs = []
    for graph in np.unique(ids):
        nodes = np.flatnonzero(ids == graph)
        edges = np.searchsorted(nodes, links[:, ids[links[0]] == graph])  # numbered from 0 in every graph
        graphs.append(Tissue(x=x[nodes], y=y[nodes], edge_index=torch.from_numpy(edges)))
    return graphs


def _links(path: Path) -> np.ndarray:
    """Sources and targets, int64 (2, links), as they stand in the node-link JSON."""
    links = json.loads(path.read_bytes())["links"]
    return np.array([[link[end] for link in links] for end in ("source", "target")], dtype=np.int64)


def _load(path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The array that `read` makes of a file; DamagedFile if the file is missing, truncated or corrupt."""
    try:
        return read(path)
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing") from None
    except (ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path} is truncated or corrupt ({error})") from error
