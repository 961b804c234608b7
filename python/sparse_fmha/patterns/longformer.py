"""Longformer: a dilated window and global tokens, exact for tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._pattern_checks import check_int
from sparse_fmha.block_grid import BlockGrid
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.patterns._static import from_rules


def longformer(
    length: int,
    *,
    window: int = 512,
    dilation: int | Sequence[int] = 1,
    global_tokens: Sequence[int] = (0,),
    causal: bool = False,
    block_q: int = 128,
    block_kv: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask of Longformer: a sliding window, dilated or not, and global tokens.

    Query i sees key j where

        |i - j| <= dilation * window / 2  and  (i - j) mod dilation == 0,

    or where i or j is global: a global token sees all tokens and is seen by all. With `causal` also
    `j <= i`. Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer",
    arXiv:2004.05150, section 3.1; defaults: window 512, no dilation, [CLS] (token 0) global.
    There global tokens have projections of their own.

    Blocks that are visible in part have bitmasks of `block_q * block_kv` bits. The lists of all
    query blocks have room for what the fullest one has, so a global token in a block with others
    takes bitmasks for all pairs of blocks: `length**2 / 8` bytes for each list. With dilation all
    blocks of the window are partial.

    Args:
        length: tokens, of queries and keys.
        window: even, at least 2; half of it on each side.
        dilation: at least 1; a sequence has one for each query head, one int serves all.
        global_tokens: positions, below 0 from the end.
        causal: as of `BlockMask`.
        block_q, block_kv, device: of the mask.

    Raises:
        ValueError, TypeError: sizes or positions that are not allowed.
    """
    check_int("window", window, 2)
    if window % 2:
        raise ValueError(f"window is {window}; an even number is needed, half for each side")
    dilations = list(dilation) if isinstance(dilation, Sequence) else [dilation]
    if not dilations:
        raise ValueError("dilation is empty; one for each query head is needed")
    for entry in dilations:
        check_int("dilation", entry, 1)
    grid = BlockGrid(length, length, block_q, block_kv, causal=causal)
    every = torch.zeros(length, dtype=torch.bool)
    rows = columns = grid.none()
    for token in global_tokens:
        if not -length <= check_int("global_tokens", token, -length) < length:
            raise ValueError(f"global_tokens has {token}; there are {length} tokens")
        token = token % length
        every[token] = True
        rows = rows | grid.queries(token, token + 1)
        columns = columns | grid.keys(token, token + 1)
    least, most = grid.distances()
    whole_rows = _whole(every, block_q)[:, None]
    whole_columns = _whole(every, block_kv)
    full, some = [], []
    for entry in dilations:
        reach = entry * (window // 2)
        low, high = least.clamp(min=0 if causal else -reach), most.clamp(max=reach)
        band = low <= torch.div(high, entry, rounding_mode="floor") * entry
        inside = (most <= reach) if causal else (most <= reach) & (least >= -reach)
        some.append((band | rows | columns) & grid.reachable())
        full.append(some[-1] & (inside & (entry == 1) | whole_rows | whole_columns))
    every = every.to(device)

    def rule(entry: int):
        def visible(q: Tensor, k: Tensor) -> Tensor:
            apart = q - k
            near = (apart.abs() <= entry * (window // 2)) & (apart % entry == 0)
            return near | every[q] | every[k]

        return visible

    rules = [rule(entry) for entry in dilations]
    sizes = (length, length, block_q, block_kv)
    return from_rules(rules, torch.stack(full), torch.stack(some), *sizes, causal, device)


def _whole(every: Tensor, block: int) -> Tensor:
    """Blocks of which each token is global."""
    padded = torch.nn.functional.pad(every, (0, -len(every) % block), value=True)
    return padded.view(-1, block).all(1)
