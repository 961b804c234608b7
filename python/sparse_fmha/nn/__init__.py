"""Self-attention modules, with projections.

    layer = sparse_fmha.nn.NeighborhoodAttention(dim=512, num_heads=8, window=(7, 7))
    y = layer(x)  # x: [batch, height, width, 512]

The modules call `neighborhood_attention`, `block_sparse_attention` or `stripe_attention`, and
support the same dtypes, devices and gradients.
"""

from sparse_fmha.nn.masked import SparseSelfAttention
from sparse_fmha.nn.neighborhood import NeighborhoodAttention

__all__ = ["NeighborhoodAttention", "SparseSelfAttention"]
