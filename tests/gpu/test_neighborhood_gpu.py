"""neighborhood_attention on the GPU: its numbers, over grids, windows, dtypes, heads and scales."""

import itertools

import pairwise
import pytest
import torch
from neighborhoods import DTYPES, ROWS, Case

import sparse_fmha

pytestmark = pytest.mark.gpu

HEAD_DIMS = (8, 40, 64, 72, 80, 96, 128, 160, 256)
# One of each rank, with a dilation that does not divide the grid.
MIXED = [
    Case((501,), 37, 5, 3, True),
    Case((21, 37), (6, 9), (2, 4), (3, 1), (False, True)),
    Case((9, 10, 11), (3, 4, 5), (2, 1, 5), (2, 1, 2), (True, False, False)),
]

# A window of 1 on some axes or on all; grids and axes of a single token.
ONES = [
    Case((1,), 1),
    Case((1, 1), 1),
    Case((1, 1, 1), 1, causal=True),
    Case((1000,), 1),
    Case((1000,), 1, causal=True),
    Case((1000,), 1, dilation=1000),
    Case((1, 300), (1, 31)),
    Case((300, 1), (31, 1), (2, 1), (3, 1)),
    Case((20, 300), (1, 31), dilation=(20, 3)),
    Case((31, 1, 17), (5, 1, 1), causal=(True, False, True)),
    Case((7, 19, 23), (1, 5, 6), (1, 2, 1)),
    Case((7, 19, 23), (7, 1, 23)),
]

ONE_AXIS = [
    Case((2,), 2),
    Case((2,), 2, 2, causal=True),
    Case((3,), 2),
    Case((3,), 2, 2),
    Case((5,), 4, 3, causal=True),
    Case((64,), 64),
    Case((65,), 65, 2, causal=True),
    Case((1000,), 1000),
    Case((1000,), 999),
    Case((1000,), 2),
    Case((1000,), 2, 2),
    Case((1000,), 3, causal=True),
    Case((1000,), 100),
    Case((1000,), 129),
    Case((1000,), 128, 128),  # blocks, the last one ragged
    Case((1000,), 128, 128, causal=True),
    Case((1000,), 129, 64),
    Case((1000,), 200, 33, causal=True),
    Case((1000,), 65, 64),
    Case((4001,), 256),
    Case((4096,), 1024, 256, causal=True),
]
TWO_AXES = [
    Case((2, 2), 2),
    Case((3, 2), 2, (2, 1), causal=(False, True)),
    Case((5, 5), 2),
    Case((5, 5), 5, causal=(True, False)),
    Case((5, 5), (3, 4), (3, 2)),
    Case((33, 65), (33, 65)),
    Case((64, 64), 16, 16),
    Case((64, 64), (9, 30), (1, 16)),
    Case((61, 67), (7, 9), (3, 4)),
    Case((61, 67), (8, 10), (8, 5), causal=True),
    Case((50, 70), (50, 2), (7, 2)),
    Case((50, 70), (2, 70)),
    Case((1000, 3), (100, 3)),
    Case((1000, 3), (31, 2), (30, 1), causal=(True, False)),
    Case((2, 1500), (2, 65), (1, 16)),
]
THREE_AXES = [
    Case((2, 2, 2), 2),
    Case((3, 2, 5), (2, 2, 3), (2, 1, 3), causal=(True, False, True)),
    Case((5, 5, 5), 5),
    Case((16, 16, 16), 16),
    Case((16, 16, 16), 5),
    Case((12, 13, 14), 6, 6),
    Case((9, 20, 21), (4, 9, 10), (1, 4, 5)),
    Case((9, 20, 21), (9, 8, 7), (9, 2, 1), causal=(True, False, False)),
    Case((8, 16, 24), (8, 8, 8), (1, 8, 8)),
    Case((17, 3, 33), (2, 3, 16), (1, 2, 3), causal=(False, True, False)),
    Case((3, 2, 700), (3, 2, 50), (1, 1, 20), causal=(False, False, True)),
    Case((700, 2, 3), (40, 2, 2)),
    Case((2, 600, 3), (2, 33, 3), (2, 16, 1)),
]
DILATED = [
    Case((1000,), 7, dilation=2),
    Case((1000,), 500, dilation=2),  # each residue is dense
    Case((1000,), 2, dilation=500),
    Case((1001,), 2, 2, dilation=500),
    Case((1000,), 40, 7, dilation=3, causal=True),
    Case((999,), 142, dilation=7),
    Case((1000,), 125, 125, dilation=8, causal=True),
    Case((999,), 111, 20, dilation=9),
    Case((1000,), 33, dilation=11, causal=True),
    Case((4000,), 130, 64, dilation=16),
    Case((50, 70), (9, 5), (1, 2), (2, 3)),
    Case((61, 67), (4, 5), (2, 5), 8, (True, False)),
    Case((61, 67), 6, 3, 9),
    Case((63, 64), (7, 8), (1, 3), (9, 8)),
    Case((60, 66), (5, 4), 1, (11, 16)),
    Case((1000, 3), (9, 3), (4, 1), (100, 1)),
    Case((3, 1000), (3, 55), (1, 8), (1, 7), True),
    Case((5, 5), 2, dilation=2),
    Case((14, 15, 16), (2, 5, 8), (1, 5, 4), (7, 3, 2)),  # window * dilation is the grid
    Case((16, 18, 12), (2, 2, 5), 2, (8, 9, 2)),
    Case((23, 9, 17), (2, 9, 2), (2, 3, 1), (11, 1, 8), (False, True, False)),
    Case((35, 8, 12), (2, 4, 3), 1, (16, 2, 3), (True, True, True)),
    Case((9, 17, 19), (4, 5, 6), (1, 2, 3), (2, 3, 3)),
    Case((3, 2, 700), (3, 2, 60), 1, (1, 1, 11)),
]
# Windows that pass the start of a causal axis.
BEYOND = [
    Case((1000,), 4000, causal=True),
    Case((1000,), 2**31 - 1, 2**31 - 1, causal=True),
    Case((1000,), 400, 300, dilation=3, causal=True),  # classes of 334 and 333 tokens
    Case((7,), 9, 9, dilation=100, causal=True),
    Case((21, 300), (50, 9), (2, 4), (3, 1), (True, False)),
    Case((5, 40, 33), (2, 100, 7), (1, 3, 2), (2, 3, 1), (False, True, False)),
]
CONFIGURATIONS = ONES + ONE_AXIS + TWO_AXES + THREE_AXES + DILATED + BEYOND


