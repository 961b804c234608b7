"""The public functions: they check their arguments and call the ops."""

from sparse_fmha.attention.block_sparse import block_sparse_attention
from sparse_fmha.attention.dense import attention
from sparse_fmha.attention.neighborhood import neighborhood_attention
from sparse_fmha.attention.rows import row_attention
from sparse_fmha.attention.stripe import stripe_attention

__all__ = [
    "attention",
    "block_sparse_attention",
    "neighborhood_attention",
    "row_attention",
    "stripe_attention",
]
