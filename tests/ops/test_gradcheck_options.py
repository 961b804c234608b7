"""Gradients by differences of what calls take besides q, k and v, through out and through lse.

Inputs move in a few random directions, and results are projected to a few numbers. lse is in fp32,
so its differences are over longer steps. These are powers of two, directions have entries of 1 and
-1, and biases are multiples of a power of two: in fp32, too, a step changes them exactly.
"""

from functools import partial

import pytest
import torch
from bias_cases import BY_MECHANISM, FORMS, biased
from gradient_cases import CASES, values
from gradient_oracle import GRADIENTS
from packed_cases import Packed
from threshold_cases import LISTS, limited
from torch.autograd import gradcheck

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

INF = float("inf")
UNIT = 2.0**-10
DIRECTIONS, PROJECTIONS = 5, 3


def check(function, inputs):
    """`function` returns out and lse."""
    inputs = [x.detach().double() for x in inputs]
    generator = torch.Generator().manual_seed(7)

    def signs(*shape):
        return torch.randint(2, shape, generator=generator).double() * 2 - 1

    ways = [signs(*x.shape, DIRECTIONS) for x in inputs]
    steps = [torch.zeros(DIRECTIONS, dtype=torch.float64, requires_grad=True) for _ in inputs]
    projections = [torch.randn(PROJECTIONS, x.numel(), generator=generator, dtype=torch.float64)
                   for x in function(*inputs)]  # fmt: skip

    def projected(place, *given):
        moved = [x + way @ step for x, way, step in zip(inputs, ways, given, strict=True)]
        found = function(*moved)[place].double()
        return projections[place] @ found.masked_fill(found == -INF, 0).flatten()

    assert gradcheck(partial(projected, 0), steps, eps=UNIT, atol=1e-4)
    assert gradcheck(partial(projected, 1), steps, eps=8 * UNIT, atol=2e-3)


def check_op(case, arguments):
    """Of all that has a gradient."""
    names = [n for n in GRADIENTS if n in arguments]

    def run(*given):
        own = dict(zip(names, given, strict=True))
        return case.forward({**arguments, **own, "key_bias": own["key_bias"].float()})

    check(run, [arguments[n] for n in names])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BY_MECHANISM.values(), ids=BY_MECHANISM)
def test_key_bias(name, form):
    case, arguments = biased(CASES[name], form)
    arguments["key_bias"] = (arguments["key_bias"] / UNIT).round() * UNIT
    assert arguments["key_bias"].isinf().any()
    check_op(case, arguments)


@pytest.mark.parametrize("name", LISTS)
def test_row_threshold(name):
    """Biases are multiples of a half. No threshold is one: a step must not cross it."""
    case, arguments = limited(CASES[name])
    arguments["row_threshold"] = arguments["row_threshold"] - 0.25
    check_op(case, arguments)


QUERIES, KEYS, DIM = 70, 900, 8


def skipping_inputs(queries=QUERIES):
    """Scores of around 3, of around -15 for the second third of the keys, then of around 1: all
    are more than 2 away from the threshold of 1e-3, which is 6.9 below the largest."""
    q, k, v = (
        values(1, n, 1, DIM, seed=i, dtype=torch.float64, device="cpu")
        for i, n in enumerate((queries, KEYS, KEYS))
    )
    q, k = 0.1 * q, 0.1 * k
    q[..., 0] = DIM**0.5
    for third, score in zip(k.chunk(3, 1), (3, -15, 1), strict=True):
        third[..., 0] = score
    return q, k, v


def block_lists():
    blocks = torch.ones(1, 1, -(-QUERIES // 64), -(-KEYS // 64), dtype=torch.bool)
    return BlockMask.from_blocks(blocks, QUERIES, KEYS, 64, 64)


def stripes():
    seen = torch.arange(KEYS) % 5 > 0
    return StripeMask.from_columns(seen.expand(1, 1, -(-QUERIES // 64), -1), QUERIES, 64)


SKIPPING = {
    "dense": lambda *x, **options: sparse_fmha.attention(*x, **options),
    "causal": lambda *x, **options: sparse_fmha.attention(*x, causal=True, **options),
    "block lists": lambda *x, **options: sparse_fmha.block_sparse_attention(
        *x, block_lists(), **options
    ),
    "stripes": lambda *x, **options: sparse_fmha.stripe_attention(*x, stripes(), **options),
    "window": lambda *x, **options: sparse_fmha.neighborhood_attention(*x, 500, **options),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_skipping(name):
    """What is kept is the same beside each of the inputs."""
    inputs = skipping_inputs(KEYS if name == "window" else QUERIES)
    options = {"skip_threshold": 1e-3, "return_lse": True}
    *_, stats = SKIPPING[name](*inputs, return_stats=True, **options)
    assert 0 < stats.skipped.sum() < stats.visited.sum()
    check(lambda *given: SKIPPING[name](*given, **options), inputs)


LENGTHS = ((5, 7, 7), (1, 4, 3), (0, 2, 2), (6, 3, 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("counts_used", [False, True])
def test_packed_sequences(causal, counts_used):
    case = Packed(LENGTHS, dim=8, heads=2, heads_kv=1, causal=causal, counts_used=counts_used)
    given, _ = case.arguments(torch.float64)
    inputs = [given.pop(n).nan_to_num(0) for n in "qkv"]

    def run(*leaves):
        own = dict(zip("qkv", leaves, strict=True))
        return sparse_fmha.varlen_attention(**own, **given, return_lse=True)

    check(run, inputs)


def test_packed_neighborhoods():
    grids = [(3, 4), (3, 4), (7,), (2, 2, 3)]
    window = [(3, 2), (2, 3), (4,), (1, 2, 2)]
    options = {"stride": [(1, 2), 1, 2, 1], "causal": [False, False, True, False]}
    inputs = [
        values(12 + 12 + 7 + 12, heads, 8, seed=i, dtype=torch.float64, device="cpu")
        for i, heads in enumerate((2, 1, 1))
    ]

    def run(*leaves):
        return sparse_fmha.varlen_neighborhood_attention(
            *leaves, grids, window, **options, return_lse=True
        )

    check(run, inputs)