@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
def test_configurations(check, case, dim, dtype):
    check(case.with_(dim=dim, dtype=dtype))


@pairwise.parametrize(case=CONFIGURATIONS, row=ROWS, extra=(0, 77))
def test_every_visible_key_counts_once(tensors, attend, case, row, extra):
    """Scores of 0 and values of one-hot rows: the outputs are counts of keys, to be hit exactly."""
    dim, dtype = row
    case = case.with_(extra=extra, dim=dim, dtype=dtype)
    q, k, _, extra_k, _ = tensors(case)
    visible = case.visible(q.device)
    v = torch.eye(dim, device=q.device, dtype=dtype)[torch.arange(visible.shape[1]) % dim]
    tokens = visible.shape[0]
    grid_v, extra_v = v[:tokens].view(k.shape), v[tokens:].view(1, extra, 1, dim)
    extras = {"extra_k": extra_k, "extra_v": extra_v} if extra else {}
    out, lse = attend(torch.zeros_like(q), k, grid_v, **extras, **case.options())
    count = visible.sum(-1, keepdim=True)
    torch.testing.assert_close(
        lse.view(tokens, -1).double().exp(), count.double().expand(-1, 2), rtol=1e-5, atol=0
    )
    counts = (out.view(tokens, 2, dim).double() * count[:, None]).round()
    assert counts.equal((visible.double() @ v.double())[:, None].expand_as(counts))


