"""Graph attention: layers and a network of them, metrics (a module), and figures (a module)."""

from pdl_utils.graphs import metrics, plots
from pdl_utils.graphs.layers import GATConv, GATv2Conv, GCNConv, GraphNet, UniformConv
