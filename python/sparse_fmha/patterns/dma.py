"""Trainable dynamic mask attention, which keeps keys by a learned bias of their scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus

from sparse_fmha._checks import check_floats, check_int, check_qkv, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import stripe_attention
from sparse_fmha.masks import block_lists, stripe_checks
from sparse_fmha.masks.stripe_mask import StripeMask

KEEP = 2048
BLOCK_Q = 128
RANKS = 256  # of a range; counts are made for each group and range


class DMABias(nn.Module):
    """The learned bias of trainable dynamic mask attention, from the values.

        bias_hj = exp(A_h * softplus(W_h . v_j)),    v_j: the values of all key heads of token j

    A is 0 at first, so every bias is 1. Source: Shi et al. 2025, "Trainable Dynamic Mask Sparse
    Attention", arXiv:2508.02124, and the authors' flash-dmattn.

    Args:
        heads_kv, head_dim: sizes of v.
        device, dtype: device and dtype of the weights; None: torch's default.

    Attributes:
        weight: `[heads_kv, heads_kv * head_dim]`.
        decay: A, `[heads_kv]`.

    Raises:
        ValueError, TypeError: a size is not allowed.
    """

    @plain_ints
    def __init__(
        self,
        heads_kv: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads_kv = check_int("heads_kv", heads_kv, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        width = heads_kv * head_dim
        self.weight = nn.Parameter(torch.empty(heads_kv, width, device=device, dtype=dtype))
        self.decay = nn.Parameter(torch.empty(heads_kv, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes weights from a normal distribution with variance 1 / inputs, and A with 0."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.decay)

    def forward(self, v: Tensor) -> Tensor:
        """Returns the bias of each key, fp32 `[B, heads_kv, Lkv]`.

        Args:
            v: `[B, Lkv, heads_kv, head_dim]`.

        Raises:
            ValueError, TypeError: v has another shape or is not floating point.
        """
        check_floats("v", v, 4, "[batch, tokens, key heads, head dim]")
        if v.shape[2:] != (self.heads_kv, self.head_dim):
            raise ValueError(
                f"v must have {self.heads_kv} heads of {self.head_dim}, got shape {list(v.shape)}"
            )
        z = linear(v.flatten(2), self.weight.to(v.dtype)).float()
        return (self.decay.float() * softplus(z)).exp().transpose(1, 2)


class DMAMask(NamedTuple):
    """Arguments of `stripe_attention`; see `dma_mask`."""

    mask: StripeMask
    key_bias: Tensor  # fp32 [B, heads or 1, Lkv], differentiable
    row_threshold: Tensor  # fp32 [B, heads or 1, Lq]


@plain_ints
def dma_mask(
    bias: Tensor,
    keep: int = KEEP,
    *,
    heads: int | None = None,
    q_len: int | None = None,
    block_q: int = BLOCK_Q,
) -> DMAMask:
    """Returns which keys trainable dynamic mask attention keeps, without a mask of all pairs.

        query i keeps the w keys j <= i with the largest bias_j

    A group of queries lists the w largest keys before it and its own keys, as no other key can be
    among the w largest of one of its rows. A row's threshold is the w-th largest bias of the keys
    up to it, -inf if there are fewer. So among keys whose bias equals the threshold a row may keep
    more than w: those in its own group, and the latest before it that were still among the w.

    Args:
        bias: `[B, Hkv, Lkv]`, such as `DMABias` returns. Its gradient comes through `key_bias`; the
            choice of keys has none.
        keep: w, at least 1. Published: 2048; 1024 in its benchmarks.
        heads: query heads, a multiple of Hkv; default Hkv.
        q_len: queries, aligned to the last keys; default Lkv.
        block_q: rows of a group, a multiple of 64 up to 2048.

    Returns:
        A causal mask with lists of up to `keep` keys, the bias for each query head, and the rows'
        thresholds. Built without waiting for the device; memory is proportional to
        `Lq / block_q * keep` and `Lq * block_q`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_floats("bias", bias, 3, "[batch, key heads, tokens]")
    check_int("keep", keep, 1)
    _, heads_kv, kv_len = bias.shape
    heads = heads_kv if heads is None else check_int("heads", heads, 1)
    if not heads_kv or heads % heads_kv:
        raise ValueError(f"heads must be a multiple of bias's {heads_kv}, got {heads}")
    q_len = kv_len if q_len is None else check_int("q_len", q_len)
    if q_len > kv_len:
        raise ValueError(f"q_len must be at most the {kv_len} keys of bias, got {q_len}")
    check_int("block_q", block_q)
    run = 128 if block_q % 128 == 0 else 64
    stripe_checks.check_sizes(q_len, kv_len, block_q, run, True)
    with torch.no_grad():
        columns, threshold = _select(bias.float(), keep, kv_len - q_len, block_q)
        begin = torch.arange(columns.shape[2], device=bias.device) * block_q + (kv_len - q_len)
        counts = begin.clamp(max=keep).int().expand(columns.shape[:3])
        starts = begin[:, None] + run * torch.arange(block_q // run, device=bias.device)
        numbers = (starts < kv_len).sum(1, dtype=torch.int32)
        starts = starts.int()
    copies = heads // heads_kv if heads_kv > 1 else 1  # one head serves all
    columns, counts, threshold = (
        x.repeat_interleave(copies, 1) for x in (columns, counts, threshold)
    )
    lists = counts.shape[:2]
    mask = StripeMask(
        columns, counts, q_len, kv_len, block_q,
        starts.expand(*lists, -1, -1), numbers.expand(*lists, -1), run, causal=True,
    )  # fmt: skip
    return DMAMask(mask, bias.float().repeat_interleave(copies, 1), threshold)


@plain_ints
def dma_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    keep: int = KEEP,
    *,
    scale: float | None = None,
    block_q: int = BLOCK_Q,
) -> Tensor:
    """Causal attention to the keys of largest bias, with the bias added to their scores.

    See `dma_mask`. The backward pass has the gradient of the bias, with which `DMABias` trains.
    Runs on the CPU and on Hopper GPUs.

    Args:
        q: `[B, Lq, Hq, D]`. For dtypes, strides and D see `sparse_fmha.attention`.
        k, v: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        bias: `[B, Hkv or 1, Lkv]`.
        keep, block_q: see `dma_mask`.
        scale: factor of q.k; default `D**-0.5`.

    Returns:
        `out`, `[B, Lq, Hq, D]`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
        NotImplementedError: another GPU, for which no kernel takes `row_threshold` yet.
    """
    check_qkv(q, k, v, axes=(1,))
    made = dma_mask(bias, keep, heads=q.shape[2], q_len=q.shape[1], block_q=block_q)
    result: Tensor = stripe_attention(
        q, k, v, made.mask,
        scale=scale, key_bias=made.key_bias, row_threshold=made.row_threshold,
    )  # fmt: skip
    return result


