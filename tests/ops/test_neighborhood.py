"""Neighborhood attention on the CPU against the reference."""

import functools
import math

import neighborhoods
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparse_fmha
from sparse_fmha import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Small ones, in the dtype of most tests here.
Case = functools.partial(neighborhoods.Case, dim=16, dtype=torch.float32)


@pytest.fixture(scope="session")
def tensors(randn):
    """q, k, v, extra_k, extra_v of a case; no extra tensors where it has no extra tokens."""

    def make(case):
        def one(seed, *tokens, heads=case.heads_kv):
            return randn(case.batch, *tokens, heads, case.dim, dtype=case.dtype, seed=seed)

        extra = (one(4, case.extra), one(5, case.extra)) if case.extra else (None, None)
        return one(1, *case.grid, heads=case.heads), one(2, *case.grid), one(3, *case.grid), *extra

    return make


@pytest.fixture(scope="session")
def check(tensors, poisoned, agrees):
    """check(case): the public function agrees with the reference, on these tensors if given."""

    def run(case, given=None):
        q, k, v, extra_k, extra_v = given or tensors(case)
        with poisoned():
            out, lse = sparse_fmha.neighborhood_attention(
                q,
                k,
                v,
                **case.options(),
                extra_k=extra_k,
                extra_v=extra_v,
                return_lse=True,
            )
        if case.extra:
            k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in ((k, extra_k), (v, extra_v)))
        agrees(out, lse, q, k, v, case.visible(), case.scale)
        return out, lse

    return run


