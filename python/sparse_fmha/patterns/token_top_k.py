"""Token-level top-k selection for each group of queries, with a local window."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha._checks import check_floats, check_int, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import CACHED, SLICE, ceil_div
from sparse_fmha.masks import block_lists, stripe_checks
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.selection import pool_blocks, top_k_indices
from sparse_fmha.selection.largest import looks

HELD = 1 << 23  # scores in memory at a time on the CPU; fewer make the product slower


@plain_ints
def token_top_k(
    q: Tensor,
    k: Tensor,
    keys: int,
    *,
    local: int = 128,
    first: int = 0,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns a causal mask of the keys with the largest scores by each group's mean query.

        score of key j for group g = mean of q over g . k_j

    A group sees its local tokens and the top-scoring keys before them. Source: the token-level
    selection of DHSA (Xiong et al. 2025, arXiv:2510.24606), with single keys as its chunks, and
    lists per head where DHSA averages heads. For other scores, such as the learned ones of
    trainable dynamic mask attention, use `token_top_k_mask`.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        keys, local, first, block_q, range_size: as in `token_top_k_mask`.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        The scores of all keys before each group's window are computed, a few groups at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    batch, q_len, heads, _ = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    check_int("keys", keys)
    window = LocalWindow(q_len, kv_len, local, first, block_q, range_size)
    step = max(1, (HELD if q.device.type == "cpu" else 4 * SLICE) // max(1, kv_len))
    made = []
    with torch.no_grad(), without_autocast(q.device):
        for b, h in itertools.product(range(batch), range(heads)):
            columns = k[b, :, h // group]
            parts = []
            for g in range(0, window.groups, step):
                part = slice(g, min(g + step, window.groups))
                rows = q[b : b + 1, g * block_q : part.stop * block_q, h : h + 1]
                means = pool_blocks(rows, block_q)[0, :, 0]
                seen = window.before(part.stop - 1, kv_len)
                scores = _products(means, columns[:seen])
                parts.append(window.lists(scores[None, None], part, keys))
            made.append([torch.cat(part, 2) for part in zip(*parts, strict=True)])
    if not made or not window.groups:
        sizes = batch, heads, window.groups
        counts = torch.zeros(sizes, dtype=torch.int32, device=q.device)
        columns = counts.new_full((*sizes, min(keys, kv_len)), block_lists.ABSENT)
        return window.mask(columns, counts)
    counts, columns = (
        torch.cat(part, 1).unflatten(1, (batch, heads))[0] for part in zip(*made, strict=True)
    )
    return window.mask(columns, counts)


@plain_ints
def token_top_k_mask(
    scores: Tensor,
    keys: int,
    q_len: int,
    *,
    local: int = 128,
    first: int = 0,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns a causal mask of a local window and the top-scoring keys before it.

    Args:
        scores: `[B|1, H|1, groups|1, kv_len]`; with one group, scores depend only on the key. Keys
            with -inf are not taken, but see first; among equal scores, the first is taken.
        keys: keys to take for each group of queries; fewer if fewer are before the window.
        q_len: queries, aligned to the last keys; at most kv_len.
        local: keys before a group's first query that it always sees, rounded up to whole runs.
        first: how many first keys to take before all others, whatever their scores; they count
            towards `keys`.
        block_q, range_size: group and run sizes of the mask.

    Returns:
        A mask with lists for the batch entries and heads of the scores, built without waiting for
        the device. All `groups * kv_len` scores are read, a few groups at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_floats("scores", scores, 4, "[batch or 1, heads or 1, groups or 1, kv_len]")
    check_int("keys", keys)
    window = LocalWindow(q_len, scores.shape[3], local, first, block_q, range_size)
    if scores.shape[2] not in (1, window.groups):
        raise ValueError(
            f"scores must have 1 or {window.groups} groups, for {q_len} queries in groups of "
            f"{block_q}, got {scores.shape[2]}"
        )
    batch, heads, _, kv_len = scores.shape
    scores = scores.detach().expand(-1, -1, window.groups, -1)

    def listed(part: slice) -> tuple[Tensor, Tensor]:
        own = scores[:, :, part, : window.before(part.stop - 1, kv_len)].to(
            torch.float32, copy=True
        )
        return window.lists(own, part, keys)

    row = batch * heads * kv_len
    parts = block_lists.chunks(window.groups, row, scores.device, 1 << 18)
    counts, columns = block_lists.by_chunks(listed, parts, window.groups, 2)
    return window.mask(columns, counts)


def _products(means: Tensor, keys: Tensor) -> Tensor:
    """Returns `means @ keys.T` in fp32; on the CPU, as many keys at a time as fit in its cache."""
    if not looks(keys):
        return means @ keys.float().T
    step = max(1, CACHED // max(1, keys.shape[1]))
    scores = means.new_empty(means.shape[0], keys.shape[0])
    for part, own in zip(keys.split(step), scores.split(step, 1), strict=True):
        torch.mm(means, part.float().T, out=own)
    return scores


class LocalWindow:
    """The runs around each group's queries; they start at multiples of the run size."""

    def __init__(
        self, q_len: int, kv_len: int, local: int, first: int, block_q: int, range_size: int
    ) -> None:
        stripe_checks.check_sizes(q_len, kv_len, block_q, range_size, True)
        if kv_len < q_len:
            raise ValueError(f"k must have at least the {q_len} tokens of q, got {kv_len}")
        self.sizes = q_len, kv_len, block_q, range_size
        self.local, self.first = check_int("local", local), check_int("first", first)
        self.groups = ceil_div(q_len, block_q)

    def begins(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the first key of each group's window and the end of the group, int64 [groups]."""
        q_len, kv_len, block_q, size = self.sizes
        group = torch.arange(self.groups, device=device)
        at = group * block_q + (kv_len - q_len)
        begin = (at - self.local).clamp(min=0) // size * size
        return begin, ((group + 1) * block_q).clamp(max=q_len) + (kv_len - q_len)

    def before(self, group: int, unknown: int) -> int:
        """Returns how many keys are before a group's window; `unknown` under tracing."""
        q_len, kv_len, block_q, size = self.sizes
        if torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for n in self.sizes):
            return unknown
        return max(group * block_q + kv_len - q_len - self.local, 0) // size * size

    def lists(self, scores: Tensor, part: slice, keys: int) -> tuple[Tensor, Tensor]:
        """Returns the lists of keys taken before the windows of some groups.

        Args:
            scores: fp32, of all keys or of those before the last group's window; overwritten.
        """
        begin, _ = self.begins(scores.device)
        least = self.before(part.start, 0)
        key = torch.arange(least, scores.shape[3], device=scores.device)
        scores[..., : self.first] = torch.inf
        scores[..., least:].masked_fill_(key >= begin[part, None], -torch.inf)
        counts, columns = top_k_indices(scores, keys)
        width = min(keys, self.sizes[1])
        return counts, pad(columns, (0, width - columns.shape[-1]), value=block_lists.ABSENT)

    def mask(self, columns: Tensor, counts: Tensor) -> StripeMask:
        q_len, kv_len, block_q, size = self.sizes
        begin, end = self.begins(counts.device)
        width = ceil_div(block_q + self.local, size) + 1
        starts = begin[:, None] + size * torch.arange(width, device=counts.device)
        listed = starts < end[:, None]
        starts = torch.where(listed, starts, block_lists.ABSENT).int()
        number = listed.sum(-1, dtype=torch.int32)
        lists = counts.shape[:2]
        return StripeMask(
            columns, counts, q_len, kv_len, block_q,
            starts.expand(*lists, -1, -1), number.expand(*lists, -1), size, causal=True,
        )  # fmt: skip
