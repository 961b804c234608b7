"""Thresholds of rows: a query sees only keys whose bias is at least its threshold."""

import bias_oracle
import pytest
import torch
from gradient_cases import CASES, LARGE, values
from gradient_oracle import GRADIENTS, attend, gradients, mask_of
from gradient_rule import output_gradients
from threshold_cases import FORMS, LISTS, limited

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

OPS = torch.ops.sparse_fmha
INF = float("inf")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*LISTS, "large blocks 64x64, causal", "large stripes, causal"])
def test_fp64(name, form):
    cases = LARGE if name.startswith("large") else CASES
    case, arguments = limited(cases[name.removeprefix("large ")], form, seed=len(name))
    of = [n for n in GRADIENTS if n in arguments]
    own = {n: arguments[n].clone().requires_grad_() for n in of}
    out, lse = case.forward({**arguments, **own})
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)
    finite = lse.detach().masked_fill(lse == -INF, 0).double()
    torch.testing.assert_close(finite, exact_lse, rtol=1e-6, atol=1e-6)
    seen = bias_oracle.visible_with(
        mask_of(case.mechanism, arguments), arguments["key_bias"], arguments["row_threshold"]
    )
    plain = mask_of(case.mechanism, arguments)
    assert seen.sum() < plain.expand_as(seen).sum() or "without keys" in name
    rows = seen.any(-1).expand(2, case.heads, -1).transpose(1, 2)
    assert (lse == -INF).equal(~rows)
    by = output_gradients(out.detach(), lse.detach())
    found = torch.autograd.grad((out, lse), list(own.values()), by)
    for gradient, (n, expected) in zip(
        found, gradients(case.mechanism, arguments, *by).items(), strict=True
    ):
        close = {"rtol": 1e-5, "atol": 1e-6} if n == "key_bias" else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(gradient.double(), expected, **close)


@pytest.mark.parametrize("name", ["blocks 64x16", "stripes, causal"])
def test_no_number_is_seen_where_it_should_not_be(name):
    """-inf shows every key that is not hidden, +inf and NaN show none; there is no gradient."""
    case, arguments = limited(CASES[name], "one for all", torch.float32)
    arguments["key_bias"][..., ::5] = -INF
    arguments["row_threshold"] = arguments["row_threshold"].clone()
    arguments["row_threshold"][..., :20] = -INF
    arguments["row_threshold"][..., 20:30] = INF
    arguments["row_threshold"][..., 30:40] = float("nan")
    threshold = arguments["row_threshold"].requires_grad_()
    q = arguments["q"].requires_grad_()
    out, lse = case.forward(arguments)
    exact, _ = attend(case.mechanism, arguments)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    assert lse[:, 20:40].eq(-INF).all()
    assert lse[:, :20].isfinite().any()
    found = torch.autograd.grad(out.sum(), [q, threshold], allow_unused=True)
    assert found[0][:, 20:40].eq(0).all()
    assert found[1] is None


