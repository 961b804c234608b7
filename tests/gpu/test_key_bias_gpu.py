"""A bias of keys on the GPU: every mechanism, what it hides, and what raises."""

from dataclasses import replace

import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import CASES, LARGE, Case, plain, values, window
from gradient_oracle import attend, mask_of
from output_rule import assert_as_good_as_rounded
from poison import poisoned

import sparse_fmha

pytestmark = pytest.mark.gpu

INF = float("inf")
BF16 = torch.bfloat16
large = pytest.mark.parametrize("name", LARGE)
# One of each way to find and load keys; 128 is the head dim of the most intricate kernels.
MECHANISMS = ["dense, more keys", "causal", "2-D, dilation", "blocks 64x64, causal", "stripes"]
mechanisms = pytest.mark.parametrize("name", MECHANISMS)
dims = pytest.mark.parametrize("dim", [64, 128, 256])


def run(case, arguments):
    with poisoned():
        return case.forward(arguments)


def check(case, arguments):
    """out and lse, whose errors are at most twice those of attention with the same roundings."""
    __tracebackhide__ = True
    out, lse = run(case, arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    of_rows = exact_lse.abs().max().item()
    torch.testing.assert_close(
        lse.masked_fill(lse == -INF, 0).double(), exact_lse, rtol=2e-6, atol=1e-3 + 1e-6 * of_rows
    )
    assert_as_good_as_rounded(case, arguments, out, exact)
    return out, lse


@pytest.mark.parametrize("dim", [32, 64, 72, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@large
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dtype, dim):
    """The forms take turns."""
    form = FORMS[(list(LARGE).index(name) + dim // 8) % 4]
    check(*biased(LARGE[name], form, dtype, device=cuda, dim=dim))


@pytest.mark.parametrize("name", CASES)
def test_small(cuda, name):
    for form in FORMS:
        check(*biased(CASES[name], form, BF16, device=cuda, dim=64))


@dims
@mechanisms
def test_padding_that_fills_tiles(cuda, name, dim):
    """At the beginning, in the middle and at the end, longer than any tile."""
    case, arguments = biased(LARGE[name], "one head", BF16, hidden=0, device=cuda, dim=dim)
    bias = arguments["key_bias"]
    tokens = bias.shape[2]
    bias[0, :, : tokens // 2 + 7] = -INF
    bias[1, :, tokens // 3 : tokens - 40] = -INF
    check(case, arguments)
    bias[0, :, tokens // 2 + 7 : -1] = -INF
    bias[1, :, :-2] = -INF
    check(case, arguments)


@dims
@mechanisms
def test_rows_whose_keys_are_all_hidden(cuda, name, dim):
    case = replace(LARGE[name], extra=0)
    case, arguments = biased(case, "batch, heads", BF16, device=cuda, dim=dim)
    arguments["key_bias"][1, -1] = -INF
    out, lse = check(case, arguments)
    assert out[1, ..., -1, :].eq(0).all()
    assert lse[1, ..., -1].eq(-INF).all()
    assert out[0].ne(0).any()


@dims
@mechanisms
@pytest.mark.parametrize("junk", [float("nan"), INF, -INF])
def test_hidden_keys_may_hold_anything(cuda, name, dim, junk):
    case, arguments = biased(LARGE[name], "one for all", BF16, device=cuda, dim=dim)
    hidden = arguments["key_bias"][0, 0] == -INF
    keys, values_of = (arguments[n].flatten(1, -3) for n in "kv")
    values_of[:, hidden] = 0
    expected = run(case, arguments)
    keys[:, hidden] = junk
    for found, wanted in zip(run(case, arguments), expected, strict=True):
        assert found.equal(wanted)


@dims
@mechanisms
@pytest.mark.parametrize("value", [float("nan"), INF])
def test_nan_and_infinity_make_the_rows_that_see_the_key_nan(cuda, name, dim, value):
    case, arguments = biased(LARGE[name], "one for all", BF16, hidden=0, device=cuda, dim=dim)
    mask = mask_of(case.mechanism, arguments)
    visible = mask.flatten(0, -2).any(0).nonzero()
    key = visible[len(visible) // 2].item()
    arguments["key_bias"][..., key] = value
    out, lse = run(case, arguments)
    seen = mask[..., key].expand(2, case.heads, -1).transpose(1, 2)
    assert seen.any()
    assert out.flatten(1, -3).isnan().all(-1).equal(seen)
    assert lse.flatten(1, -2).isnan().equal(seen)


@dims
@mechanisms
@pytest.mark.parametrize("slope", [-3.0, -0.2, 0.2, 3.0])
def test_biases_that_rise_or_fall(cuda, name, dim, slope):
    """Maxima that move in each tile, by little or beyond what weights can hold."""
    case, arguments = biased(LARGE[name], "one batch entry", BF16, device=cuda, dim=dim)
    bias = arguments["key_bias"]
    bias += slope * torch.arange(bias.shape[2], device=cuda)
    check(case, arguments)


@dims
@mechanisms
def test_biases_that_jump(cuda, name, dim):
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=dim)
    bias = arguments["key_bias"]
    bias *= 10.0 ** values(*bias.shape, seed=5, dtype=torch.float32, device=cuda)
    check(case, arguments)


@dims
@pytest.mark.parametrize("name", ["causal", "2-D", "blocks 64x64, causal", "stripes, causal"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-8, 0.7, -2.5])
def test_any_scale(cuda, name, scale, dim):
    case = replace(LARGE[name], scale=scale)
    check(*biased(case, "one head", BF16, device=cuda, dim=dim))


@dims
@mechanisms
def test_a_bias_of_zero_changes_little(cuda, name, dim):
    case, arguments = biased(LARGE[name], "one for all", BF16, device=cuda, dim=dim)
    bias = arguments.pop("key_bias")
    out, lse = run(case, arguments)
    found, found_lse = run(case, {**arguments, "key_bias": torch.zeros_like(bias)})
    torch.testing.assert_close(found, out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-4)


@dims
def test_the_largest_finite_numbers_are_not_infinite(cuda, dim):
    """As in torch's softmax, all keys at the lowest number share the weights."""
    q, k, v = (values(1, 300, 2, dim, seed=i, dtype=BF16, device=cuda) for i in range(3))
    bias = torch.full((1, 1, 300), torch.finfo(torch.float32).min, device=cuda)
    out = sparse_fmha.attention(q, k, v, key_bias=bias, scale=0.01)
    mean = v.float().mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.float(), mean, rtol=1e-2, atol=1e-3)
    bias[..., 250] = torch.finfo(torch.float32).max
    out = sparse_fmha.attention(q, k, v, key_bias=bias, scale=0.01)
    torch.testing.assert_close(out, v[:, 250:251].expand_as(out))


@mechanisms
def test_layouts(cuda, name):
    """Strides of any kind give the bits of the contiguous copy."""
    case, arguments = biased(LARGE[name], "batch, heads", BF16, device=cuda, dim=64)
    bias = arguments["key_bias"]
    gaps = torch.stack([bias, bias], 3)[..., 0]
    heads_last = bias.transpose(1, 2).contiguous().transpose(1, 2)
    shifted = torch.cat([bias.flatten(), bias.flatten()])[1:][: bias.numel()].view(bias.shape)
    for strided in (gaps, heads_last, bias[:, :1].expand_as(bias), shifted):
        own = run(case, {**arguments, "key_bias": strided})
        plain_copy = run(case, {**arguments, "key_bias": strided.contiguous().clone()})
        assert own[0].equal(plain_copy[0])
        assert own[1].equal(plain_copy[1])


GRIDS = {  # split into several launches
    "dilation above 8": Case("neighborhood", (23, 50), window((3, 4), 1, (2, 12)), batch=2),
    "3-D, many batch entries": Case("neighborhood", (4, 9, 16), window((2, 4, 7))),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_in_several_launches(cuda, name):
    batch = 8 if name.startswith("3-D") else 2
    case = replace(GRIDS[name], batch=batch)
    arguments = case.arguments(BF16, cuda, 64)
    tokens = arguments["k"].shape[1:-2].numel()
    arguments["key_bias"] = values(batch, 2, tokens, seed=3, dtype=torch.float32, device=cuda) * 2
    check(case, arguments)


def test_runs_are_equal_beside_other_work(cuda):
    """Many tiles for each thread block, so that stages are reused across query tiles."""
    case = Case("fmha", (1100,), plain(causal=True), heads=8, heads_kv=2, batch=2)
    for dim in (64, 128, 256):
        each, arguments = biased(case, "batch, heads", BF16, device=cuda, dim=dim)
        expected = check(each, arguments)
        side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=cuda)
        for _ in range(30):
            with torch.cuda.stream(side):
                noise = (noise @ noise).tanh()
            found = run(each, arguments)
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_public_functions(cuda):
    """With a grid's bias, GQA and a sink."""
    q = values(2, 12, 20, 4, 64, seed=0, dtype=BF16, device=cuda)
    k, v = (values(2, 12, 20, 2, 64, seed=i, dtype=BF16, device=cuda) for i in (1, 2))
    bias = values(2, 1, 12, 20, seed=3, dtype=torch.float32, device=cuda)
    sink = values(4, seed=4, dtype=torch.float32, device=cuda)
    found = sparse_fmha.neighborhood_attention(
        q, k, v, (5, 7), key_bias=bias, sink=sink, return_lse=True
    )
    there = [x.cpu().float() for x in (q, k, v)]
    options = {"key_bias": bias.cpu(), "sink": sink.cpu(), "return_lse": True}
    expected = sparse_fmha.neighborhood_attention(*there, (5, 7), **options)
    torch.testing.assert_close(found[0].cpu().float(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-5, atol=1e-3)


def test_what_raises(cuda):
    case, arguments = biased(LARGE["blocks 64x64, causal"], "one head", BF16, device=cuda, dim=64)
    skipping = {**arguments, "skip_threshold": torch.full((2,), 0.1, device=cuda)}
    with pytest.raises(RuntimeError, match="with skipping, with key_bias, which runs on the CPU"):
        case.forward(skipping)
