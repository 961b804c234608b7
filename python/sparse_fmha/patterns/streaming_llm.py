"""A sliding window and attention sinks, exact for tokens."""

from __future__ import annotations

import torch

from sparse_fmha._pattern_checks import check_int
from sparse_fmha.block_grid import BlockGrid
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.patterns._static import from_rules


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
    """The causal mask of StreamingLLM: the last `window` tokens and the first `sink`.

    A query at position p sees the keys `j <= p` with `p - j < window` or `j < sink`; the window has
    the query's own token. Source: Xiao et al. 2023, "Efficient Streaming Language Models with
    Attention Sinks", arXiv:2309.17453, section 3; defaults: 4 sinks and 1020 recent tokens, a cache
    of 1024. (There the positions that go into the position encoding are those in the cache.)

    Blocks that an edge cuts are partial, with bitmasks of `block_q * block_kv` bits; there are at
    most `ceil(block_q / block_kv) + 2` for each query block.

    Args:
        q_len, kv_len: tokens; query i stands at position `i + kv_len - q_len`.
        window: tokens, at least 1. sink: tokens, at least 0.
        block_q, block_kv, device: of the mask.

    Raises:
        ValueError, TypeError: sizes that are not allowed.
    """
    check_int("window", window, 1)
    check_int("sink", sink)
    grid = BlockGrid(q_len, kv_len, block_q, block_kv, causal=True)
    some = (grid.local(window) | grid.sink(sink)) & grid.reachable()
    cut = (grid.distances()[1] >= window) & grid.keys(sink)
    full = some & ~cut  # the diagonal may cut it, which is the flag's
    shift = kv_len - q_len
    rules = [lambda q, k: (q + shift - k < window) | (k < sink)]
    sizes = (q_len, kv_len, block_q, block_kv)
    return from_rules(rules, full[None], some[None], *sizes, True, device)