def _select(bias: Tensor, keep: int, shift: int, block_q: int) -> tuple[Tensor, Tensor]:
    """The keys that groups list before their own, ascending, and the rows' thresholds.

    Args:
        bias: fp32 `[B, H, Lkv]`. shift: keys before the first query.

    Returns:
        int32 `[B, H, groups, width]`, filled up with -1; and fp32 `[B, H, Lq]`.
    """
    kv_len = bias.shape[2]
    q_len = kv_len - shift
    groups = ceil_div(q_len, block_q)
    width = min(keep, kv_len)
    begins = shift + block_q * torch.arange(groups, device=bias.device)
    ordered, rank, limits = _ranks(bias, keep, begins)

    def kept(part: slice) -> tuple[Tensor, Tensor]:
        listed = rank.flatten(0, 1)[:, None] < limits.flatten(0, 1)[:, part, None]
        return key, listed & (key < begins[part, None])

    key = torch.arange(kv_len, dtype=torch.int32, device=bias.device)
    lists = bias.shape[0] * bias.shape[1]
    _, columns = block_lists.build_lists(kept, lists, groups, kv_len, width, bias.device)
    columns = columns.view(*bias.shape[:2], groups, width)
    own = pad(rank[..., shift:], (0, groups * block_q - q_len), value=kv_len)
    own = own.unflatten(2, (groups, block_q))
    before = rank[:, :, None].expand(-1, -1, groups, -1).gather(3, columns.clamp(min=0).long())
    before = before.masked_fill(columns == block_lists.ABSENT, kv_len).sort(-1).values
    parts = block_lists.chunks(groups, bias.shape[0] * bias.shape[1] * block_q**2, bias.device)
    (last,) = block_lists.by_chunks(
        lambda part: (_last_kept(before[:, :, part], own[:, :, part], keep, kv_len),),
        parts, groups, 2,
    )  # fmt: skip
    threshold = pad(ordered, (0, 1), value=-torch.inf).gather(2, last.flatten(2).long())
    return columns, threshold[..., :q_len]


