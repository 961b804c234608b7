"""Bad windows, grids and extra tokens: the message names the argument, its value and the rule."""

import pytest
import torch
from bad_arguments import cases, qkv, tensor

import sparse_fmha

OPS = torch.ops.sparse_fmha


# On a grid of 8 x 12 tokens: window, stride, dilation; what is said of them. On the first or on the
# second axis, so that a message with the wrong index is seen.
BAD_WINDOWS = {
    "window over the grid": (
        (9, 4),
        (1, 1),
        (1, 1),
        r"window\[0\] \* dilation\[0\] must be at most the 8 tokens of that axis,",
    ),
    "dilated window": (
        (4, 5),
        (1, 1),
        (1, 3),
        r"window\[1\] \* dilation\[1\] must be at most the 12 tokens of that",
    ),
    "window 0": ((0, 4), (1, 1), (1, 1), r"window\[0\] must be at least 1, got 0"),
    "window 0 of axis 1": ((4, 0), (1, 1), (1, 1), r"window\[1\] must be at least 1, got 0"),
    "stride over window": (
        (4, 4),
        (1, 5),
        (1, 1),
        r"stride\[1\] must be from 1 to window\[1\] = 4.*, got 5",
    ),
    "stride 0": ((4, 4), (0, 1), (1, 1), r"stride\[0\] must be from 1 to window\[0\] = 4.*, got 0"),
    "dilation 0": ((4, 4), (1, 1), (1, 0), r"dilation\[1\] must be at least 1, got 0"),
}
GRID = {"q": (2, 8, 12, 4, 16), "k": (2, 8, 12, 2, 16)}


@cases(BAD_WINDOWS)
def test_windows(case):
    window, stride, dilation, message = case
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), window, stride=stride, dilation=dilation)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(**GRID), window, stride, dilation, (0, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [-1, -(2**40), 2**31, 2**40, 2**70])
@pytest.mark.parametrize("name", ["window", "stride", "dilation"])
def test_windows_beyond_32_bits(name, value, causal):
    options = {"window": [4], "stride": [1], "dilation": [1]} | {name: [value]}
    with pytest.raises(ValueError, match=rf"{name}\[0\]"):
        sparse_fmha.neighborhood_attention(*qkv(), **options, causal=causal)
    if value >= 2**63:  # no argument of an op
        return
    with pytest.raises(
        RuntimeError, match=rf"sparse_fmha: {name}\[0\] must be from 0 to 2\^31 - 1.*, got {value}"
    ):
        OPS.neighborhood_fwd(*qkv(), **options, causal=[0])


def test_causal_of_the_raw_op():
    with pytest.raises(RuntimeError, match=r"causal\[1\] must be 0 or 1, got 2"):
        OPS.neighborhood_fwd(*qkv(**GRID), (4, 4), (1, 1), (1, 1), (0, 2))


@pytest.mark.parametrize("name", ["window", "stride", "dilation", "causal"])
@pytest.mark.parametrize("entries", [1, 3])
def test_tuple_lengths(name, entries):
    values = {"window": (4, 4), "stride": (1, 1), "dilation": (1, 1), "causal": (False, False)}
    values[name] = values[name][:1] * entries
    with pytest.raises(
        ValueError, match=rf"^{name} must have one entry for each of q's 2 token axes, got \("
    ):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), **values)
    with pytest.raises(
        RuntimeError,
        match=f"{name} must have one entry for each of q's 2 token axes, got {entries}",
    ):
        OPS.neighborhood_fwd(*qkv(**GRID), **values)


@pytest.mark.parametrize("value", [4.0, "4", None, (4, 4.0), True])
@pytest.mark.parametrize("name", ["window", "stride", "dilation"])
def test_entries_are_ints(name, value):
    options = {"window": 4} | {name: value}
    with pytest.raises(TypeError, match=f"^{name} must be an int or a tuple of them, got .*"):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), **options)


def test_grids_differ():
    tensors = qkv(q=(2, 8, 12, 4, 16), k=(2, 12, 8, 2, 16))
    with pytest.raises(ValueError, match=r"^k must have q's grid, \[8, 12\], got \[12, 8\]"):
        sparse_fmha.neighborhood_attention(*tensors, 4)
    with pytest.raises(
        RuntimeError, match=r"k must have q's token axes, .*, got shape \[2, 12, 8, 2, 16\]"
    ):
        OPS.neighborhood_fwd(*tensors, (4, 4), (1, 1), (1, 1), (0, 0))


@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 2, 2, 2, 2, 4, 16)])
def test_rank_of_a_grid(shape):
    tensors = qkv(q=shape, k=shape)
    with pytest.raises(ValueError, match=r"^q must have .*4 to 6 dimensions.*, got .*"):
        sparse_fmha.neighborhood_attention(*tensors, 2)
    with pytest.raises(RuntimeError, match=r"q must have .*4 to 6 dimensions.*, got .*"):
        OPS.neighborhood_fwd(*tensors, [2], [1], [1], [0])


GOOD = (2, 5, 2, 16)
BAD_EXTRAS = {
    "k alone": (
        tensor(*GOOD),
        None,
        ValueError,
        "extra_v must be given with extra_k, got only the latter",
    ),
    "v alone": (
        None,
        tensor(*GOOD),
        ValueError,
        "extra_k must be given with extra_v, got only the latter",
    ),
    "batch": (
        tensor(3, 5, 2, 16),
        tensor(3, 5, 2, 16),
        ValueError,
        r"extra_k must have .*, got .*\[3, 5, 2, 16\]",
    ),
    "heads": (
        tensor(*GOOD),
        tensor(2, 5, 4, 16),
        ValueError,
        r"extra_v must have .*, got .*\[2, 5, 4, 16\]",
    ),
    "head dim": (
        tensor(2, 5, 2, 8),
        tensor(*GOOD),
        ValueError,
        r"extra_k must have .*, got .*\[2, 5, 2, 8\]",
    ),
    "rank": (
        tensor(*GOOD),
        tensor(2, 5, 32),
        ValueError,
        r"extra_v must have .*, got .*\[2, 5, 32\]",
    ),
    "lengths": (
        tensor(*GOOD),
        tensor(2, 6, 2, 16),
        ValueError,
        "extra_v must have (the 5 tokens of extra_k, got 6|extra_k's shape)",
    ),
    "stride": (
        tensor(2, 5, 2, 32)[..., ::2],
        tensor(*GOOD),
        ValueError,
        "extra_k must have stride 1 in its last dimension, got 2",
    ),
    "dtype": (
        tensor(*GOOD),
        tensor(*GOOD, dtype=torch.float16),
        TypeError,
        "extra_v must have q's dtype, .*[Ff]loat",
    ),
}


@cases(BAD_EXTRAS)
def test_extra_tokens(case):
    extra_k, extra_v, error, message = case
    with pytest.raises(error, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, extra_k=extra_k, extra_v=extra_v)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(), [4], [1], [1], [0], None, extra_k, extra_v)
