"""Dilations that take the rows of dilation classes, on the emulator, against fp64."""

import emulated
import pytest
import torch
from gradient_cases import Case, window
from gradient_oracle import attend
from neighborhoods import axes_reversed, crop, every_other_head, heads_first
from output_rule import assert_as_good_as_rounded
from poison import poisoned

import sparse_fmha

BF16 = torch.bfloat16
# Classes of two lengths on one axis and on several, and of one.
CASES = {
    "1-D": Case("neighborhood", (400,), window((30,), 3, 11), heads=4, heads_kv=2, batch=2),
    "1-D, even": Case("neighborhood", (390,), window((30,), 1, 13)),
    "1-D, causal": Case("neighborhood", (301,), window((40,), 2, 3, 1), extra=70),
    "1-D, a window of 2": Case("neighborhood", (299,), window((2,), 1, 149)),
    "2-D": Case("neighborhood", (40, 61), window((3, 4), (1, 2), (11, 13)), extra=5, batch=2),
    "2-D, one axis": Case("neighborhood", (9, 100), window((5, 6), 1, (1, 16), (0, 1))),
    "3-D": Case("neighborhood", (7, 23, 20), window((3, 2, 2), 1, (2, 11, 9)), batch=3),
}


@pytest.fixture(autouse=True)
def hopper():
    with sparse_fmha.arch_override("sm90"):
        yield


def check(case, arguments):
    """out and lse in one launch."""
    __tracebackhide__ = True
    before = emulated.launches()
    with poisoned():
        out, lse = case.forward(arguments)
    assert emulated.launches() == before + 1
    exact, exact_lse = attend(case.mechanism, arguments)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    assert_as_good_as_rounded(case, arguments, out, exact)


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    check(CASES[name], CASES[name].arguments(BF16, dim=64))


@pytest.mark.parametrize("dims", [(40, 40), (24, 56)], ids=str)
def test_head_dims_that_the_row_fills_up(dims):
    dim, value_dim = dims
    check(CASES["2-D"], CASES["2-D"].arguments(BF16, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("name", ["1-D", "2-D", "3-D"])
def test_memory_around_the_tensors_is_not_read(name):
    """NaN before, behind and between the rows; each tensor has an order of its own."""
    case = CASES[name]
    arguments = case.arguments(BF16, dim=40)
    arguments["q"] = crop(arguments["q"])
    arguments["k"] = every_other_head(axes_reversed(arguments["k"]))
    arguments["v"] = crop(heads_first(arguments["v"]))
    check(case, arguments)


@pytest.mark.parametrize("name", ["1-D", "2-D"])
def test_a_key_that_nobody_sees_may_be_nan(name):
    """The tokens of all classes but one are NaN: it reads only its own."""
    case = CASES[name]
    arguments = case.arguments(BF16, dim=64)
    exact, _ = attend(case.mechanism, arguments)
    residues = [d - 1 for d in arguments["dilation"]]  # a shorter class where there are two
    own = [slice(r, None, d) for r, d in zip(residues, arguments["dilation"], strict=True)]
    place = (slice(None), *own)
    for x in (arguments["k"], arguments["v"]):
        kept = x[place].clone()
        x.fill_(torch.nan)
        x[place] = kept
    with poisoned():
        out, _ = case.forward(arguments)
    torch.testing.assert_close(out[place].double(), exact[place], rtol=0.02, atol=0.02)


def test_broadcast_tensors():
    """Strides of zero over batch entries and heads."""
    case = CASES["1-D"]
    arguments = case.arguments(BF16, dim=64)
    for name in "qkv":
        x = arguments[name]
        arguments[name] = x[:1, :, :1].expand(x.shape)
    check(case, arguments)


def test_calls_with_a_bias_take_a_launch_for_each_interleaved_grid():
    case = CASES["1-D"]
    arguments = case.arguments(BF16, dim=64) | {"key_bias": torch.zeros(2, 1, 400)}
    before = emulated.launches()
    with poisoned():
        out, _ = case.forward(arguments)
    assert emulated.launches() == before + 11
    exact, _ = attend(case.mechanism, arguments)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
