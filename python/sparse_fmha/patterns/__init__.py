"""Published sparse attention methods as masks.

Each function builds a `BlockMask`, or a `StripeMask` if the method selects single keys;
`anchor_attention` computes the whole method, `quest` and `snapkv` choose keys of a cache for
`decode_attention`. The docstrings have the formula, the source and the
published defaults. docs/patterns.md lists all patterns in one table.
"""

from sparse_fmha.patterns.anchor import AnchorResult, anchor_attention
from sparse_fmha.patterns.biformer import BiFormerLayout, biformer, image_regions
from sparse_fmha.patterns.bigbird import bigbird
from sparse_fmha.patterns.documents import documents
from sparse_fmha.patterns.flexprefill import flexprefill_query_aware
from sparse_fmha.patterns.longformer import longformer
from sparse_fmha.patterns.minference import minference_block_sparse
from sparse_fmha.patterns.moa import moa
from sparse_fmha.patterns.power_attention import power_attention
from sparse_fmha.patterns.quest import PageBounds, quest, quest_page_table
from sparse_fmha.patterns.regions import RegionOrder
from sparse_fmha.patterns.s2_attention import s2_attention
from sparse_fmha.patterns.seer_attention import SeerAttentionGate
from sparse_fmha.patterns.seer_truth import seer_ground_truth
from sparse_fmha.patterns.snapkv import kept_rows, snapkv
from sparse_fmha.patterns.streaming_llm import streaming_llm
from sparse_fmha.patterns.token_top_k import token_top_k, token_top_k_mask
from sparse_fmha.patterns.vertical_slash import (
    last_query_sums,
    vertical_slash,
    vertical_slash_mask,
)

__all__ = [
    "AnchorResult",
    "BiFormerLayout",
    "PageBounds",
    "RegionOrder",
    "SeerAttentionGate",
    "anchor_attention",
    "biformer",
    "bigbird",
    "documents",
    "flexprefill_query_aware",
    "image_regions",
    "kept_rows",
    "last_query_sums",
    "longformer",
    "minference_block_sparse",
    "moa",
    "power_attention",
    "quest",
    "quest_page_table",
    "s2_attention",
    "seer_ground_truth",
    "snapkv",
    "streaming_llm",
    "token_top_k",
    "token_top_k_mask",
    "vertical_slash",
    "vertical_slash_mask",
]
