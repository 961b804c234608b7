"""Values of another head dim than q and k on the GPU: every mechanism, its gradients, skipping."""

import contextlib
from dataclasses import replace

import other_archs
import pytest
import skip_cases
import torch
from bias_cases import biased
from gradient_cases import CASES, LARGE, Case, plain
from gradient_oracle import attend
from gradient_rule import assert_as_good_as_torch, output_gradients
from output_rule import assert_as_good_as_rounded
from poison import poisoned

import sparse_fmha
from sparse_fmha import reference

pytestmark = pytest.mark.gpu

INF = float("inf")
BF16 = torch.bfloat16
# The row for both; smaller than it; narrower values; wider ones; and neither a multiple of 64.
DIMS = ((192, 128), (160, 72), (136, 128), (128, 64), (64, 128), (40, 96), (72, 200))
MECHANISMS = ["dense, more keys", "causal", "2-D, dilation", "blocks 64x64, causal", "stripes"]
TILE = 80  # keys that are skipped together
dims = pytest.mark.parametrize("dim", DIMS, ids=str)


@pytest.fixture(autouse=True)
def hopper(cuda):
    if other_archs.in_use() != "sm90":
        pytest.skip("the other architectures have one width")


def arguments_of(case, cuda, dim, dtype=BF16, **more):
    return case.arguments(dtype, device=cuda, dim=dim[0], value_dim=dim[1], **more)


def run(case, arguments):
    with poisoned():
        return case.forward(arguments)


def check(case, arguments):
    """out and lse, whose errors are at most twice those of attention with the same roundings."""
    __tracebackhide__ = True
    out, lse = run(case, arguments)
    assert out.shape == (*arguments["q"].shape[:-1], arguments["v"].shape[-1])
    assert out.is_contiguous()
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(
        lse.masked_fill(lse == -INF, 0).double(), exact_lse, rtol=2e-6, atol=1e-3
    )
    assert_as_good_as_rounded(case, arguments, out, exact)
    return out, lse


def differentiate(case, arguments, deterministic):
    out, lse = run(case, arguments)
    dout, _ = output_gradients(out, lse)
    with poisoned() if deterministic else contextlib.nullcontext():
        return case.backward(arguments, out, lse, dout, deterministic=deterministic), dout, lse


@pytest.mark.parametrize("name", CASES)
def test_small(cuda, name):
    check(CASES[name], arguments_of(CASES[name], cuda, (192, 128)))


@dims
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_several_tiles(cuda, name, dtype, dim):
    check(LARGE[name], arguments_of(LARGE[name], cuda, dim, dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 79, 80, 81, 127, 128, 129, 160, 161, 241])
def test_tile_borders(cuda, length, causal):
    for q_len, kv_len in ((193, length), (length, 193)):
        case = Case("fmha", (q_len,), plain(causal=causal), kv=(kv_len,), heads=4, heads_kv=2)
        check(case, arguments_of(case, cuda, (192, 128)))


@pytest.mark.parametrize("causal", [False, True])
def test_long(cuda, causal):
    case = Case("fmha", (4097,), plain(causal=causal), heads=3, heads_kv=1)
    check(case, arguments_of(case, cuda, (192, 128)))


@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-6, -3.0])
@pytest.mark.parametrize("name", MECHANISMS)
def test_scale(cuda, name, scale):
    case = replace(LARGE[name], scale=scale)
    check(case, arguments_of(case, cuda, (192, 128)))


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_moving_maximum(cuda, dtype, order):
    """Scores that drift by hundreds, also by more than weights of fp16 may be apart."""
    case = Case("fmha", (200,), kv=(1000,), scale=1.0)
    arguments = arguments_of(case, cuda, (192, 128), dtype)
    arguments["q"][..., 0] = 8
    drift = torch.linspace(-16, 16 * order, 1000, device=cuda, dtype=dtype)
    arguments["k"][..., 0] = drift[:, None]
    check(case, arguments)


@dims
@pytest.mark.parametrize("name", MECHANISMS)
def test_with_a_bias(cuda, name, dim):
    sizes = {"device": cuda, "dim": dim[0], "value_dim": dim[1]}
    case, arguments = biased(LARGE[name], "one head", BF16, **sizes)
    check(case, arguments)
    found, dout, lse = differentiate(case, arguments, deterministic=True)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@dims
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_gradients(cuda, name, deterministic, dim):
    case = LARGE[name]
    arguments = arguments_of(case, cuda, dim)
    found, dout, lse = differentiate(case, arguments, deterministic)
    assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize("name", MECHANISMS)
def test_small_gradients(cuda, name):
    """Of a problem that the emulator runs, too."""
    for dim in ((64, 128), (192, 128)):
        case = CASES[{"blocks 64x64, causal": "blocks 128x32, causal"}.get(name, name)]
        arguments = arguments_of(case, cuda, dim)
        for deterministic in (False, True):
            found, dout, lse = differentiate(case, arguments, deterministic)
            assert_as_good_as_torch(case, arguments, found, dout, lse)


@pytest.mark.parametrize("dim", [(192, 128), (160, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_tiles_are_skipped(cuda, causal, threshold, dim):
    length = 450
    given = skip_cases.inputs(length, heads=2, heads_kv=1, dim=dim[0], batch=1, value_dim=dim[1])
    q, k, v = (x.to(cuda, BF16) for x in given)
    with poisoned():
        out, lse, stats = sparse_fmha.attention(
            q, k, v, causal=causal, skip_threshold=threshold, return_lse=True, return_stats=True
        )
    visible = torch.ones(length, length, dtype=torch.bool, device=cuda)
    visible = visible.tril() if causal else visible
    ranks = reference.tile_ranks(length, TILE, descending=True, device=cuda)
    groups = skip_cases.rows(length).to(cuda)
    exact, exact_lse, skipped = reference.skip_attention(q, k, v, visible, threshold, groups, ranks)
    assert stats.skipped.equal(skipped.sum((2, 3)))
    assert bool(stats.skipped.any()) == (threshold > 0)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    assert (out - exact).abs().max() <= 2 * torch.finfo(BF16).eps * exact.abs().max()