@st.composite
def cases(draw, rank):
    longest = {1: 160, 2: 20, 3: 9}[rank]
    grid, window, stride, dilation = [], [], [], []
    for _ in range(rank):
        grid.append(draw(st.integers(1, longest)))
        window.append(draw(st.integers(1, grid[-1])))
        stride.append(draw(st.integers(1, window[-1])))
        dilation.append(draw(st.integers(1, grid[-1] // window[-1])))
    heads_kv = draw(st.integers(1, 2))
    return Case(
        tuple(grid),
        tuple(window),
        tuple(stride),
        tuple(dilation),
        tuple(draw(st.booleans()) for _ in range(rank)),
        extra=draw(st.sampled_from([0, 0, 1, 7, 70])),
        batch=draw(st.integers(1, 2)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        dim=draw(st.sampled_from([8, 16, 40, 64, 72])),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.none() | st.floats(-1, 1, width=32)),
    )


@settings(max_examples=100)
@given(case=cases(1))
@example(Case((150,), (9,), causal=True))  # the sliding window
@example(Case((150,), (16,), stride=16))  # blocked attention
@example(Case((7,), (3,), stride=2, dilation=2, causal=True))
@example(Case((150,), (1,), extra=3))
def test_one_axis(check, case):
    check(case)


@settings(max_examples=100)
@given(case=cases(2))
@example(Case((21, 19), (7, 5), extra=5))
@example(Case((21, 19), (1, 5), causal=(True, False)))
def test_two_axes(check, case):
    check(case)


@settings(max_examples=100)
@given(case=cases(3))
@example(Case((6, 9, 11), (3, 4, 5), (2, 4, 1), (2, 1, 2), (True, False, False), extra=3))
def test_three_axes(check, case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 40, 72, 96, 128, 200, 256])
def test_dtypes_and_head_dims(check, dim, dtype):
    check(Case((13, 17), (6, 5), (2, 1), (1, 3), extra=3, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 4), (6, 2), (5, 1)])
def test_shared_key_heads(check, heads, heads_kv, dtype):
    check(Case((12, 13), (5, 5), extra=9, batch=2, heads=heads, heads_kv=heads_kv, dtype=dtype))


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_scale(check, scale):
    check(Case((12, 13), (5, 4), causal=(True, False), scale=scale, extra=2))


@pytest.mark.parametrize("grid", [(90,), (9, 14), (5, 6, 7)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_window_of_the_whole_grid_is_dense(tensors, check, grid, stride):
    case = Case(grid, grid, stride, batch=2)
    out, lse = check(case)
    q, k, v = (x.flatten(1, -3) for x in tensors(case)[:3])
    dense, dense_lse = sparse_fmha.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out.flatten(1, -3), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.flatten(1, -2), dense_lse, rtol=1e-6, atol=1e-6)


def test_causal_window_of_the_whole_length_is_causal(tensors, check):
    case = Case((140,), (140,), causal=True)
    out, _ = check(case)
    q, k, v = tensors(case)[:3]
    dense = sparse_fmha.attention(q, k, v, causal=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)


def test_dilation_is_attention_on_each_residue(tensors, check):
    case = Case((3 * 20,), (5,), (2,), (3,))
    out, _ = check(case)
    q, k, v = tensors(case)[:3]
    for r in range(3):
        own = sparse_fmha.neighborhood_attention(q[:, r::3], k[:, r::3], v[:, r::3], 5, stride=2)
        torch.testing.assert_close(out[:, r::3], own, rtol=1e-5, atol=1e-6)


def test_one_value_serves_all_axes(tensors):
    q, k, v = tensors(Case((12, 12), (3, 3)))[:3]
    options = {"stride": 2, "dilation": 2, "causal": True}
    one = sparse_fmha.neighborhood_attention(q, k, v, 3, **options)
    each = {name: (value, value) for name, value in options.items()}
    assert one.equal(sparse_fmha.neighborhood_attention(q, k, v, (3, 3), **each))
    assert not one.equal(sparse_fmha.neighborhood_attention(q, k, v, 3))


def test_what_is_not_visible_does_not_count(tensors):
    """Keys outside of a query's window may hold anything finite, to the last bit of its result."""
    case = Case((16, 18), (5, 4), (2, 1), (1, 2), (False, True))
    q, k, v = tensors(case)[:3]
    args = {"stride": case.stride, "dilation": case.dilation, "causal": case.causal}
    visible = reference.neighborhood_mask(case.grid, case.window, **args)
    expected = sparse_fmha.neighborhood_attention(q, k, v, case.window, **args).flatten(1, 2)
    for row in (0, 100, 287):
        hidden = ~visible[row].reshape(1, *case.grid, 1, 1)
        out = sparse_fmha.neighborhood_attention(
            q, k + 50 * hidden, v - 1e6 * hidden, case.window, **args
        )
        assert out.flatten(1, 2)[:, row].equal(expected[:, row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(tensors, check, dtype):
    """Grids laid out otherwise: heads first, the axes swapped, or a crop of a larger grid."""
    case = Case((9, 14), (5, 4), (1, 3), extra=6, batch=2, heads=4, heads_kv=2, dtype=dtype)
    plain = tensors(case)
    expected, _ = check(case, plain)

    def heads_first(x):
        return x.movedim(-2, 1).contiguous().movedim(1, -2)

    def swapped(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def crop(x):
        larger = x.new_full([x.shape[0], *(n + 2 for n in x.shape[1:-1]), x.shape[-1]], math.nan)
        inner = larger[(slice(None), *[slice(1, -1)] * (x.dim() - 2))]
        return inner.copy_(x)

    for view in (heads_first, swapped, crop):
        given = [view(x) for x in plain]
        assert not given[0].is_contiguous()
        out, _ = check(case, given)
        assert out.is_contiguous()
        assert out.equal(expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_window_of_one_is_the_key_itself(tensors, check, axes, causal):
    case = Case((7, 5, 6)[:axes], (1,) * axes, causal=(causal,) * axes)
    out, _ = check(case)
    _, _, v, *_ = tensors(case)
    assert out.equal(v.expand_as(out))


@pytest.mark.parametrize("skip_threshold", [0.0, 0.01])
@pytest.mark.parametrize("grid", [(1,), (1, 1), (1, 1, 1), (300,), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("dilated", [False, True])
def test_window_of_one_and_any_dilation(tensors, grid, dilated, skip_threshold):
    q, k, v, *_ = tensors(Case(grid, (1,) * len(grid)))
    dilation = grid if dilated else 1
    out = sparse_fmha.neighborhood_attention(
        q, k, v, 1, dilation=dilation, skip_threshold=skip_threshold
    )
    assert out.equal(v.expand_as(out))


def test_window_of_one_leaves_the_other_axes_free(tensors, check):
    """Rows of a picture that do not see each other: a sequence each."""
    case = Case((6, 40), (1, 9), heads=2, heads_kv=2)
    out, _ = check(case)
    q, k, v, *_ = (x if x is None else x.flatten(0, 1) for x in tensors(case))
    rows = sparse_fmha.neighborhood_attention(q, k, v, 9)
    torch.testing.assert_close(out.flatten(0, 1), rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_empty(check, axes):
    case = Case((6,) * axes, (3,) * axes, batch=0)
    out, _ = check(case)
    assert out.numel() == 0


def test_no_extra_tokens_is_as_without(tensors):
    q, k, v = tensors(Case((12, 12), (3, 3)))[:3]
    none = k.new_empty(1, 0, 1, 16)
    out = sparse_fmha.neighborhood_attention(q, k, v, 3, extra_k=none, extra_v=none)
    assert out.equal(sparse_fmha.neighborhood_attention(q, k, v, 3))


def test_inputs_stay_and_repeats_are_equal(tensors):
    case = Case((20, 20), (7, 7), extra=5, batch=2, heads=4, heads_kv=2, dtype=torch.bfloat16)
    given = tensors(case)
    copies = [t.clone() for t in given]

    def run():
        q, k, v, extra_k, extra_v = given
        return sparse_fmha.neighborhood_attention(
            q, k, v, case.window, extra_k=extra_k, extra_v=extra_v, return_lse=True
        )

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))
    assert all(a.equal(b) for a, b in zip(given, copies, strict=True))


@st.composite
def beyond_the_start(draw):
    """Windows on a causal axis that may reach past its start, beside one that may not."""
    grid = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    window = draw(st.integers(1, 200)), draw(st.integers(1, grid[1]))
    stride = draw(st.integers(1, window[0])), draw(st.integers(1, window[1]))
    dilation = draw(st.integers(1, 70)), 1
    return Case(grid, window, stride, dilation, (True, False))


@settings(max_examples=40, deadline=None)
@example(case=Case((7, 1), (2**31 - 1, 1), (2**31 - 1, 1), (2**31 - 1, 1), (True, False)))
@example(case=Case((50, 1), (50, 1), (1, 1), (3, 1), (True, False)))
@given(case=beyond_the_start())
def test_causal_window_beyond_the_start(check, case):
    check(case)


@pytest.mark.parametrize("window", [41, 4096])
def test_causal_window_beyond_the_start_is_causal(tensors, window):
    q, k, v, *_ = tensors(Case((40,), (1,)))
    out = sparse_fmha.neighborhood_attention(q, k, v, window, causal=True)
    torch.testing.assert_close(out, sparse_fmha.attention(q, k, v, causal=True))
    compiled = torch.compile(
        sparse_fmha.neighborhood_attention, fullgraph=True, dynamic=True, backend="eager"
    )
    assert compiled(q, k, v, window, causal=True).equal(out)


def test_other_windows_may_not_pass_the_grid(tensors):
    q, k, v, *_ = tensors(Case((8, 8), (1, 1)))
    with pytest.raises(
        ValueError,
        match=r"^window\[1\] \* dilation\[1\] must be at most the 8 tokens .*, got 9 \* 1",
    ):
        sparse_fmha.neighborhood_attention(q, k, v, 9, causal=(True, False))
    empty = q[:, :0, 0]
    with pytest.raises(
        ValueError,
        match=r"^window\[0\] \* dilation\[0\] must be at most the 0 tokens .*, got 9 \* 1",
    ):
        sparse_fmha.neighborhood_attention(empty, empty, empty, 9, causal=True)
