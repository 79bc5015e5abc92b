"""Graphs in the shape of PPI, made from a seed, in which the kind of every edge is known. Offline they take PPI's
place, and say so; and attention can be scored against the kind of every edge.

A graph is a tissue. Its nodes belong to protein complexes; a complex does one job (its module) in one compartment
of the cell. About half of the edges are functional: they stay inside a complex. The others lead to one decoy
complex, which does another job in the other compartment. A node's labels follow from its module; most of what it
knows of that module stands in its neighbours' features, since as in PPI 43% of the nodes carry no motif of their
own. Whoever tells the two kinds of edges apart, by the compartments at both ends, can average over the right
neighbours: what an attention *can* gain is large here by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

FEATURES, LABELS = 50, 121
COMPARTMENTS = 2  # the first features, one-hot; the others are motifs
MOTIFS_A_MODULE, MOTIF_RATE, BACKGROUND_RATE = 6, 0.3, 0.004
ANNOTATED = 0.57  # share of nodes that carry motifs
FUNCTIONAL = 0.5  # share of functional edges, before those that repeat one another are merged
LABEL_DENSITY, LABEL_CONCENTRATION = 0.3, 3.0
DEGREE_SPREAD = 0.9  # of the logarithm of a node's propensity to have edges: a heavy tail


@dataclass
class Tissue:
    """A graph of proteins. x: float32 (N, 50); y: float32 (N, 121) of 0 and 1; edge_index: int64 (2, E), both
    directions of every edge. Of a synthetic graph also functional: bool (E,), the true kind of every edge; and
    complex: int64 (N,), ids of the graph's own."""

    x: Tensor
    y: Tensor
    edge_index: Tensor
    functional: Tensor | None = None
    complex: Tensor | None = None

    @property
    def num_nodes(self) -> int:
        return len(self.x)

    @property
    def num_edges(self) -> int:
        return self.edge_index.shape[1]


@dataclass(frozen=True)
class Recipe:
    """Sizes: nodes of every graph in each split, modules, nodes a complex (mean), and edges a node (mean, before
    those that repeat one another are merged)."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]
    modules: int
    complex_size: int
    degree: float


SMALL = Recipe(
    train=(555, 453, 527, 585, 310, 343, 324, 584, 375, 394, 550, 419), val=(450, 450), test=(450, 450),
    modules=10, complex_size=24, degree=20,
)  # fmt: skip
PPI_SIZED = Recipe(  # the real graphs' numbers of nodes
    train=(1767, 1377, 2263, 2339, 1578, 1021, 1823, 2488, 591, 3312,
           2401, 1878, 1819, 3480, 2794, 2326, 2650, 2815, 3163, 3021),
    val=(3230, 3284), test=(3224, 2300), modules=24, complex_size=45, degree=50,
)  # fmt: skip


def ppi_stand_in(recipe: Recipe, seed: int = 0) -> dict[str, list[Tissue]]:
    """Synthetic graphs in the splits "train", "val" and "test", the same for the same seed; features are
    standardised over the training nodes."""
    rng = np.random.default_rng(seed)
    rates = np.full((recipe.modules, FEATURES - COMPARTMENTS), BACKGROUND_RATE)
    for module in range(recipe.modules):
        rates[module, rng.choice(rates.shape[1], MOTIFS_A_MODULE, replace=False)] = MOTIF_RATE
    odds = LABEL_CONCENTRATION * (1 - LABEL_DENSITY) / LABEL_DENSITY
    frequency = rng.beta(LABEL_CONCENTRATION, odds, LABELS).clip(0.03, 0.95)
    labels = rng.random((recipe.modules, LABELS)) < frequency
    # A label that all modules have, or none, would ask nothing: turn it around in one of them.
    constant = labels.all(axis=0) | ~labels.any(axis=0)
    labels[rng.integers(recipe.modules, size=LABELS), np.arange(LABELS)] ^= constant
    sizes = {"train": recipe.train, "val": recipe.val, "test": recipe.test}
    splits = {name: [_tissue(n, recipe, rates, labels, rng) for n in nodes] for name, nodes in sizes.items()}
    features = torch.cat([graph.x for graph in splits["train"]])
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    for graph in chain.from_iterable(splits.values()):
        graph.x = (graph.x - mean) / std
    return splits


def _tissue(nodes: int, recipe: Recipe, rates: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Tissue:
    count = max(4, 2 * round(nodes / recipe.complex_size / 2))  # of complexes, even: they are paired
    compartment = np.arange(count) % COMPARTMENTS
    module = rng.choice(recipe.modules, count, replace=count > recipe.modules)
    member = np.sort(rng.integers(count, size=nodes))  # each node's complex
    pairs = _edges(member, _decoys(module, rng), recipe.degree, rng)
    functional = member[pairs[0]] == member[pairs[1]]

    motifs = (rng.random((nodes, rates.shape[1])) < rates[module[member]]) & (rng.random((nodes, 1)) < ANNOTATED)
    features = np.concatenate([np.eye(COMPARTMENTS)[compartment[member]], motifs], axis=1)
    place = rng.permutation(nodes)  # the order of the nodes must not give the complexes away
    order = np.argsort(place)
    return Tissue(
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
    # A partner is drawn from its complex in proportion to its propensity: nodes are sorted by complex, so that a
    # complex is a stretch of the cumulative propensity.
    total = np.concatenate([[0], propensity.cumsum()])
    first = np.searchsorted(member, np.arange(len(decoy) + 1))
    low, high = total[first[partner]], total[first[partner + 1]]
    target = np.searchsorted(total, rng.uniform(low, high), side="right") - 1
    joined = (source != target) & (low < high)  # a complex may be empty
    pairs = np.stack([source, target.clip(0, nodes - 1)])[:, joined]
    return np.unique(np.sort(pairs, axis=0), axis=1)
