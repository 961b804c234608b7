"""Modules: self-attention with its projections, as models have it.

    layer = sparse_fmha.nn.NeighborhoodAttention(dim=512, num_heads=8, window=(7, 7))
    y = layer(x)  # x: [batch, height, width, 512]

The attention itself is `neighborhood_attention`, `block_sparse_attention` or `stripe_attention`,
whose dtypes, devices and gradients these modules have.
"""

from sparse_fmha.nn.masked import SparseSelfAttention
from sparse_fmha.nn.neighborhood import NeighborhoodAttention

__all__ = ["NeighborhoodAttention", "SparseSelfAttention"]