@pytest.mark.parametrize("name", ["blocks 64x16", "stripes, causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_types(name, dtype):
    case, arguments = limited(CASES[name], dtype=dtype)
    out, _ = case.forward(arguments)
    exact, _ = attend(case.mechanism, arguments)
    assert (out - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6


@pytest.mark.parametrize("name", ["blocks 64x16", "stripes, causal"])
def test_opcheck_and_vmap(name):
    case, arguments = limited(CASES[name], dtype=torch.float32)
    with torch.no_grad():
        out, lse = case.forward(arguments)
    own = {n: arguments[n].clone().requires_grad_() for n in GRADIENTS if n in arguments}
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_fwd"), (), arguments | own)
    given = {"dout": out * 2, "dlse": None, **arguments, "out": out, "lse": lse}
    torch.library.opcheck(getattr(OPS, f"{case.mechanism}_bwd"), (), given)
    thresholds = torch.stack([arguments["row_threshold"], arguments["row_threshold"] - 1])
    found = torch.vmap(lambda t: case.forward({**arguments, "row_threshold": t})[0])(thresholds)
    for one, threshold in zip(found, thresholds, strict=True):
        expected = case.forward({**arguments, "row_threshold": threshold})[0]
        torch.testing.assert_close(one, expected)


def block_sparse(q, k, v, **options):
    seen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask = BlockMask.from_blocks(seen, q.shape[1], k.shape[1], 64, 64)
    return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)


def stripe(q, k, v, **options):
    seen = torch.ones(1, 1, -(-q.shape[1] // 64), k.shape[1], dtype=torch.bool)
    mask = StripeMask.from_columns(seen, q.shape[1], 64)
    return sparse_fmha.stripe_attention(q, k, v, mask, **options)


functions = pytest.mark.parametrize("function", [block_sparse, stripe])


def tensors():
    shapes = (2, 100, 4, 8), (2, 110, 2, 8), (2, 110, 2, 8), (1, 1, 110), (2, 4, 100)
    return [values(*s, seed=i, dtype=torch.float32, device="cpu") for i, s in enumerate(shapes)]


@functions
def test_functions(function):
    q, k, v, bias, threshold = tensors()
    sink = torch.tensor([0.1, 0.2, -INF, 1.0])
    out = function(q, k, v, key_bias=bias, row_threshold=threshold, sink=sink)
    given = {"q": q, "k": k, "v": v}
    mask = mask_of("fmha", given)
    exact, _ = bias_oracle.attend(q, k, v, mask, key_bias=bias, row_threshold=threshold, sink=sink)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    skipping = function(
        q, k, v, key_bias=bias, row_threshold=threshold, sink=sink, return_stats=True
    )[0]
    torch.testing.assert_close(out, skipping)


@functions
def test_compiled_in_one_graph(function):
    torch.compiler.reset()
    q, k, v, bias, threshold = tensors()
    bias.requires_grad_()

    def loss(bias, threshold):
        return function(q, k, v, key_bias=bias, row_threshold=threshold).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(loss(bias, threshold), [bias])
    (found,) = torch.autograd.grad(compiled(bias, threshold), [bias])
    torch.testing.assert_close(found, expected)


BAD = {
    "alone": (
        {"key_bias": None},
        ValueError,
        "key_bias must be given with row_threshold, got only the latter",
    ),
    "half": (
        lambda t: t.half(),
        TypeError,
        r"row_threshold must have dtype torch\.float32, got torch\.float16",
    ),
    "tokens": (
        lambda t: t[..., :5],
        ValueError,
        r"row_threshold must have shape .* 100\], .* got \[2, 4, 5\]",
    ),
    "heads": (
        lambda t: t[:, :3],
        ValueError,
        r"row_threshold must have shape .* 100\], .* got \[2, 3, 100\]",
    ),
    "more axes": (
        lambda t: t.unflatten(2, (10, 10)),
        ValueError,
        r"row_threshold must have shape .* 100\], .* got \[2, 4, 10, 10\]",
    ),
    "a number": (lambda t: 0.5, TypeError, "row_threshold must be a tensor, got float"),
}


@pytest.mark.parametrize("bad", BAD)
@functions
def test_bad_thresholds_are_named(function, bad):
    change, kind, message = BAD[bad]
    q, k, v, bias, threshold = tensors()
    given = {"key_bias": bias, "row_threshold": threshold}
    given |= change if isinstance(change, dict) else {"row_threshold": change(threshold)}
    with pytest.raises(kind, match=message):
        function(q, k, v, **given)


def test_the_raw_op_needs_a_bias():
    _, arguments = limited(CASES["stripes"])
    del arguments["key_bias"]
    with pytest.raises(
        RuntimeError, match="sparse_fmha: key_bias must be given with row_threshold, got only the"
    ):
        OPS.stripe_fwd(**arguments)