def _ranks(bias: Tensor, keep: int, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Biases in descending order, each key's place in it, and below which place a group's `keep`
    largest are.

    Of equal biases the later key comes first. Counts of ranks, by groups of keys and ranges of
    ranks, find the range that has the limit; one look at its keys finds the limit.

    Args:
        bias: fp32 `[B, H, Lkv]`. begins: int64 `[groups]`, ascending: keys before each group.

    Returns:
        fp32 and int32 `[B, H, Lkv]`, and int64 `[B, H, groups]`; the latter is Lkv for a group with
        fewer keys.
    """
    kv_len, groups = bias.shape[2], begins.shape[0]
    later_first = torch.sort(bias.flip(2), dim=-1, descending=True, stable=True)
    order = kv_len - 1 - later_first.indices
    key = torch.arange(kv_len, device=bias.device)
    rank = torch.empty_like(order).scatter_(2, order, key.expand_as(order))
    ranges = ceil_div(kv_len, RANKS)
    # The first group whose keys before it have a key; none counts it from `groups` on.
    group = torch.searchsorted(begins, key, right=True)
    lists = torch.arange(bias.shape[0] * bias.shape[1], device=bias.device).view(*bias.shape[:2], 1)
    place = ((lists * ranges + rank // RANKS) * (groups + 1) + group).flatten()
    counts = torch.zeros(
        lists.numel() * (groups + 1) * ranges, dtype=torch.int32, device=key.device
    )
    counts.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    counts = counts.view(*bias.shape[:2], ranges, groups + 1)[..., :groups]
    # Keys before each group, up to each range. A scan of the last dimension is the fast one.
    upto = counts.cumsum(3).transpose(2, 3).contiguous().cumsum(3)
    chosen = (upto < keep).sum(3, keepdim=True)
    found = pad(upto, (1, 0)).gather(3, chosen)
    ranks = chosen * RANKS + torch.arange(RANKS, device=bias.device)
    keys = pad(order, (0, (ranges + 1) * RANKS - kv_len), value=kv_len)
    keys = keys[:, :, None].expand(-1, -1, groups, -1).gather(3, ranks)
    there = found + (keys < begins[:, None]).cumsum(3)
    limits = (chosen[..., 0] * RANKS + (there < keep).sum(3) + 1).clamp(max=kv_len)
    return later_first.values, rank.int(), limits


def _last_kept(before: Tensor, own: Tensor, keep: int, none: int) -> Tensor:
    """The place of each row's keep-th largest bias, of the keys before its group and the group's
    own up to the row; `none` if there are fewer.

    Own key j is among them for row i if fewer than `keep` keys are ahead of it: those before the
    group, and the own ones up to i. Keys before the group take what is left.

    Args:
        before: places `[..., width]`, ascending, `none` for those that are absent.
        own: places `[..., block_q]`. All places differ, but for `none`.
    """
    rows = own.shape[-1]
    before, own = before.contiguous(), own.contiguous()
    ahead = torch.searchsorted(before, own, out_int32=True)[..., None]
    smaller = own[..., None, :] < own[..., None]  # of two own keys
    ahead = ahead + smaller.cumsum(-1, dtype=torch.int16)  # [..., key, row]
    here = torch.ones(rows, rows, dtype=torch.bool, device=own.device).triu()
    kept = (ahead < keep) & here
    left = keep - kept.sum(-2)  # below 0 for rows past the end alone
    last = torch.where(kept, own[..., None], -1).amax(-2)
    padded = pad(pad(before, (1, 0), value=-1), (0, 1), value=none)
    return torch.maximum(last, padded.gather(-1, left.clamp(0, before.shape[-1] + 1)))
