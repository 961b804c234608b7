"""Dense and causal attention on the CPU against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_fmha
from sparse_fmha import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HEAD_DIMS = [8, 40, 72, 96, 128, 200, 256]


@pytest.fixture(scope="session")
def check(poisoned, agrees):
    """check(q, k, v, causal, scale): the public function agrees with the reference."""

    def run(q, k, v, causal=False, scale=None):
        with poisoned():
            out, lse = sparse_fmha.attention(q, k, v, causal=causal, scale=scale, return_lse=True)
        visible = torch.tensor(True)
        if causal:
            visible = reference.causal_mask(q.shape[1], k.shape[1])
        agrees(out, lse, q, k, v, visible, scale)
        return out, lse

    return run


@pytest.fixture(scope="session")
def qkv(randn):
    def make(batch, len_q, len_kv, heads, heads_kv, dim, dtype=torch.float32):
        return (
            randn(batch, len_q, heads, dim, dtype=dtype, seed=1),
            randn(batch, len_kv, heads_kv, dim, dtype=dtype, seed=2),
            randn(batch, len_kv, heads_kv, dim, dtype=dtype, seed=3),
        )

    return make


def test_new_tensors_are_poisoned(poisoned):
    with poisoned():
        assert torch.ones(3).new_empty(300).isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_dtypes_and_head_dims(check, qkv, dim, dtype, causal):
    check(*qkv(1, 151, 151, 2, 2, dim, dtype), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "heads_kv"), [(6, 6), (6, 2), (5, 1)])
def test_shared_key_heads(check, qkv, heads, heads_kv, dtype, causal):
    check(*qkv(2, 70, 133, heads, heads_kv, 32, dtype), causal)


@pytest.mark.parametrize(
    ("len_q", "len_kv"),
    [(1, 1), (1, 300), (300, 1), (64, 64), (128, 256), (129, 65), (63, 257), (260, 100)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(check, qkv, len_q, len_kv, causal):
    out, lse = check(*qkv(1, len_q, len_kv, 2, 1, 32), causal)
    if causal and len_q > len_kv:  # the first queries see nothing
        blind = len_q - len_kv
        assert out[:, :blind].eq(0).all()
        assert lse[:, :blind].eq(-math.inf).all()
        assert lse[:, blind:].isfinite().all()


@settings(max_examples=100)
@given(
    batch=st.integers(1, 2),
    len_q=st.integers(1, 300),
    len_kv=st.integers(1, 300),
    heads_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.integers(1, 32).map(lambda n: 8 * n),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    scale=st.none() | st.floats(-1, 1, width=32),
)
def test_drawn(check, qkv, batch, len_q, len_kv, heads_kv, group, dim, dtype, causal, scale):
    check(*qkv(batch, len_q, len_kv, heads_kv * group, heads_kv, dim, dtype), causal, scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.02, -0.125, 0.0])
def test_scale(check, qkv, scale, dtype, causal):
    out, _ = check(*qkv(2, 90, 140, 2, 1, 64, dtype), causal, scale)
    default, _ = check(*qkv(2, 90, 140, 2, 1, 64, dtype), causal)
    assert not torch.allclose(out, default)


def test_zero_scale_is_the_mean(qkv):
    q, k, v = qkv(1, 5, 130, 2, 2, 16, torch.float64)
    out, lse = sparse_fmha.attention(q, k, v, scale=0.0, return_lse=True)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(130)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size(check, qkv, dtype, causal):
    """Scores of some hundreds: exp overflows fp32 unless the maximum is taken off first."""
    q, k, v = qkv(1, 130, 200, 2, 2, 64, dtype)
    check(q, k, v, causal, scale=8.0)
    check(q, k + 12, v, causal)  # a common offset for a query: it moves lse alone
    check(q, k, v - 3, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maximum_grows_and_falls_along_the_keys(check, qkv, dtype):
    """The running maximum changes at every tile, or never after the first."""
    q, k, v = qkv(1, 100, 400, 1, 1, 32, dtype)
    ramp = torch.linspace(0, 4, 400).to(dtype)[None, :, None, None]
    check(q.abs(), ramp * torch.ones_like(k), v)
    check(q.abs(), ramp.flip(1) * torch.ones_like(k), v)


def views(x):
    """x [B, S, H, D] in other layouts with a unit last stride: same values, other strides."""
    batch, length, heads, dim = x.shape
    yield "heads first", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "batch innermost", x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    wide = x.new_full((batch, length, heads, 3 * dim), math.nan)
    wide[..., dim : 2 * dim] = x
    yield "packed qkv", wide[..., dim : 2 * dim]
    sparse = x.new_full((batch, 2 * length, heads, dim), math.nan)
    sparse[:, ::2] = x
    yield "every second token", sparse[:, ::2]
    padded = x.new_full((batch, length + 3, heads + 1, dim), math.nan)
    padded[:, 2:-1, 1:] = x
    yield "slice", padded[:, 2:-1, 1:]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(check, qkv, dtype, causal):
    q, k, v = qkv(2, 77, 141, 4, 2, 40, dtype)
    expected = sparse_fmha.attention(q, k, v, causal=causal)
    for (name, a), (_, b), (_, c) in zip(views(q), views(k), views(v), strict=True):
        assert not a.is_contiguous(), name
        out, _ = check(a, b, c, causal)
        assert out.is_contiguous()
        assert out.equal(expected), name
    mixed = [dict(views(x)) for x in (q, k, v)]
    out, _ = check(mixed[0]["heads first"], k, mixed[2]["slice"], causal)
    assert out.equal(expected)


def test_expanded_views(check, qkv):
    q, k, v = qkv(1, 33, 70, 2, 1, 32)
    check(q.expand(3, -1, -1, -1), k.expand(3, -1, 2, -1), v.expand(3, -1, 2, -1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)], ids=str)
def test_empty(check, qkv, shape, causal):
    out, lse = check(*qkv(*shape, 2, 1, 16), causal)
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


def test_out_alone(qkv):
    q, k, v = qkv(1, 20, 30, 2, 2, 16)
    out, _ = sparse_fmha.attention(q, k, v, return_lse=True)
    assert sparse_fmha.attention(q, k, v).equal(out)


@pytest.mark.parametrize("causal", [False, True])
def test_inputs_stay_and_repeats_are_equal(qkv, causal):
    tensors = qkv(2, 200, 300, 4, 2, 64, torch.bfloat16)
    copies = [t.clone() for t in tensors]
    first = sparse_fmha.attention(*tensors, causal=causal, return_lse=True)
    second = sparse_fmha.attention(*tensors, causal=causal, return_lse=True)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert all(a.equal(b) for a, b in zip(tensors, copies, strict=True))


def test_number_of_threads_does_not_show(qkv):
    q, k, v = qkv(2, 300, 300, 2, 2, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(sparse_fmha.attention(q, k, v, causal=True))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_errors_of_long_sums(randn, dim):
    """Of fp32 scores; a sum of all head dims in one go has 1.8 times the error at 256."""
    q, k, v = (randn(1, 2, 300, dim, seed=i) * (3 if i < 2 else 1) for i in range(3))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact, of_torch = sdpa(*(x.double() for x in (q, k, v))), sdpa(q, k, v)
    found = sparse_fmha.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    error, allowed = ((x - exact).square().mean().sqrt() for x in (found, of_torch))
    assert error < 1.3 * allowed
