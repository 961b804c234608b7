"""StreamingLLM: a sliding window and attention sinks, token-exact."""

from __future__ import annotations

import torch

from sparse_fmha._checks import check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_checks import check_sizes
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import from_ranges, from_rules


@plain_ints
def streaming_llm(
    q_len: int,
    kv_len: int,
    *,
    window: int = 1020,
    sink: int = 4,
    block_q: int = 128,
    block_kv: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the causal mask of StreamingLLM: the last `window` tokens and the first `sink`.

    A query at position p sees the keys `j <= p` with `p - j < window` or `j < sink`; the window
    includes the query's own token. Source: Xiao et al. 2023, "Efficient Streaming Language Models
    with Attention Sinks", arXiv:2309.17453, section 3; defaults: 4 sinks and 1020 recent tokens, a
    cache of 1024. (The paper encodes positions within the cache.)

    Blocks that an edge cuts are partial, with bitmasks of `block_q * block_kv` bits; a query block
    has at most `ceil(block_q / block_kv) + 2` of them.

    Args:
        q_len, kv_len: tokens; query i is at position `i + kv_len - q_len`.
        window: tokens, at least 1. sink: tokens, at least 0.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """
    check_int("window", window, 1)
    check_int("sink", sink)
    sizes = (q_len, kv_len, block_q, block_kv)
    check_sizes(*sizes, True)
    blocks_kv = ceil_div(kv_len, block_kv)
    shift = kv_len - q_len
    first = torch.arange(ceil_div(q_len, block_q), device="cpu") * block_q + shift
    last = (first + block_q).clamp(max=kv_len) - 1
    reached = block_lists.reached(*sizes, True, first.device)
    # Of the window: the first key block with any visible pair, and the first with all pairs
    # visible, apart from the diagonal, which the causal flag cuts.
    some = (first - window + 1).clamp(min=0) // block_kv
    whole = torch.minimum(ceil_div((last - window + 1).clamp(min=0), block_kv), reached)
    some_sinks = ceil_div(min(sink, kv_len), block_kv)
    whole_sinks = blocks_kv if sink >= kv_len else sink // block_kv
    start = torch.zeros_like(first)
    full = from_ranges(
        [(start, reached.clamp(max=whole_sinks)), (whole.clamp(min=whole_sinks), reached)]
    )
    partial = from_ranges(
        [
            (start + whole_sinks, whole.clamp(max=some_sinks)),
            (some.clamp(min=max(some_sinks, whole_sinks)), whole),
        ]
    )
    rules = [lambda q, k: (q + shift - k < window) | (k < sink)]
    nowhere = torch.zeros_like(first, dtype=torch.bool)
    sinks = torch.arange(blocks_kv, device="cpu") < some_sinks
    return from_rules(rules, full, partial, nowhere, sinks, *sizes, True, device)
