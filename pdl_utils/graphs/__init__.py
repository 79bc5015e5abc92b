"""Graph attention: sorted edges, layers and what they are made of, metrics (a module), and figures (a module)."""

from pdl_utils.graphs import metrics, plots
from pdl_utils.graphs.layers import GATConv, GATv2Conv, GCNConv, GraphNet, SortedEdges, UniformConv
