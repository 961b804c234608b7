"""Attention of listed queries, against fp64 with masks token by token."""

import sys

import pytest
import torch
from dispatch_watch import Watch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, reference


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(q_len, kv_len, heads=(4, 2), dim=16, batch=2, dtype=torch.float32):
    k, v = (normal(batch, kv_len, heads[1], dim, seed=n, dtype=dtype) for n in (1, 2))
    return normal(batch, q_len, heads[0], dim, dtype=dtype), k, v


def drawn_rows(q_len, n, lists, seed=3):
    """Distinct rows in any order, with some that are no query."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(*lists, q_len, generator=generator).argsort(-1)[..., :n].int()
    rows[..., n // 2] = -1
    rows[..., n // 3] = q_len + 5
    return rows


def visible_of(rows, counts, seen, q_len, causal):
    """What `[B, H, Lq, Lkv]` is visible if listed query i sees `seen[.., i, :]`."""
    batch, heads, n, kv_len = seen.shape
    visible = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        own = rows[min(b, len(rows) - 1), min(h, rows.shape[1] - 1)].tolist()
        used = n if counts is None else int(counts[min(b, len(counts) - 1), h % counts.shape[1]])
        for i, row in enumerate(own[:used]):
            if 0 <= row < q_len:
                visible[b, h, row] = seen[b, h, i]
                if causal:
                    visible[b, h, row, max(0, row + 1 + kv_len - q_len) :] = False
    return visible


def agrees(q, k, v, out, lse, visible, scale=None):
    expected, expected_lse = reference.attention(q, k, v, visible, scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-5)
    hidden = ~visible.any(-1).transpose(1, 2)
    assert hidden.any()
    assert not out[hidden].any()
    assert (lse[hidden] == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "n", "lists", "counted"),
    [
        (200, 200, 90, (2, 4), False),
        (150, 333, 130, (1, 4), True),  # more keys than queries
        (150, 97, 70, (2, 1), True),  # fewer: rows that see nothing
        (90, 90, 90, (1, 1), False),
    ],
)
def test_rows_see_all_keys_up_to_their_own(q_len, kv_len, n, lists, counted, causal):
    q, k, v = inputs(q_len, kv_len)
    rows = drawn_rows(q_len, n, lists)
    counts = torch.randint(1, n, lists) if counted else None
    with Watch():
        out, lse = sparse_fmha.row_attention(
            q, k, v, rows, counts, causal=causal, scale=0.3, return_lse=True
        )
    seen = torch.ones(2, 4, n, kv_len, dtype=torch.bool)
    agrees(q, k, v, out, lse, visible_of(rows, counts, seen, q_len, causal), 0.3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["blocks", "stripes"])
def test_a_mask_of_the_listed_rows(kind, causal):
    q_len, kv_len, n = 170, 210, 100
    q, k, v = inputs(q_len, kv_len)
    rows = drawn_rows(q_len, n, (2, 4))
    chosen = normal(2, 4, 2, 14, seed=5) > 0
    if kind == "blocks":
        mask = BlockMask.from_blocks(chosen, n, kv_len, 64, 16)
    else:
        columns = torch.stack([torch.randperm(kv_len)[:40].sort().values for _ in range(16)])
        mask = StripeMask(
            columns.int().view(2, 4, 2, 40), torch.full((2, 4, 2), 40).int(), n, kv_len, 64
        )
    with Watch():
        out, lse = sparse_fmha.row_attention(
            q, k, v, rows, mask=mask, causal=causal, return_lse=True
        )
    seen = mask.to_dense().expand(2, 4, -1, -1)
    agrees(q, k, v, out, lse, visible_of(rows, None, seen, q_len, causal))


def test_positions_are_exact_far_out():
    """Neighboring keys differ by one in their bias, whatever their positions."""
    q, k, v = inputs(64, 70001, heads=(1, 1), batch=1)
    k = k.zero_()  # so that lse is the logarithm of the number of visible keys
    rows = torch.tensor([[[0, 63, 17]]])
    _, lse = sparse_fmha.row_attention(q, k, v, rows, causal=True, return_lse=True)
    number = lse[0, rows[0, 0], 0].double().exp()
    torch.testing.assert_close(number, (rows[0, 0] + 70001 - 63).double(), atol=0.3, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_permutation_of_all_rows_changes_nothing(causal):
    q, k, v = inputs(130, 130)
    rows = torch.rand(2, 4, 130).argsort(-1)
    out = sparse_fmha.row_attention(q, k, v, rows, causal=causal)
    expected = sparse_fmha.attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [1000, 300, 64, 0])
def test_few_blocks_are_compared(n, monkeypatch):
    """In whatever order rows come: blocks that all of 128 rows see take no thresholds, and those
    that none sees are not listed."""
    q, k, v = inputs(1000, 1100, heads=(2, 1), batch=1)
    rows = torch.rand(1, 2, 1000, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :n]
    module = sys.modules["sparse_fmha.attention.rows"]
    attend, listed = module.block_sparse_attention, {}

    def watch(*qkv, **given):
        listed[given.get("row_threshold") is not None] = qkv[3].to_dense()
        return attend(*qkv, **given)

    monkeypatch.setattr(module, "block_sparse_attention", watch)
    sparse_fmha.row_attention(q, k, v, rows, causal=True)
    whole, cut = listed[False], listed[True]
    assert whole.shape == cut.shape == (1, 2, n, 1100)
    for head in range(2):
        ends = rows[0, head].sort().values + 101
        for first in range(0, n, 128):
            own, tile = ends[first : first + 128], slice(first, first + 128)
            seen = int(own.min()) // 128 * 128
            assert whole[0, head, tile, :seen].all()
            assert not whole[0, head, tile, seen:].any()
            last = min(1100, -(-int(own.max()) // 128) * 128)
            assert cut[0, head, tile, seen:last].all()
            assert int(cut[0, head, tile].sum()) == (last - seen) * len(own)


def test_absent_rows_read_no_other_head():
    """An absent row stands for a row of its own head, so what others hold reaches no gradient."""
    q, k, v = (x.requires_grad_() for x in inputs(40, 40))
    with torch.no_grad():
        q[0, :, 0] = torch.nan
        q[1, -1, 3] = torch.nan
    rows = torch.tensor([5, -1, 7]).expand(1, 4, 3)
    out = sparse_fmha.row_attention(q, k, v, rows)
    grad = torch.autograd.grad(out[1].sum(), k)[0]
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    leaves = [x.requires_grad_() for x in inputs(60, 80, dtype=torch.float64)]
    rows = drawn_rows(60, 30, (2, 4))
    weights = normal(2, 60, 4, 16, seed=7), normal(2, 60, 4, seed=8)
    out, lse = sparse_fmha.row_attention(*leaves, rows, causal=causal, return_lse=True)
    listed = lse > -torch.inf
    ours = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1])[listed].sum(), leaves)
    seen = torch.ones(2, 4, 30, 80, dtype=torch.bool)
    visible = visible_of(rows, None, seen, 60, causal)
    keys, values = (x.repeat_interleave(2, 2) for x in leaves[1:])
    scores = torch.einsum("bihd,bjhd->bhij", leaves[0], keys) / 4
    scores = scores.masked_fill(~visible, -torch.inf)
    own = visible.any(-1)
    shares = torch.where(own[..., None], scores, 0).softmax(-1) * own[..., None]
    expected = torch.einsum("bhij,bjhd->bihd", shares, values)
    total = torch.where(own[..., None], scores, 0).logsumexp(-1).transpose(1, 2)
    theirs = torch.autograd.grad(
        (expected * weights[0]).sum() + (total * weights[1])[listed].sum(), leaves
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)
    unlisted = ~listed
    assert not ours[0][unlisted].any()


def test_16_bits_and_no_rows():
    q, k, v = inputs(100, 100, dtype=torch.bfloat16)
    out, lse = sparse_fmha.row_attention(q, k, v, torch.zeros(1, 1, 0).int(), return_lse=True)
    assert out.dtype == torch.bfloat16
    assert not out.any()
    assert lse.dtype == torch.float32
    assert (lse == -torch.inf).all()
    one = sparse_fmha.row_attention(q, k, v, torch.tensor([[[99]]]), causal=True)
    expected = sparse_fmha.attention(q, k, v)[:, 99]
    torch.testing.assert_close(one[:, 99], expected, atol=1e-3, rtol=2e-2)


Q = normal(2, 64, 4, 16)
ROWS = torch.arange(8).view(1, 1, 8)
GRID = sparse_fmha.BlockGrid(8, 64, 64, 64, causal=True)
ONE = Q[:1, :1, :1, :8]
MANY = ONE.expand(1, (1 << 24) + 1, 1, 8)
CALL = sparse_fmha.row_attention


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CALL(Q, Q, Q, ROWS.float()),
            TypeError,
            r"query_rows must be a tensor of integers, got torch\.float32",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS[0]),
            ValueError,
            r"query_rows must have shape \[2 or 1, 4 or 1, n\], got \[1, 8\]",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS.expand(3, 1, 8)),
            ValueError,
            r"query_rows must have shape \[2 or 1, 4 or 1, n\], got \[3, 1, 8\]",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS, torch.ones(2, 2).int()),
            ValueError,
            r"counts must have shape \[2 or 1, 4 or 1\], got \[2, 2\]",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS.to("meta")),
            ValueError,
            "query_rows must be on q's device, cpu, got meta",
        ),
        (lambda: CALL(Q, Q, Q, ROWS, causal=1), TypeError, "causal must be True or False, got 1"),
        (
            lambda: CALL(Q, Q, Q, ROWS, mask=Q),
            TypeError,
            "mask must be a BlockMask or a StripeMask, got Tensor",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS, mask=GRID.mask(GRID.sink(1))),
            ValueError,
            r"mask\.causal must be False, as it counts listed queries",
        ),
        (
            lambda: CALL(Q, Q, Q, ROWS, mask=BlockMask.from_blocks(Q[:1, :1, :1, :1] > -9, 9, 64)),
            ValueError,
            "9",
        ),
        (
            lambda: CALL(ONE, MANY, MANY, ROWS, causal=True),
            ValueError,
            "k must have at most 16777216 tokens with causal, got 16777217",
        ),
        (lambda: CALL(Q, Q, Q[:, :, :3], ROWS), ValueError, "v must have k's shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
