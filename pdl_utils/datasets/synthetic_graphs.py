"""Graphs in the shape of PPI, made from a seed, in which the kind of every edge is known. Offline they take PPI's
place, and say so; and attention can be scored against the kind of every edge.

Nodes belong to protein complexes; a complex does one job (its module) in one compartment of the cell. About half
of the edges stay inside a complex: they are functional. The others lead to one decoy complex, which does another
job in the other compartment. A node's labels follow from its module, which shows mostly in its neighbours'
features: as in PPI, 43% of the nodes carry no motif of their own. Who tells the two kinds of edges apart, by the
compartments at both ends, gains much: what an attention *can* gain is large here by construction."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch_geometric.data import Data

FEATURES, LABELS = 50, 121
COMPARTMENTS = 2  # the first features, one-hot; the others are motifs
MOTIFS_A_MODULE, MOTIF_RATE, BACKGROUND_RATE = 6, 0.3, 0.004
ANNOTATED = 0.57  # share of nodes that carry motifs
FUNCTIONAL = 0.5  # share of functional edges, before repeated ones are merged
LABEL_DENSITY, LABEL_CONCENTRATION = 0.3, 3.0
DEGREE_SPREAD = 0.9  # of the logarithm of a node's propensity to have edges: a heavy tail


@dataclass(frozen=True)
class Sizes:
    """Nodes of every graph in each split, modules, and means: nodes a complex, edges a node before merging."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    modules: int
    complex_size: int
    degree: float


SMALL = Sizes(
    train=(555, 453, 527, 585, 310, 343, 324, 584, 375, 394, 550, 419), val=(450, 450), test=(450, 450),
    modules=10, complex_size=24, degree=20,
)  # fmt: skip
PPI_SIZED = Sizes(  # the real graphs' numbers of nodes
    train=(1767, 1377, 2263, 2339, 1578, 1021, 1823, 2488, 591, 3312,
           2401, 1878, 1819, 3480, 2794, 2326, 2650, 2815, 3163, 3021),
    val=(3230, 3284), test=(3224, 2300), modules=24, complex_size=45, degree=50,
)  # fmt: skip


def ppi_stand_in(sizes: Sizes, seed: int = 0) -> dict[str, list[Data]]:
    """Graphs in the splits "train", "val" and "test", the same for the same seed: x float32 (N, 50), standardised
    over the training nodes; y float32 (N, 121) of 0 and 1; edge_index (2, E), both directions of every edge;
    functional bool (E,), the kind of every edge; complex int64 (N,), ids of the graph's own."""
    rng = np.random.default_rng(seed)
    rates = np.full((sizes.modules, FEATURES - COMPARTMENTS), BACKGROUND_RATE)
    for module in range(sizes.modules):
        rates[module, rng.choice(rates.shape[1], MOTIFS_A_MODULE, replace=False)] = MOTIF_RATE
    odds = LABEL_CONCENTRATION * (1 - LABEL_DENSITY) / LABEL_DENSITY
    frequency = rng.beta(LABEL_CONCENTRATION, odds, LABELS).clip(0.03, 0.95)
    labels = rng.random((sizes.modules, LABELS)) < frequency
    # A label that all modules have, or none, would ask nothing: turn it around in one of them.
    constant = labels.all(axis=0) | ~labels.any(axis=0)
    labels[rng.integers(sizes.modules, size=LABELS), np.arange(LABELS)] ^= constant
    splits: dict[str, list[Data]] = {}
    for name in ("train", "val", "test"):
        splits[name] = [_graph(nodes, sizes, rates, labels, rng) for nodes in getattr(sizes, name)]
    features = torch.cat([graph.x for graph in splits["train"]])
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    for graph in chain.from_iterable(splits.values()):
        graph.x = (graph.x - mean) / std
    return splits


def _graph(nodes: int, sizes: Sizes, rates: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Data:
    count = max(4, 2 * round(nodes / sizes.complex_size / 2))  # of complexes, even: they are paired
    compartment = np.arange(count) % COMPARTMENTS
    module = rng.choice(sizes.modules, count, replace=count > sizes.modules)
    member = np.sort(rng.integers(count, size=nodes))  # each node's complex
    pairs = _edges(member, _decoys(module, rng), sizes.degree, rng)
    functional = member[pairs[0]] == member[pairs[1]]
    motifs = (rng.random((nodes, rates.shape[1])) < rates[module[member]]) & (rng.random((nodes, 1)) < ANNOTATED)
    features = np.concatenate([np.eye(COMPARTMENTS)[compartment[member]], motifs], axis=1)
    place = rng.permutation(nodes)  # the order of the nodes must not give the complexes away
    order = np.argsort(place)
    return Data(
        x=torch.from_numpy(features[order]).float(),
        y=torch.from_numpy(labels[module[member]][order]).float(),
        edge_index=torch.from_numpy(place[np.concatenate([pairs, pairs[::-1]], axis=1)]),
        functional=torch.from_numpy(np.concatenate([functional, functional])),
        complex=torch.from_numpy(member[order]),
    )


def _decoys(module: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each complex's decoy: a matching of the two compartments, even and odd, that joins no two of a module."""
    left, right = np.arange(len(module)).reshape(-1, COMPARTMENTS).T
    for _ in range(10_000):
        right = rng.permutation(right)
        if (module[left] != module[right]).all():
            break
    else:
        raise ValueError("no matching joins different modules only: give more modules, or larger complexes")
    decoy = np.empty_like(module)
    decoy[left], decoy[right] = right, left
    return decoy


def _edges(member: np.ndarray, decoy: np.ndarray, degree: float, rng: np.random.Generator) -> np.ndarray:
    """Undirected edges (2, E) without repeats or loops, inside the complexes and to their decoys."""
    nodes = len(member)
    propensity = np.exp(rng.normal(0, DEGREE_SPREAD, nodes))
    stubs = rng.poisson(propensity / propensity.mean() * degree / 2) + 1
    source = np.repeat(np.arange(nodes), stubs)
    inside = rng.random(len(source)) < FUNCTIONAL
    partner = np.where(inside, member[source], decoy[member[source]])
    # In proportion to its propensity: nodes are sorted by complex, a stretch of the cumulative propensity.
    total = np.concatenate([[0], propensity.cumsum()])
    first = np.searchsorted(member, np.arange(len(decoy) + 1))
    low, high = total[first[partner]], total[first[partner + 1]]
    target = np.searchsorted(total, rng.uniform(low, high), side="right") - 1
    joined = (source != target) & (low < high)  # a complex may be empty
    pairs = np.stack([source, target.clip(0, nodes - 1)])[:, joined]
    return np.unique(np.sort(pairs, axis=0), axis=1)
