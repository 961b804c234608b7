"""Sinks: one more logit in a row's softmax, without a value."""

import bias_oracle
import pytest
import torch
from gradient_cases import values
from gradient_oracle import mask_of

import sparse_fmha
from sparse_fmha import StripeMask, explain
from sparse_fmha.attention._scores import add_sink
from sparse_fmha.masks.block_grid import BlockGrid

INF = float("inf")


def block_mask(q, k):
    grid = BlockGrid.of(q, k, 64, 32, causal=True)
    return grid.mask(grid.sink(32) | grid.local(64))


def stripe_mask(q, k):
    seen = torch.arange(k.shape[1]) % 3 != 0
    seen = seen.expand(1, 1, -(-q.shape[1] // 64), -1)
    return StripeMask.from_columns(seen, q.shape[1], 64, causal=True, width=k.shape[1])


def causal_of(q, k):
    return mask_of("fmha", {"q": q, "k": k, "causal": True})


def window_of(q, k):
    ones = {"window": [9], "stride": [1], "dilation": [1], "causal": [0]}
    return mask_of("neighborhood", {"q": q, "k": k, **ones})


FUNCTIONS = {
    "causal": (lambda q, k, v, **o: sparse_fmha.attention(q, k, v, causal=True, **o), causal_of),
    "neighborhood": (
        lambda q, k, v, **o: sparse_fmha.neighborhood_attention(q, k, v, 9, **o),
        window_of,
    ),
    "block lists": (
        lambda q, k, v, **o: sparse_fmha.block_sparse_attention(q, k, v, block_mask(q, k), **o),
        lambda q, k: block_mask(q, k).to_dense(),
    ),
    "stripes": (
        lambda q, k, v, **o: sparse_fmha.stripe_attention(q, k, v, stripe_mask(q, k), **o),
        lambda q, k: stripe_mask(q, k).to_dense(),
    ),
}
functions = pytest.mark.parametrize(("function", "mask"), FUNCTIONS.values(), ids=FUNCTIONS)


def tensors(dtype=torch.float64, length=80, heads=4, heads_kv=2):
    return [
        values(2, length, h, 8, seed=h + i, dtype=dtype, device="cpu").requires_grad_()
        for i, h in enumerate((heads, heads_kv, heads_kv))
    ]


def a_sink(dtype=torch.float64, heads=4):
    return values(heads, seed=5, dtype=dtype, device="cpu").requires_grad_()


@functions
@pytest.mark.parametrize("biased", [False, True], ids=["", "key_bias"])
def test_fp64(function, mask, biased):
    """out, lse and gradients, against one more logit in fp64."""
    q, k, v = tensors()
    sink = a_sink()
    bias = values(2, 1, 80, seed=3, dtype=torch.float32, device="cpu") if biased else None
    given = [q, k, v, sink]
    found = function(q, k, v, sink=sink, key_bias=bias, return_lse=True)
    expected = bias_oracle.attend(q, k, v, mask(q, k), key_bias=bias, sink=sink)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)  # lse is fp32
    by = [values(*x.shape, seed=6, dtype=torch.float64, device="cpu") for x in found]
    ours = torch.autograd.grad(found, given, [by[0], by[1].float()])
    for a, b in zip(ours, torch.autograd.grad(expected, given, by), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@functions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_errors_are_those_of_the_dtype(function, mask, dtype):
    q, k, v = (x.detach() for x in tensors(dtype))
    sink = a_sink(torch.float32).detach()
    out, lse = function(q, k, v, sink=sink, return_lse=True)
    exact, exact_lse = bias_oracle.attend(q, k, v, mask(q, k), sink=sink)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-5)
    eps = torch.finfo(dtype).eps
    assert (out - exact).abs().max() <= 2 * eps * exact.abs().max() + 1e-6


def test_gradcheck():
    """Of the sink alone: the ops round lse to fp32."""
    out, lse, sink = (
        values(*shape, seed=i, dtype=torch.float64, device="cpu").requires_grad_()
        for i, shape in enumerate(((2, 3, 4, 8), (2, 3, 4), (4,)))
    )
    torch.autograd.gradcheck(add_sink, (out, lse, sink))
    torch.autograd.gradgradcheck(add_sink, (out, lse, sink))
    rows = torch.tensor([[[True, False, False, False]] * 3] * 2)

    def with_empty_rows(out, lse, sink):
        found = add_sink(out.masked_fill(rows[..., None], 0), lse.masked_fill(rows, -INF), sink)
        return found

    torch.autograd.gradcheck(with_empty_rows, (out, lse, sink))


@pytest.mark.parametrize("sink", [-INF, -1e30, -1e4, 0.0, 1e4, 1e30, INF])
@pytest.mark.parametrize("lse", [-INF, -1e30, -1e4, 0.0, 1e4, 1e30])
def test_any_size(lse, sink):
    """Nothing is NaN, and no gradient either."""
    row = torch.full((1, 1, 1), lse, requires_grad=True)
    value = 0.0 if lse == -INF else 0.7
    out = torch.full((1, 1, 1, 8), value, requires_grad=True)
    given = out, row, torch.tensor([sink], requires_grad=True)
    found = add_sink(*given)
    wide = torch.tensor([lse, sink], dtype=torch.float64)
    total = -INF if wide.max() == -INF else wide.logsumexp(0).item()
    assert found[1].item() == pytest.approx(total)
    share = (
        0.0 if lse == -INF or sink == INF else torch.tensor(lse - sink).double().sigmoid().item()
    )
    assert found[0].eq(found[0][..., :1]).all()
    assert found[0][0, 0, 0, 0].item() == pytest.approx(value * share, rel=1e-6, abs=1e-30)
    gradients = torch.autograd.grad([x.sum() for x in found], given)
    assert all(x.isfinite().all() for x in gradients)
    if sink == -INF:  # no sink
        assert gradients[2].eq(0).all()


@functions
def test_a_sink_of_minus_infinity_changes_nothing(function, mask):
    q, k, v = tensors(torch.float32)
    expected = function(q, k, v, return_lse=True)
    found = function(q, k, v, sink=torch.full((4,), -INF), return_lse=True)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_rows_without_keys():
    """out 0, lse the sink, and the gradients of a constant."""
    q, k, v = tensors(torch.float32)
    k, v = k[:, :50], v[:, :50]
    sink = a_sink(torch.float32)
    out, lse = sparse_fmha.attention(q, k, v, causal=True, sink=sink, return_lse=True)
    assert out[:, :30].eq(0).all()
    assert lse[:, :30].equal(sink.expand(2, 30, 4))
    found = torch.autograd.grad((out[:, :30].sum(), lse[:, :30].sum()), [q, k, v, sink])
    assert [bool(x.any()) for x in found] == [False, False, False, True]
    assert found[3].equal(torch.full((4,), 60.0))


def test_with_extra_tokens_and_statistics():
    """Extra keys are keys; the tiles that are skipped are those without a sink."""
    q, k, v = (x.detach() for x in tensors(length=300))
    extra = values(2, 5, 2, 8, seed=8, dtype=torch.float64, device="cpu")
    sink = a_sink().detach()
    options = {"extra_k": extra, "extra_v": -extra, "return_lse": True}
    found = sparse_fmha.neighborhood_attention(q, k, v, 9, sink=sink, **options)
    keys, vs = torch.cat([k, extra], 1), torch.cat([v, -extra], 1)
    mask = torch.nn.functional.pad(window_of(q, k), (0, 5), value=True)
    expected = bias_oracle.attend(q, keys, vs, mask, sink=sink)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    options = {"skip_threshold": 0.5, "return_lse": True, "return_stats": True}
    out, lse, stats = sparse_fmha.attention(q, k, v, **options)
    with_sink = sparse_fmha.attention(q, k, v, sink=sink, **options)
    assert with_sink[2].skipped.equal(stats.skipped)
    for a, b in zip(with_sink, add_sink(out, lse, sink), strict=False):
        assert a.equal(b)
    out, stats = sparse_fmha.attention(q, k, v, sink=sink, return_stats=True)
    torch.testing.assert_close(out, sparse_fmha.attention(q, k, v, sink=sink))
    assert stats.visited.sum() > 0


@pytest.mark.parametrize("function", [FUNCTIONS[n][0] for n in ("causal", "neighborhood")])
def test_compiled_in_one_graph(function):
    torch.compiler.reset()

    def loss(q, k, v, sink):
        out, lse = function(q, k, v, sink=sink, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    given = [*tensors(torch.float32), a_sink(torch.float32)]
    expected = torch.autograd.grad(loss(*given), given)
    for a, b in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap():
    q, k, v = (x.detach() for x in tensors(torch.float32))
    sinks = torch.stack([a_sink(torch.float32).detach() + i for i in range(3)])
    found = torch.vmap(lambda s: sparse_fmha.attention(q, k, v, sink=s))(sinks)
    expected = [sparse_fmha.attention(q, k, v, sink=s) for s in sinks]
    torch.testing.assert_close(found, torch.stack(expected))


def test_everything_stays_on_its_device():
    out = torch.empty(2, 9, 4, 8, device="meta", dtype=torch.bfloat16)
    lse, sink = torch.empty(2, 9, 4, device="meta"), torch.empty(4, device="meta")
    found = add_sink(out, lse, sink)
    assert [x.device.type for x in found] == ["meta", "meta"]
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32]


BAD = {
    "a float": (lambda s: 0.5, TypeError, "sink must be a tensor, got float"),
    "half": (
        lambda s: s.half(),
        TypeError,
        r"sink must have dtype torch\.float32, got torch\.float16",
    ),
    "fp64": (
        lambda s: s.double(),
        TypeError,
        r"sink must have dtype torch\.float32, got torch\.float64",
    ),
    "heads": (
        lambda s: s[:2],
        ValueError,
        r"sink must have shape \[4\], one entry for each query head, got \[2\]",
    ),
    "rank": (
        lambda s: s[None],
        ValueError,
        r"sink must have shape \[4\], one entry for each query head, got \[1, 4\]",
    ),
    "meta": (lambda s: s.to("meta"), ValueError, "sink must be on q's device, cpu, got meta"),
}


@pytest.mark.parametrize("bad", BAD)
@functions
def test_bad_sinks_are_named(function, mask, bad):
    change, kind, message = BAD[bad]
    with pytest.raises(kind, match=message):
        function(*tensors(torch.float32), sink=change(a_sink(torch.float32).detach()))


def test_explained():
    q = torch.empty(1, 70, 4, 8, device="meta", dtype=torch.float16)
    plain = explain(sparse_fmha.attention, q, q, q, arch="sm90")
    assert (
        explain(sparse_fmha.attention, q, q, q, sink=torch.empty(4, device="meta"), arch="sm90")
        == plain
    )
    with pytest.raises(
        ValueError, match=r"sink must have shape \[4\], one entry for each query head, got \[3\]"
    ):
        explain(sparse_fmha.attention, q, q, q, sink=torch.empty(3, device="meta"), arch="cpu")
