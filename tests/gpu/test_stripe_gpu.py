"""stripe_attention on the GPU against the fp64 reference."""

import itertools

import pytest
import torch
from block_lists import ROWS
from neighborhoods import LAYOUTS, laid_out
from poison import poisoned

import sparse_fmha
from sparse_fmha import StripeMask, reference

pytestmark = pytest.mark.gpu


def drawn(len_q, len_kv, block_q, range_size, causal, lists=(1, 1), share=0.3, seed=0):
    """A mask on the CPU: ascending columns, and runs at any token, disjoint from them."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-len_q // block_q)
    columns, starts = [], []
    for n in range(lists[0] * lists[1] * groups):
        runs = []
        if range_size:
            places = torch.randperm(len_kv, generator=generator)[:5].sort().values.tolist()
            for place in places:
                if not runs or place - runs[-1] >= range_size:
                    runs.append(place)
            runs = runs[: n % 5]
        free = torch.rand(len_kv, generator=generator) < share * (n % 3) / 2
        for run in runs:
            free[run : run + range_size] = False
        columns.append(free.nonzero()[:, 0].tolist())
        starts.append(runs)

    def table(rows):
        width = max(map(len, rows))
        filled = [row + [-1] * (width - len(row)) for row in rows]
        indices = torch.tensor(filled, dtype=torch.int32).view(*lists, groups, width)
        return indices, torch.tensor(list(map(len, rows))).int().view(*lists, groups)

    ranges = dict(zip(("range_starts", "range_counts"), table(starts), strict=True))
    if not range_size:
        ranges = {}
    return StripeMask(
        *table(columns),
        len_q,
        len_kv,
        block_q,
        range_size=range_size or 64,
        causal=causal,
        **ranges,
    )


def visible(mask):
    return reference.stripe_mask(
        mask.columns, mask.counts, mask.q_len, mask.kv_len, mask.block_q,
        mask.range_starts, mask.range_counts, mask.range_size, causal=mask.causal,
    )  # fmt: skip


def attend(mask, q, k, v, **options):
    with poisoned():
        return sparse_fmha.stripe_attention(q, k, v, mask.to(q.device), return_lse=True, **options)


BLOCKS = tuple(itertools.product((64, 128, 192, 1024), (None, 64, 128)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=str)
@pytest.mark.parametrize(("block_q", "range_size"), BLOCKS)
def test_blocks(make_qkv, agrees, block_q, range_size, dim, dtype, causal):
    for i, (len_q, len_kv) in enumerate([(700, 700), (300, 900), (450, 200), (65, 1)]):
        mask = drawn(len_q, len_kv, block_q, range_size, causal, (1, 2), seed=i)
        q, k, v = make_qkv(2, len_q, len_kv, 2, 1, dim, dtype)
        out, lse = attend(mask, q, k, v)
        agrees(out, lse, q, k, v, visible=visible(mask).to(q.device))


@pytest.mark.parametrize("dim", [8, 40, 72, 120, 136, 200])
@pytest.mark.parametrize("lists", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_head_dims_and_lists(make_qkv, agrees, lists, dim):
    mask = drawn(500, 600, 128, 64, True, lists)
    q, k, v = make_qkv(2, 500, 600, 4, 2, dim)
    agrees(
        *attend(mask, q, k, v, scale=-0.3), q, k, v, scale=-0.3, visible=visible(mask).to("cuda")
    )


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(make_qkv, layout):
    mask = drawn(400, 500, 128, 128, True)
    given = make_qkv(2, 400, 500, 2, 2, 64)
    expected = attend(mask, *given)
    for a, b in zip(attend(mask, *laid_out(layout, given)), expected, strict=True):
        assert a.equal(b)


def test_every_key_is_dense_attention(make_qkv, agrees):
    for by_runs in (False, True):
        length = 1024
        if by_runs:
            starts = torch.arange(0, length, 128).int().view(1, 1, 1, -1)
            none = torch.zeros(1, 1, 1, 0).int()
            counts = torch.full((1, 1, 1), length // 128).int()
            mask = StripeMask(none, torch.zeros(1, 1, 1).int(), length, length, 1024,
                              range_starts=starts, range_counts=counts, range_size=128)  # fmt: skip
        else:
            every = torch.ones(1, 1, 1, length, dtype=torch.bool)
            mask = StripeMask.from_columns(every, length, 1024)
        q, k, v = make_qkv(1, length, length, 4, 2, 128)
        out, lse = attend(mask, q, k, v)
        agrees(out, lse, q, k, v)


def test_nothing_listed(make_qkv):
    mask = StripeMask.from_columns(torch.zeros(1, 1, 3, 300, dtype=torch.bool), 300, 128)
    out, lse = attend(mask, *make_qkv(2, 300, 300, 2, 1, 64))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_what_is_not_there_is_not_read(make_qkv, agrees):
    """The raw op, with entries below 0, behind the last key and behind the counts."""
    q, k, v = make_qkv(1, 128, 300, 2, 2, 64)
    columns = torch.tensor([[5, -1, 300, 1 << 29, 299, -(1 << 31), 7, 8]]).int().view(1, 1, 1, 8)
    counts = torch.tensor([[[7]]]).int()
    starts, number = torch.tensor([[[[100, -9, 290, 300]]]]).int(), torch.tensor([[[9]]]).int()
    given = (x.to(q.device) for x in (columns, counts, starts, number))
    with poisoned():
        out, lse = torch.ops.sparse_fmha.stripe_fwd(q, k, v, *given, 128, 64, False, None)
    seen = torch.zeros(1, 1, 128, 300, dtype=torch.bool, device=q.device)
    seen[..., [5, 299, 7]] = True
    seen[..., 100:164] = True
    # Key 299 is in a run as well as in the columns, so it counts twice: compare without it.
    assert lse.isfinite().all()
    seen[..., 290:] = True
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8
    scores[..., 299] += torch.log(torch.tensor(2.0, dtype=torch.float64))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_long(make_qkv, agrees):
    """Lists of thousands of columns for one group of many rows; few rows are checked."""
    length = 16384
    mask = drawn(length, length, 2048, 128, True, share=0.5)
    q, k, v = make_qkv(1, length, length, 2, 1, 128)
    out, lse = attend(mask, q, k, v)
    rows = torch.tensor([0, 1, 127, 128, 2047, 2048, 9000, length - 1])
    seen = visible(mask)[:, :, rows].to(q.device)
    agrees(out[:, rows], lse[:, rows], q[:, rows], k, v, visible=seen)


def test_graph(make_qkv):
    """Captured once, replayed with other lists."""
    masks = [drawn(500, 500, 128, 64, True, seed=seed) for seed in (1, 2)]
    width = max(m.columns.shape[-1] for m in masks)
    runs = max(m.range_starts.shape[-1] for m in masks)
    given = make_qkv(1, 500, 500, 2, 2, 64)

    def tables(m):
        pad = torch.nn.functional.pad
        columns = pad(m.columns, (0, width - m.columns.shape[-1]), value=-1)
        starts = pad(m.range_starts, (0, runs - m.range_starts.shape[-1]), value=-1)
        return [x.cuda() for x in (columns, m.counts, starts, m.range_counts)]

    held = tables(masks[0])

    def run():
        return torch.ops.sparse_fmha.stripe_fwd(*given, *held, 128, 64, True, None)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for mask in masks:
        for to, new in zip(held, tables(mask), strict=True):
            to.copy_(new)
        graph.replay()
        for a, b in zip(captured, attend(mask, *given), strict=True):
            assert a.equal(b)


def test_the_same_bits_again(make_qkv):
    mask = drawn(3000, 3000, 256, 64, True, (1, 8))
    given = make_qkv(2, 3000, 3000, 8, 2, 128)
    first = attend(mask, *given)
    for _ in range(3):
        for a, b in zip(attend(mask, *given), first, strict=True):
            assert a.equal(b)
