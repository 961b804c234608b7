"""The kernel of all gradients against the two that repeat bit for bit, over drawn neighborhoods."""

import random

import pytest
import torch
from gradient_cases import Case, window
from gradient_rule import output_gradients
from poison import poisoned
from test_backward_gpu import FUSED, PASSES, skip_without_kernel
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu


# Positions per axis of a dilation class and sides of a window, at least; 512 keys or more in all.
SIZES = (((520, 512),), ((24, 23), (24, 23)), ((9, 8), (9, 8), (9, 8)), ((2, 1), (520, 512)))


def drawn(seed):
    """Sides and windows that tiles do not divide; classes of dilation with unequal lengths."""
    rng = random.Random(seed)
    grid, size, stride, dilation, causal = [], [], [], [], []
    sizes = SIZES[seed % len(SIZES)]
    for least, window_least in sizes:
        step = rng.choice((1, 1, 1, 2, 3))
        if len(sizes) == 1:
            step = rng.choice((1, 1, step, 11))  # more than tensor maps can stride over
        positions = rng.randint(least, least + least // 3)
        span = rng.randint(window_least, positions)
        grid.append(positions * step + rng.randrange(step))
        size.append(span)
        stride.append(rng.choice((1, span, rng.randint(1, span))))
        dilation.append(step)
        causal.append(rng.choice((0, 0, 1)))
    heads_kv = rng.randint(1, 3)
    plain = all(step == 1 or one == 1 for step, one in zip(dilation, size, strict=True))
    return Case(
        "neighborhood",
        tuple(grid),
        window(tuple(size), tuple(stride), tuple(dilation), tuple(causal)),
        heads=heads_kv * rng.randint(1, 3),
        heads_kv=heads_kv,
        extra=rng.choice((0, 1, 70, 130)) if plain else 0,
        scale=rng.choice((None, -0.2)),
        batch=rng.choice((1, 2, 6)),
    )


@pytest.mark.parametrize("dim", [64, 104, 128])
@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_those_of_two_kernels(cuda, seed, dim):
    case = drawn(16 * dim + seed)
    skip_without_kernel_of("neighborhood", dim)
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    out, lse = case.forward(arguments)
    given = out, lse, *output_gradients(out, lse)
    expected = case.backward(arguments, *given, deterministic=True)
    with poisoned(), profile(activities=[ProfilerActivity.CUDA]) as recorded:
        found = case.backward(arguments, *given)
        torch.cuda.synchronize()
    assert any("round_sums" in x.key for x in recorded.key_averages())
    assert_close(found, expected, case)


BESIDE_THE_END = {
    "neighborhood": Case("neighborhood", (40, 33), window((17, 31))),
    "neighborhood, extra tokens": Case("neighborhood", (40, 33), window((17, 31)), extra=70),
    "dense": Case("fmha", (300,), kv=(1000,)),
}


@pytest.mark.parametrize("name", BESIDE_THE_END)
@pytest.mark.parametrize("dim", [64, 128])
def test_weights_of_keys_out_of_range_may_overflow(cuda, dim, name):
    """These keys read as zero, so that here their scores are far above all that are there."""
    skip_without_kernel_of(name.partition(",")[0], dim)
    case = BESIDE_THE_END[name]
    arguments = case.arguments(torch.bfloat16, cuda, dim)
    arguments["q"][..., 0] = 16
    for name in {"k", "extra_k"} & set(arguments):
        arguments[name][..., 0] = -96
    out, lse = case.forward(arguments)
    assert lse.max() < -100
    given = out, lse, *output_gradients(out, lse)
    expected = case.backward(arguments, *given, deterministic=True)
    found = case.backward(arguments, *given)
    for name in found:
        assert found[name].isfinite().all(), name
    # In the first channel of q and k sums cancel, so it holds little but rounding.
    others = [{n: x[..., 1:] for n, x in gradients.items()} for gradients in (found, expected)]
    assert_close(*others, case)


def assert_close(found, expected, case):
    for name, gradient in found.items():
        size = expected[name].float().abs().max().item()
        torch.testing.assert_close(
            gradient, expected[name], rtol=2e-2, atol=4e-3 * size, msg=f"{name} of {case}"
        )


def skip_without_kernel_of(mechanism, dim):
    name = {"neighborhood": "1-D", "block_sparse": "blocks 128x128", "dense": "dense"}[mechanism]
    skip_without_kernel(name, [*PASSES, FUSED], torch.bfloat16, dim)