@pytest.mark.parametrize("causal", [*itertools.product([False, True], repeat=3)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_causal_on_each_axis(check, dim, causal):
    check(Case((10, 11, 12), (4, 5, 6), (1, 2, 6), causal=causal, dim=dim))
    check(Case((37, 41), (12, 7), (5, 1), (1, 2), causal[1:], dim=dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_head_dims_and_dtypes(check, case, dim, dtype):
    check(case.with_(dim=dim, dtype=dtype, extra=5))


@pytest.mark.parametrize("extra", [0, 70])
@pytest.mark.parametrize("batch", [2, 7, 9])
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_batches(check, case, batch, extra):
    check(case.with_(batch=batch, extra=extra, dim=128))
    check(case.with_(batch=batch, extra=extra, dilation=1, causal=False))


@pytest.mark.parametrize("heads", [(6, 2), (6, 1), (6, 6), (34, 17)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_grouped_heads(check, case, dim, heads):
    check(case.with_(batch=2, heads=heads[0], heads_kv=heads[1], dim=dim, extra=9))


@pytest.mark.parametrize("extra", [1, 7, 64, 80, 128, 130, 300])
@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_extra_tokens(check, case, dim, dtype, extra):
    check(case.with_(extra=extra, batch=2, dim=dim, dtype=dtype))


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_no_extra_tokens_is_as_without(tensors, attend, case):
    q, k, v, *_ = tensors(case)
    none = k.new_empty(1, 0, 1, case.dim)
    out, lse = attend(q, k, v, **case.options())
    same, same_lse = attend(q, k, v, extra_k=none, extra_v=none, **case.options())
    assert same.equal(out)
    assert same_lse.equal(lse)


@pytest.mark.parametrize("scale", [0.3, -0.125, -3.0, 0.0, -0.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_scale(check, case, dim, scale):
    check(case.with_(extra=7, batch=2, dim=dim, scale=scale))


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize(("dim", "dtype"), ROWS, ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("grid", [(1500,), (30, 50), (10, 12, 13)], ids=str)
def test_moving_maximum(tensors, check, grid, dim, dtype, scale, order):
    """Scores that drift by hundreds along the keys, so that the row maximum moves in each tile."""
    case = Case(grid, tuple(n * 2 // 3 for n in grid), extra=150, dim=dim, dtype=dtype, scale=scale)
    q, k, v, extra_k, extra_v = tensors(case)
    q[..., 0] = 8
    drift = torch.linspace(-16, 16 * order, grid[0], device=k.device, dtype=dtype)
    k[..., 0] = drift.view(-1, *[1] * len(grid))
    extra_k[..., 0] = torch.linspace(-20, 20, 150, device=k.device, dtype=dtype)[:, None]
    check(case, (q, k, v, extra_k, extra_v))


def close(result, expected):
    """Equal to the rounding of weights and results."""
    eps = torch.finfo(result.dtype).eps
    atol = 2 * eps * expected.abs().max().item()
    torch.testing.assert_close(result, expected, rtol=2 * eps, atol=atol)


@pytest.mark.parametrize("grid", [(777,), (29, 31), (7, 11, 13)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_window_of_the_whole_grid_is_dense(tensors, check, attend, dim, grid):
    case = Case(grid, grid, 2, batch=2, dim=dim)
    out, lse = check(case)
    dense, dense_lse = attend(*(x.flatten(1, -3) for x in tensors(case)[:3]))
    close(out.flatten(1, -3), dense)
    torch.testing.assert_close(lse.flatten(1, -2), dense_lse, rtol=2e-6, atol=1e-3)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_causal_window_of_the_whole_length_is_causal(tensors, check, attend, dim):
    case = Case((1234,), 1234, causal=True, batch=2, dim=dim)
    out, lse = check(case)
    dense, dense_lse = attend(*tensors(case)[:3], causal=True)
    close(out, dense)
    torch.testing.assert_close(lse, dense_lse, rtol=2e-6, atol=1e-3)


@pytest.mark.parametrize("window", [2, 63, 64, 200])
def test_causal_without_strides_is_the_sliding_window(tensors, attend, agrees, window):
    case = Case((1234,), window, causal=True, dim=128)
    q, k, v, *_ = tensors(case)
    behind = torch.arange(1234, device=q.device)[:, None] - torch.arange(1234, device=q.device)
    out, lse = attend(q, k, v, **case.options())
    agrees(out, lse, q, k, v, visible=(behind >= 0) & (behind < window))


def test_stride_of_the_window_is_attention_in_blocks(tensors, check, attend):
    case = Case((960,), 96, 96)
    out, _ = check(case)
    blocks, _ = attend(*(x.view(10, 96, -1, case.dim) for x in tensors(case)[:3]))
    close(out.view(blocks.shape), blocks)


@pytest.mark.parametrize("dilation", [2, 3, 9])
def test_dilation_is_attention_on_each_residue(tensors, check, attend, dilation):
    case = Case((40, 60), (4, 5), (1, 3), (1, dilation), extra=3)
    out, _ = check(case)
    q, k, v, *extra = tensors(case)
    for r in range(dilation):
        own = case.with_(grid=q[:, :, r::dilation].shape[1:3], dilation=1)
        given = [x[:, :, r::dilation] for x in (q, k, v)]
        close(out[:, :, r::dilation], check(own, (*given, *extra))[0])


def test_one_value_serves_all_axes(tensors, attend):
    q, k, v, *_ = tensors(Case((24, 25), 3))
    options = {"stride": 2, "dilation": 2, "causal": True}
    each = {name: (value, value) for name, value in options.items()}
    out, _ = attend(q, k, v, 3, **options)
    assert out.equal(attend(q, k, v, (3, 3), **each)[0])
    assert not out.equal(attend(q, k, v, 3)[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_empty_batch(tensors, attend, axes):
    case = Case((6,) * axes, 3, batch=0, extra=2)
    q, k, v, extra_k, extra_v = tensors(case)
    out, lse = attend(q, k, v, extra_k=extra_k, extra_v=extra_v, **case.options())
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]


def test_lse_is_optional(tensors, attend):
    case = MIXED[1]
    q, k, v, *_ = tensors(case)
    out = sparse_fmha.neighborhood_attention(q, k, v, **case.options())
    assert out.equal(attend(q, k, v, **case.options())[0])
