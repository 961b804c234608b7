"""MInference's vertical-slash heads: columns and diagonals, selected by the last queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_q_and_k, plain_ints
from sparse_fmha._sizes import SLICE, ceil_div
from sparse_fmha.masks import block_checks, block_lists, stripe_checks
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.selection import top_k_blocks
from sparse_fmha.selection.reductions import reductions


@plain_ints
def vertical_slash(
    q: Tensor,
    k: Tensor,
    *,
    vertical: int = 1000,
    slash: int = 6096,
    last: int = 64,
    first_columns: int = 30,
    last_diagonals: int = 100,
    scale: float | None = None,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns the causal vertical-slash pattern of MInference, for each head and input.

        A = softmax of the `last` queries over the keys they may see,
        column j has the weight sum over i of A[i, j],
        diagonal s has the weight sum over i of A[i, p_i - s], p_i the position of query i;
        the `vertical` heaviest columns and the `slash` heaviest diagonals are taken.

    Source: Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", arXiv:2407.02490, algorithm 2; defaults of its code: 64 queries, the
    first 30 columns and the last 100 diagonals forced, and 1000 columns and 6096 diagonals unless a
    search found better values. `vertical_slash_mask` describes how they become keys. Ties take the
    lowest column and the diagonal nearest to the query.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        vertical, slash: how many columns and diagonals to take, including the forced ones; all
            forced ones are taken even if there are more.
        last: how many of the last queries to use; Lq if there are fewer.
        first_columns, last_diagonals: forced; the last diagonals are those nearest to the query.
        scale: scale of q.k; default `D**-0.5`.
        block_q, range_size: group and run sizes of the mask.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        Its lists take `4 * (vertical + range_size + runs)` bytes for each group of queries and
        head, where runs is the smaller of `slash * ceil(block_q / range_size)` and
        `Lkv / range_size`. Selection takes the memory of `score_sums`. With 1000 columns, 200
        diagonals, 128k tokens and four query heads per key head (bf16, D = 128), lists for groups
        of 64 are 62% of K and V. For groups of 1024 with runs of 128 they are 7%, and each diagonal
        covers 1024 keys.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    for name, value in (("vertical", vertical), ("slash", slash)):
        check_int(name, value)
    check_int("first_columns", first_columns)
    check_int("last_diagonals", last_diagonals)
    columns, diagonals = last_query_sums(q, k, last, scale=scale)
    sizes = q.shape[1], block_q, range_size
    vertical, slash = max(vertical, first_columns), max(slash, last_diagonals)
    columns[..., :first_columns].fill_(torch.inf)
    diagonals[..., :last_diagonals].fill_(torch.inf)
    chosen = top_k_blocks(columns, vertical), top_k_blocks(diagonals, slash)
    return vertical_slash_mask(*chosen, *sizes, max_columns=vertical, max_diagonals=slash)


@plain_ints
def last_query_sums(
    q: Tensor, k: Tensor, last: int = 64, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Sums the causal softmax of the last queries along columns and along diagonals.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        last: how many of the last queries to use; Lq if there are fewer.
        scale: scale of q.k; default `D**-0.5`.

    Returns:
        Two tensors, fp32 `[B, Hq, Lkv]`: at j the sum for key j, and at s the sum for the key s
        before each query's own; one pass of `score_sums` for both.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"k must have at least the {q.shape[1]} tokens of q, got {k.shape[1]}")
    check_int("last", last, 1)
    columns, diagonals = reductions(
        q, k, ("columns", "diagonals"), rows=last, causal=True, scale=scale
    )
    return columns, diagonals


@plain_ints
def vertical_slash_mask(
    columns: Tensor,
    diagonals: Tensor,
    q_len: int,
    block_q: int = 64,
    range_size: int = 64,
    *,
    max_columns: int | None = None,
    max_diagonals: int | None = None,
) -> StripeMask:
    """Builds a causal mask from columns and diagonals.

    For a diagonal s, a group of queries sees more than the key s before each query: it sees the
    `block_q` keys that end s before its last query, as in MInference. Adjacent intervals are
    merged. By distance from the group's last query, the first run of `range_size` keys begins at
    the nearest diagonal. Each next run begins where the last one ended if that is in an interval,
    otherwise at the next diagonal. So runs start at any token, do not overlap, and extend past a
    merged interval by less than a run, to keys further back; MInference rounds towards the query
    instead. A run cut by the first key becomes columns. Columns inside runs are dropped.

    The runs of a head are found once for all groups, by pointer doubling: log2(kv_len / range_size)
    steps over `[kv_len]`.

    Args:
        columns: bool `[B|1, H|1, kv_len]`, the keys that all later queries see.
        diagonals: bool `[B|1, H|1, kv_len]`: at s, the key s before each query's own.
        q_len: queries, aligned to the last keys; at most kv_len.
        block_q, range_size: group and run sizes of the mask.
        max_columns, max_diagonals: the most that are set; default kv_len. A head with more columns
            loses its last ones; a head with more diagonals may lose the furthest ones.

    Returns:
        A mask with lists for the batch entries and heads of the maps, built without waiting for the
        device.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    for name, tensor in (("columns", columns), ("diagonals", diagonals)):
        block_checks.check_list_tensor(name, tensor, torch.bool)
    if columns.dim() != 3 or columns.shape != diagonals.shape:
        raise ValueError(
            "columns and diagonals must have shape [batch or 1, heads or 1, kv_len], got "
            f"{list(columns.shape)} and {list(diagonals.shape)}"
        )
    kv_len = columns.shape[2]
    stripe_checks.check_sizes(q_len, kv_len, block_q, range_size, True)
    if kv_len < q_len:
        raise ValueError(f"q_len must be at most the {kv_len} keys of columns, got {q_len}")
    limits = []
    for name, limit in (("max_columns", max_columns), ("max_diagonals", max_diagonals)):
        limits.append(kv_len if limit is None else min(check_int(name, limit), kv_len))
    runs = limits[1] * ceil_div(block_q, range_size)
    runs = min(runs, ceil_div(kv_len, range_size))
    groups = ceil_div(q_len, block_q)
    # One past the key of each group's last query.
    ends = torch.arange(1, groups + 1, device=columns.device) * block_q
    ends = (ends.clamp(max=q_len) + (kv_len - q_len)).int()
    step = max(1, SLICE // max(1, groups * (limits[0] + runs), kv_len))
    parts = zip(columns.flatten(0, 1).split(step), diagonals.flatten(0, 1).split(step), strict=True)
    made = [_lists(*part, ends, block_q, range_size, limits[0], runs) for part in parts]
    tables = made[0] if len(made) == 1 else map(torch.cat, zip(*made, strict=True))
    lead = columns.shape[:2]
    keys, counts, starts, range_counts = (table.unflatten(0, lead) for table in tables)
    runs_of_keys = (starts, range_counts, range_size)
    return StripeMask(keys, counts, q_len, kv_len, block_q, *runs_of_keys, causal=True)


def _lists(
    columns: Tensor,
    diagonals: Tensor,
    ends: Tensor,
    block_q: int,
    range_size: int,
    max_columns: int,
    max_runs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists maps `[n, kv_len]`: columns, counts, range_starts, range_counts `[n, groups, ..]`."""
    kv_len = columns.shape[1]
    begins = _run_begins(diagonals, block_q, range_size)
    begins = begins & (begins.cumsum(-1) <= max_runs)
    runs = block_lists.list_blocks(begins, max_runs)
    keys = block_lists.list_blocks(columns, max_columns)
    in_run = _reached(begins, range_size)
    heads, width = len(columns), min(kv_len, max_columns + range_size - 1)

    def listed(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _lists_of_groups(runs, keys, in_run, ends[part], range_size, width)

    # A few groups at a time, because temporaries are larger than the lists.
    groups, row = ends.shape[0], heads * (width + max_runs)
    parts = block_lists.chunks(groups, row, ends.device, 1 << 18)
    table, counts, starts, range_counts = block_lists.by_chunks(listed, parts, groups, 1)
    return table.contiguous(), counts, starts, range_counts


def _lists_of_groups(
    runs: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    in_run: Tensor,
    ends: Tensor,
    range_size: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `_lists` of some groups, from the heads' lists of runs and columns."""
    count, distances = runs
    max_runs, kv_len = distances.shape[-1], in_run.shape[-1]
    starts = ends[:, None] - range_size - distances[:, None]  # [n, groups, runs]
    listed = torch.arange(max_runs, device=ends.device) < count[:, None, None]
    whole = listed & (starts >= 0)  # a prefix of the list, as distances ascend
    range_starts = torch.where(whole, starts, block_lists.ABSENT)
    range_counts = whole.sum(-1, dtype=torch.int32)
    # The keys [0, cut) are in a run that begins before the first key; at most one run does.
    cut = torch.where(listed & ~whole, starts + range_size, 0).clamp(min=0).sum(-1)

    count, keys = columns
    distances = ends[:, None] - 1 - keys[:, None]  # [n, groups, columns]
    in_run = in_run[:, None].expand(-1, len(ends), -1)
    in_run = in_run.gather(-1, distances.clamp(0, max(0, kv_len - 1)).long())
    own = torch.arange(keys.shape[-1], device=ends.device) < count[:, None, None]
    own = own & (distances >= 0) & ~in_run
    slots = torch.arange(width + 1, device=ends.device)
    table = torch.where(slots < cut[..., None], slots, block_lists.ABSENT).int()
    # Keys that are not listed go to an extra slot, which is dropped.
    place = cut[..., None] - 1 + own.cumsum(-1, dtype=torch.int32)
    place = torch.where(own, place, width)
    table.scatter_(-1, place, keys[:, None].expand(own.shape))
    counts = (cut + own.sum(-1)).int()
    return table[..., :width], counts, range_starts, range_counts


def _reached(begins: Tensor, size: int) -> Tensor:
    """Returns bool `[n, L]`: places in an interval of `size` that begins where `begins` is set."""
    seen = begins.cumsum(-1)
    return seen > torch.nn.functional.pad(seen, (size, 0))[..., : begins.shape[-1]]


def _run_begins(diagonals: Tensor, block_q: int, range_size: int) -> Tensor:
    """Returns bool `[n, L]`: the distances at which runs begin, for `diagonals` `[n, L]`."""
    n, length = diagonals.shape
    places = torch.arange(length + 1, device=diagonals.device)  # the last one is past the end
    inside = torch.nn.functional.pad(_reached(diagonals, block_q), (0, 1))
    at = torch.where(torch.nn.functional.pad(diagonals, (0, 1)), places, length)
    nearest = at.flip(-1).cummin(-1).values.flip(-1)  # the first diagonal at or after each place
    behind = (places + range_size).clamp(max=length)
    jump = torch.where(inside[:, behind], behind, nearest[:, behind])
    begins = torch.zeros(n, length + 1, dtype=torch.bool, device=diagonals.device)
    begins.scatter_(-1, nearest[:, :1], True)
    for _ in range(ceil_div(length, range_size).bit_length()):
        begins.scatter_(-1, torch.where(begins, jump, length), True)
        jump = jump.gather(-1, jump)
    return begins[:, :length]
