"""Published sparse attention methods as masks.

Each function builds a `BlockMask`, or a `StripeMask` if the method selects single keys; those whose
names end in `_attention` compute the whole method. `quest`, `snapkv`, `SeerDecodeGate`,
`HipSearch`, `MoaCache`, `newest_tokens` and those whose names end in `_cache` choose keys for
`decode_attention`. The docstrings have the formula, the source and the published defaults.
docs/patterns.md lists all patterns in one table.
"""

from sparse_fmha.patterns.anchor import AnchorResult, anchor_attention
from sparse_fmha.patterns.biformer import BiFormerLayout, biformer, image_regions
from sparse_fmha.patterns.biformer_packed import BiFormerPacking, biformer_packed
from sparse_fmha.patterns.bigbird import bigbird
from sparse_fmha.patterns.cube_top_k import cube_top_k
from sparse_fmha.patterns.cubes import CubeOrder
from sparse_fmha.patterns.dhsa import dhsa, dhsa_blocks
from sparse_fmha.patterns.dhsa_boundaries import dhsa_boundaries, dhsa_ratios
from sparse_fmha.patterns.dma import DMABias, DMAMask, dma_attention, dma_mask
from sparse_fmha.patterns.documents import documents
from sparse_fmha.patterns.draft import draft
from sparse_fmha.patterns.flexprefill import flexprefill_query_aware
from sparse_fmha.patterns.flexprefill_mask import flexprefill_mask
from sparse_fmha.patterns.head_search import HeadSearch, search_heads
from sparse_fmha.patterns.hip import hip
from sparse_fmha.patterns.hip_decode import HipSearch
from sparse_fmha.patterns.light_forcing import (
    LightForcingLayout,
    light_forcing,
    light_forcing_sparsity,
)
from sparse_fmha.patterns.longformer import longformer
from sparse_fmha.patterns.minference import minference_block_sparse
from sparse_fmha.patterns.minference_heads import (
    load_minference,
    minference_attention,
    minference_heads,
)
from sparse_fmha.patterns.mminference_boundary import ModalityOrder, mminference_boundary
from sparse_fmha.patterns.mminference_grid import (
    GridLines,
    mminference_grid_attention,
    mminference_grid_lines,
)
from sparse_fmha.patterns.moa import moa
from sparse_fmha.patterns.nabla import nabla
from sparse_fmha.patterns.per_head import HeadMethod, WholeMethod, join_heads, per_head_attention
from sparse_fmha.patterns.pka import keyword_rows, pka_attention
from sparse_fmha.patterns.power_attention import power_attention
from sparse_fmha.patterns.psa import psa_attention, psa_levels
from sparse_fmha.patterns.quest import PageBounds, quest, quest_page_table
from sparse_fmha.patterns.radial import radial
from sparse_fmha.patterns.rectified import Rectified, rectified, rectified_attention
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.patterns.s2_attention import s2_attention
from sparse_fmha.patterns.seer_attention import SeerAttentionGate
from sparse_fmha.patterns.seer_decode import SeerDecodeGate, SeerKeys
from sparse_fmha.patterns.seer_files import load_seer_gates
from sparse_fmha.patterns.seer_truth import seer_ground_truth
from sparse_fmha.patterns.sliding_tile import sliding_tile
from sparse_fmha.patterns.snapkv import kept_rows, snapkv
from sparse_fmha.patterns.sol import sol_attention, sol_blocks
from sparse_fmha.patterns.sparsifiner import (
    SparsifinerPredictor,
    sparsifiner_distillation_loss,
)
from sparse_fmha.patterns.ssa import SSAStreams, ssa, ssa_alignment, ssa_attention, ssa_streams
from sparse_fmha.patterns.static_cache import (
    MoaCache,
    power_attention_cache,
    s2_attention_cache,
    streaming_llm_cache,
)
from sparse_fmha.patterns.streaming_llm import streaming_llm
from sparse_fmha.patterns.subblock import subblock
from sparse_fmha.patterns.svg import svg_attention, svg_heads, svg_mask
from sparse_fmha.patterns.token_lists import newest_tokens
from sparse_fmha.patterns.token_sparse import token_sparse_attention, token_sparse_indices
from sparse_fmha.patterns.token_top_k import token_top_k, token_top_k_mask
from sparse_fmha.patterns.vertical_slash import (
    last_query_sums,
    vertical_slash,
    vertical_slash_mask,
)
from sparse_fmha.patterns.vsa import vsa_attention

__all__ = [
    "AnchorResult",
    "BiFormerLayout",
    "BiFormerPacking",
    "CubeOrder",
    "DMABias",
    "DMAMask",
    "GridLines",
    "HeadMethod",
    "HeadSearch",
    "HipSearch",
    "LightForcingLayout",
    "MoaCache",
    "ModalityOrder",
    "PageBounds",
    "Rectified",
    "RegionOrder",
    "SSAStreams",
    "SeerAttentionGate",
    "SeerDecodeGate",
    "SeerKeys",
    "SparsifinerPredictor",
    "WholeMethod",
    "anchor_attention",
    "biformer",
    "biformer_packed",
    "bigbird",
    "cube_top_k",
    "dhsa",
    "dhsa_blocks",
    "dhsa_boundaries",
    "dhsa_ratios",
    "dma_attention",
    "dma_mask",
    "documents",
    "draft",
    "flexprefill_mask",
    "flexprefill_query_aware",
    "hip",
    "image_regions",
    "join_heads",
    "kept_rows",
    "keyword_rows",
    "last_query_sums",
    "light_forcing",
    "light_forcing_sparsity",
    "load_minference",
    "load_seer_gates",
    "longformer",
    "minference_attention",
    "minference_block_sparse",
    "minference_heads",
    "mminference_boundary",
    "mminference_grid_attention",
    "mminference_grid_lines",
    "moa",
    "nabla",
    "newest_tokens",
    "per_head_attention",
    "pka_attention",
    "power_attention",
    "power_attention_cache",
    "psa_attention",
    "psa_levels",
    "quest",
    "quest_page_table",
    "radial",
    "rectified",
    "rectified_attention",
    "s2_attention",
    "s2_attention_cache",
    "search_heads",
    "seer_ground_truth",
    "sliding_tile",
    "snapkv",
    "sol_attention",
    "sol_blocks",
    "sparsifiner_distillation_loss",
    "ssa",
    "ssa_alignment",
    "ssa_attention",
    "ssa_streams",
    "streaming_llm",
    "streaming_llm_cache",
    "subblock",
    "svg_attention",
    "svg_heads",
    "svg_mask",
    "token_sparse_attention",
    "token_sparse_indices",
    "token_top_k",
    "token_top_k_mask",
    "vertical_slash",
    "vertical_slash_mask",
    "vsa_attention",
]
