"""The arguments of decode attention: what the op takes of them, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha._tables import Axis, check_table

BLOCKS = (16, 32, 64, 128)
TILE = 64  # keys that are computed, and skipped, together

Blocks = tuple[Tensor, Tensor, int]
Tokens = tuple[Tensor, Tensor | None]


class Keys(NamedTuple):
    """The op's arguments after seq_lens and before skip_threshold, in their order."""

    page_table: Tensor | None
    block_indices: Tensor | None
    block_counts: Tensor | None
    block: int
    token_indices: Tensor | None
    token_counts: Tensor | None
    head_starts: Tensor | None
    head_lengths: Tensor | None
    tree_mask: Tensor | None
    causal: bool
    window: int | None
    scale: float | None
    sink: Tensor | None


def of_blocks(blocks: Blocks | None) -> tuple[Tensor | None, Tensor | None, int]:
    if blocks is None:
        return None, None, TILE
    _check_tuple("blocks", blocks, 3, "(indices, counts, block)")
    indices, counts, block = blocks
    _check_given("blocks[0]", indices)
    _check_given("blocks[1]", counts)
    return indices, counts, block


def of_tokens(tokens: Tokens | None) -> tuple[Tensor | None, Tensor | None]:
    if tokens is None:
        return None, None
    _check_tuple("tokens", tokens, 2, "(indices, counts or None)")
    indices, counts = tokens
    _check_given("tokens[0]", indices)
    return indices, counts


def _check_tuple(name: str, value: object, length: int, parts: str) -> None:
    if not isinstance(value, Sequence) or len(value) != length:
        raise TypeError(f"{name} must be {parts}, got {_kind(value)}")


def _check_given(name: str, tensor: object) -> None:
    if tensor is None:
        raise TypeError(f"{name} must be a tensor, got None")


def _kind(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    keys: Keys,
    split_tokens: int | None,
    out: Tensor | None,
    devices: Sequence[str] = tuple(_checks.DTYPES),
) -> None:
    """Raises what the op would refuse, as a ValueError or TypeError."""
    _check_operands(q, k_cache, v_cache, keys.page_table is not None, devices)
    batch, len_q, heads_q = q.shape[:3]
    heads = k_cache.shape[2]
    check_table("seq_lens", seq_lens, q.device, (batch,), (batch, heads))
    if keys.page_table is not None:
        shapes: tuple[tuple[Axis, ...], ...] = (batch, "any"), (batch, heads, "any")
        check_table("page_table", keys.page_table, q.device, *shapes)
    _check_lists(keys, q, heads)
    _checks.check_flag("causal", keys.causal)
    if keys.window is not None:
        _checks.check_int("window", keys.window, 1)
    _checks.finite("scale", keys.scale)
    if keys.tree_mask is not None:
        words = ceil_div(len_q, 32)
        check_table("tree_mask", keys.tree_mask, q.device, (batch, len_q, words))
        if not keys.causal or keys.window is not None:
            raise ValueError(
                "tree_mask must be given with causal=True and without window, got "
                f"causal={keys.causal} and window={keys.window}"
            )
    if keys.sink is not None:
        check_table("sink", keys.sink, q.device, (heads_q,), dtype=torch.float32)
    if split_tokens is not None:
        _checks.check_int("split_tokens", split_tokens, TILE)
        if split_tokens % TILE:
            raise ValueError(f"split_tokens must be a multiple of {TILE}, got {split_tokens}")
    if out is not None:
        _check_out(out, q)


def _check_operands(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: bool, devices: Sequence[str]
) -> None:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.check_like(name, tensor, q, devices)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {list(tensor.shape)}")
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache must have q's head dim, {q.shape[3]}, got {k_cache.shape[3]}")
    _checks.check_one_dim(q, v_cache, "v_cache")
    _checks.check_head_dim("head dim of q", q.shape[3])
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"v_cache must have k_cache's shape, {list(k_cache.shape)}, got {list(v_cache.shape)}"
        )
    _checks.check_groups(q.shape[2], k_cache.shape[2], "k_cache and v_cache")
    if not paged and k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache must have q's batch without a page_table, {q.shape[0]}, got "
            f"{k_cache.shape[0]}"
        )


def _check_lists(keys: Keys, q: Tensor, heads: int) -> None:
    if (keys.head_starts is None) != (keys.head_lengths is None):
        given, missing = "head_starts", "head_lengths"
        if keys.head_starts is None:
            given, missing = missing, given
        raise ValueError(f"{missing} must be given with {given}, got only the latter")
    forms = {
        "blocks": keys.block_indices is not None,
        "tokens": keys.token_indices is not None,
        "head_starts": keys.head_starts is not None,
    }
    if sum(forms.values()) > 1:
        given = " and ".join(name for name, is_given in forms.items() if is_given)
        raise ValueError(f"at most one of {', '.join(forms)} must be given, got {given}")
    device, batch = q.device, q.shape[0]
    queries, own = (q.shape[1], 1), (heads, 1)  # 1: shared
    if forms["blocks"]:
        check_table("blocks[0]", keys.block_indices, device, (batch, own, "any"))
        check_table("blocks[1]", keys.block_counts, device, (batch, own))
        if _checks.check_int("blocks[2]", keys.block) not in BLOCKS:
            raise ValueError(f"blocks[2] must be {_checks.one_of(BLOCKS)}, got {keys.block}")
    if forms["tokens"]:
        check_table("tokens[0]", keys.token_indices, device, (batch, queries, own, "any"))
        if keys.token_counts is not None:
            check_table("tokens[1]", keys.token_counts, device, (batch, queries, own))
    if forms["head_starts"]:
        check_table("head_starts", keys.head_starts, device, (batch, heads))
        check_table("head_lengths", keys.head_lengths, device, (batch, heads))


def _check_out(out: Tensor, q: Tensor) -> None:
    _checks.check_like("out", out, q)
    if out.shape != q.shape:
        raise ValueError(f"out must have q's shape, {list(q.shape)}, got {list(out.shape)}")
    _checks.check_written("out", out)
