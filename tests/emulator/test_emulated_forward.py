"""Forward kernels on the emulator against fp64: every mechanism, key biases, sinks, layouts."""

import bias_oracle
import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import CASES, LARGE, Case, block_lists, plain, stripe_lists, window
from gradient_oracle import attend, mask_of
from output_rule import assert_as_good_as_rounded
from poison import poisoned

import sparse_fmha

BF16 = torch.bfloat16
# Lengths that tiles do not divide, groups of heads, and grids whose windows meet their edges.
TILES = {
    "dense": Case("fmha", (201,), kv=(333,), heads=4, heads_kv=2),
    "causal": Case("fmha", (301,), plain(causal=True), kv=(270,)),
    "1-D": Case("neighborhood", (391,), window((65,), 3, causal=1), extra=70),
    "2-D": Case("neighborhood", (17, 23), window((9, 14), (1, 2), causal=(0, 1))),
    "2-D, dilation": Case("neighborhood", (21, 19), window((5, 5), (1, 5), (2, 3)), extra=5),
    "3-D": Case("neighborhood", (5, 9, 7), window((3, 6, 5), (1, 2, 1)), extra=3),
    "3-D, aligned": Case("neighborhood", (4, 8, 16), window((2, 4, 8), (2, 4, 8))),
    "blocks 128x128": Case("block_sparse", (200,), block_lists(200, 330, 128, 128), kv=(330,)),
    "blocks 64x64, causal": LARGE["blocks 64x64, causal"],
    "blocks 128x16": Case("block_sparse", (150,), block_lists(150, 300, 128, 16), kv=(300,)),
    "stripes, causal": LARGE["stripes, causal"],
    # More tiles than are placed at a time, and more than there are places.
    "1-D, many tiles": Case("neighborhood", (70,), window((33,)), extra=2200),
    "blocks 64x64, many tiles": Case(
        "block_sparse", (70,), block_lists(70, 4000, 64, 64), kv=(4000,)
    ),
    "stripes, many tiles": Case("stripe", (70,), stripe_lists(70, 1300, 64, share=0.9), kv=(1300,)),
}


def check(case, arguments):
    """out and lse, whose errors are at most twice those of attention with the same roundings."""
    __tracebackhide__ = True
    with poisoned():
        out, lse = case.forward(arguments)
    exact, exact_lse = attend(case.mechanism, arguments)
    lse = lse.masked_fill(lse == -torch.inf, 0).double()
    torch.testing.assert_close(lse, exact_lse, rtol=2e-6, atol=1e-4)
    assert_as_good_as_rounded(case, arguments, out, exact)


@pytest.mark.parametrize("name", CASES)
def test_small(arch, name):
    check(CASES[name], CASES[name].arguments(BF16, dim=64))


@pytest.mark.parametrize("name", TILES)
def test_several_tiles(arch, name):
    check(TILES[name], TILES[name].arguments(BF16, dim=64))


RISING = {
    "1-D": Case("neighborhood", (1100,), window((1000,), 128)),
    "blocks 128x128": Case("block_sparse", (128,), block_lists(128, 1100, 128, 128), kv=(1100,)),
    "stripes": Case("stripe", (70,), stripe_lists(70, 1100, 64, share=0.9), kv=(1100,)),
}


@pytest.mark.parametrize("rise", [0.0, 5.0, 20.0, 600.0, -300.0])
@pytest.mark.parametrize("name", RISING)
def test_rising_scores(arch, name, rise):
    """By `rise` from one 128 keys to the next: weights out of range, in the middle and at the end
    of a row's tiles."""
    case = RISING[name]
    arguments = case.arguments(BF16, dim=64)
    q, k = arguments["q"], arguments["k"]
    q[..., 0] = 16
    q[:, 5::7, :, 0] = 0
    k[..., 0] = (rise * (torch.arange(k.shape[1]) // 128) * 0.5)[:, None].to(BF16)
    check(case, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("name", ["dense", "causal", "2-D", "blocks 128x128", "stripes, causal"])
def test_other_head_dims(arch, name, dtype):
    for dim in (40, 96, 128):
        check(TILES[name], TILES[name].arguments(dtype, dim=dim))


@pytest.mark.parametrize("name", ["dense", "causal", "1-D", "blocks 64x64, causal"])
def test_key_bias(name):
    with sparse_fmha.arch_override("sm90"):  # sm80 has no such rows
        for form in FORMS:
            check(*biased(TILES[name], form, BF16, dim=64))


@pytest.mark.parametrize("causal", [False, True])
def test_sink_and_layouts(arch, causal):
    """Tensors with heads first in memory, and rows of a wider tensor."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 150, 64, generator=generator).to(BF16).transpose(1, 2)
    k, v = torch.randn(2, 150, 2, 2, 72, generator=generator).to(BF16)[..., :64].unbind(2)
    sink = torch.randn(4, generator=generator)
    with poisoned():
        out, lse = sparse_fmha.attention(q, k, v, causal=causal, sink=sink, return_lse=True)
    mask = mask_of("fmha", {"q": q, "k": k, "causal": causal})
    exact, exact_lse = bias_oracle.attend(q, k, v, mask, sink=sink)
    eps = torch.finfo(BF16).eps
    assert (out - exact).abs().max() <= 2 * eps * exact.abs().max() + 1e-5
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("dims", [(64, 40), (40, 64), (136, 128)], ids=str)
@pytest.mark.parametrize("name", TILES)
def test_values_of_their_own_head_dim(name, dims):
    """Narrower and wider ones in a row of 64 columns, and the row for 192 and 128."""
    dim, value_dim = dims
    with sparse_fmha.arch_override("sm90"):  # sm80 has no such rows
        check(TILES[name], TILES[name].arguments(BF16, dim=dim, value_dim=value_dim))
