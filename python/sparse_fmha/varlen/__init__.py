"""Attention over packed sequences and packed grids of different sizes."""

from sparse_fmha.varlen import gradients as _gradients  # noqa: F401  registers a backward pass
from sparse_fmha.varlen.grids import varlen_neighborhood_attention
from sparse_fmha.varlen.sequences import varlen_attention

__all__ = ["varlen_attention", "varlen_neighborhood_attention"]
