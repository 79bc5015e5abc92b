"""Graph attention: edges and what is computed over them, layers, metrics (a module), and figures (a module)."""

from pdl_utils.graphs import metrics, plots
from pdl_utils.graphs.edges import SortedEdges, edge_softmax, pair_scores, weighted_sum
from pdl_utils.graphs.layers import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv

__all__ = [
    "GATConv", "GATv2Conv", "GCNConv", "GraphNet", "SortedEdges", "UniformConv",
    "edge_softmax", "metrics", "pair_scores", "plots", "weighted_sum",
]  # fmt: skip
