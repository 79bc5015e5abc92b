"""PPI (Zitnik & Leskovec 2017; splits of Hamilton et al. 2017): proteins of 24 human tissues, 121 labels each."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.utils import remove_self_loops, to_undirected
from torchvision.datasets.utils import download_and_extract_archive

from pdl_utils.datasets.sources import Provenance, obtain, reading, with_notice
from pdl_utils.datasets.synthetic_graphs import FEATURES, LABELS, PPI_SIZED, Sizes, ppi_stand_in

URL = "https://data.dgl.ai/dataset/ppi.zip"  # which torch_geometric.datasets.PPI downloads too


@dataclass(frozen=True)
class TissueGraphs:
    """20, 2 and 2 graphs of 591 to 3,480 nodes, with 50 features `x` and 121 labels `y` a node."""

    train: list[Data]
    val: list[Data]
    test: list[Data]
    provenance: Provenance


def ppi(stand_in: Sizes = PPI_SIZED) -> TissueGraphs:
    """PPI in the official split; offline, the graphs of `ppi_stand_in(stand_in)`."""

    def synthetic() -> TissueGraphs:
        nodes = [*stand_in.train, *stand_in.val, *stand_in.test]
        size = f"{len(nodes)} seeded graphs of {min(nodes):,} to {max(nodes):,} nodes in PPI's shape"
        provenance = Provenance("PPI", f"stand-in: {size}, the kind of every edge known", real=False)
        return TissueGraphs(**ppi_stand_in(stand_in), provenance=provenance)

    return obtain(
        "PPI", "ppi", read=_read, stand_in=synthetic,
        download=lambda root: download_and_extract_archive(URL, root, root / "ppi" / "raw", remove_finished=True),
    )  # fmt: skip


def _read(folder: Path) -> TissueGraphs:
    raw = folder / "raw"
    splits = [_graphs(raw, part) for part in ("train", "valid", "test")]
    return TissueGraphs(*splits, with_notice("PPI", "official files", raw))


def _graphs(raw: Path, part: str) -> list[Data]:
    """What `torch_geometric.datasets.PPI` gives, in a seventh of its time and without its copy of the files. Every
    edge stands there in both directions, once each, without self-loops."""
    arrays = {}
    for name, width in {"graph_id": (), "feats": (FEATURES,), "labels": (LABELS,)}.items():
        with reading(raw / f"{part}_{name}.npy"):
            array = arrays[name] = torch.from_numpy(np.load(raw / f"{part}_{name}.npy"))
            if array.shape != (len(arrays["graph_id"]), *width):
                raise ValueError(f"its shape is {tuple(array.shape)}")
            fits = (array == 0) | (array == 1) if name == "labels" else array.isfinite()
            if not fits.all():
                raise ValueError("it holds NaN or infinity, or labels other than 0 and 1")
    ids = arrays["graph_id"]
    with reading(raw / f"{part}_graph.json"):
        links = json.loads((raw / f"{part}_graph.json").read_bytes())["links"]
        edges = torch.tensor([(link["source"], link["target"]) for link in links]).T
        edges, _ = remove_self_loops(to_undirected(edges, num_nodes=len(ids)))
        whole = Data(x=arrays["feats"].float(), edge_index=edges, y=arrays["labels"].float())
        whole.validate()
    return [whole.subgraph(ids == one) for one in ids.unique()]
