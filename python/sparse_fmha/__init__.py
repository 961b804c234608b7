"""Sparse attention in one fused kernel family, on the CPU and on Hopper GPUs.

Tensors have the layout `[B, *L, H, D]`, heads last. `*L` is one axis of tokens (a sequence) or the
one to three axes of a grid.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sparse_fmha import _ops, nn, patterns, reference, selection
from sparse_fmha._arch import allow_untested, arch_override
from sparse_fmha._build import build_info, kernels
from sparse_fmha.attention import (
    attention,
    block_sparse_attention,
    neighborhood_attention,
    row_attention,
    stripe_attention,
)
from sparse_fmha.cost import flops as _flops
from sparse_fmha.cost.explanation import Explanation, explain
from sparse_fmha.cost.exploration import explore
from sparse_fmha.cost.simulation import Simulation, simulate
from sparse_fmha.decode import decode_attention
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.merge import merge
from sparse_fmha.sdpa import route_sdpa, sdpa
from sparse_fmha.selection.reductions import score_sums
from sparse_fmha.skipping import SkipStats
from sparse_fmha.varlen import varlen_attention, varlen_neighborhood_attention

try:
    __version__ = version("sparse-fmha")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0.0.0+tree"

__all__ = [
    "BlockGrid",
    "BlockMask",
    "Explanation",
    "Simulation",
    "SkipStats",
    "StripeMask",
    "allow_untested",
    "arch_override",
    "attention",
    "block_sparse_attention",
    "build_info",
    "decode_attention",
    "explain",
    "explore",
    "kernels",
    "merge",
    "neighborhood_attention",
    "nn",
    "patterns",
    "reference",
    "route_sdpa",
    "row_attention",
    "score_sums",
    "sdpa",
    "selection",
    "simulate",
    "stripe_attention",
    "varlen_attention",
    "varlen_neighborhood_attention",
]

_ops.register()
_flops.register()
