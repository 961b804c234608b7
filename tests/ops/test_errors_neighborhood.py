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
        r"window\[0\] \* dilation\[0\] is 9 \* 1; .* 8",
    ),
    "dilated window": ((4, 5), (1, 1), (1, 3), r"window\[1\] \* dilation\[1\] is 5 \* 3; .* 12"),
    "window 0": ((0, 4), (1, 1), (1, 1), r"window\[0\] is 0; at least 1 is needed"),
    "window 0 of axis 1": ((4, 0), (1, 1), (1, 1), r"window\[1\] is 0; at least 1 is needed"),
    "stride over window": ((4, 4), (1, 5), (1, 1), r"stride\[1\] is 5; 1 to window\[1\] = 4"),
    "stride 0": ((4, 4), (0, 1), (1, 1), r"stride\[0\] is 0; 1 to window\[0\] = 4"),
    "dilation 0": ((4, 4), (1, 1), (1, 0), r"dilation\[1\] is 0; at least 1 is needed"),
}
GRID = {"q": (2, 8, 12, 4, 16), "k": (2, 8, 12, 2, 16)}


@cases(BAD_WINDOWS)
def test_windows(case):
    window, stride, dilation, message = case
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), window, stride=stride, dilation=dilation)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(**GRID), window, stride, dilation, (0, 0))


@pytest.mark.parametrize("value", [-1, -(2**40), 2**31, 2**40])
@pytest.mark.parametrize("name", ["window", "stride", "dilation"])
def test_windows_beyond_32_bits(name, value):
    options = {"window": [4], "stride": [1], "dilation": [1]} | {name: [value]}
    with pytest.raises(ValueError, match=rf"{name}\[0\]"):
        sparse_fmha.neighborhood_attention(*qkv(), **options)
    with pytest.raises(RuntimeError, match=rf"sparse_fmha: {name}\[0\] is {value}; 0 to 2\^31 - 1"):
        OPS.neighborhood_fwd(*qkv(), **options, causal=[0])


def test_causal_of_the_raw_op():
    with pytest.raises(RuntimeError, match=r"causal\[1\] is 2; 0 or 1 is needed"):
        OPS.neighborhood_fwd(*qkv(**GRID), (4, 4), (1, 1), (1, 1), (0, 2))


@pytest.mark.parametrize("name", ["window", "stride", "dilation", "causal"])
@pytest.mark.parametrize("entries", [1, 3])
def test_tuple_lengths(name, entries):
    values = {"window": (4, 4), "stride": (1, 1), "dilation": (1, 1), "causal": (False, False)}
    values[name] = values[name][:1] * entries
    with pytest.raises(ValueError, match=rf"^{name} is \(.*\): {entries} entries, .* 2 token axes"):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), **values)
    with pytest.raises(RuntimeError, match=f"{name} has {entries} entries; q has 2 token axes"):
        OPS.neighborhood_fwd(*qkv(**GRID), **values)


@pytest.mark.parametrize("value", [4.0, "4", None, (4, 4.0), True])
@pytest.mark.parametrize("name", ["window", "stride", "dilation"])
def test_entries_are_ints(name, value):
    options = {"window": 4} | {name: value}
    with pytest.raises(TypeError, match=f"^{name} is .*; an int or a tuple of them is needed"):
        sparse_fmha.neighborhood_attention(*qkv(**GRID), **options)


def test_grids_differ():
    tensors = qkv(q=(2, 8, 12, 4, 16), k=(2, 12, 8, 2, 16))
    with pytest.raises(ValueError, match=r"^k has the grid \[12, 8\], q has \[8, 12\]"):
        sparse_fmha.neighborhood_attention(*tensors, 4)
    with pytest.raises(RuntimeError, match=r"k has \[2, 12, 8, 2, 16\]; their token axes must be"):
        OPS.neighborhood_fwd(*tensors, (4, 4), (1, 1), (1, 1), (0, 0))


@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 2, 2, 2, 2, 4, 16)])
def test_rank_of_a_grid(shape):
    tensors = qkv(q=shape, k=shape)
    with pytest.raises(ValueError, match=r"^q has shape .*; 4 to 6 dimensions are needed"):
        sparse_fmha.neighborhood_attention(*tensors, 2)
    with pytest.raises(RuntimeError, match=r"q has shape .*; 4 to 6 dimensions are needed"):
        OPS.neighborhood_fwd(*tensors, [2], [1], [1], [0])


GOOD = (2, 5, 2, 16)
BAD_EXTRAS = {
    "k alone": (tensor(*GOOD), None, ValueError, "extra_k is given without extra_v; both or"),
    "v alone": (None, tensor(*GOOD), ValueError, "extra_v is given without extra_k; both or"),
    "batch": (
        tensor(3, 5, 2, 16),
        tensor(3, 5, 2, 16),
        ValueError,
        r"extra_k has shape \[3, 5, 2, 16\]",
    ),
    "heads": (tensor(*GOOD), tensor(2, 5, 4, 16), ValueError, r"extra_v has shape \[2, 5, 4, 16\]"),
    "head dim": (
        tensor(2, 5, 2, 8),
        tensor(*GOOD),
        ValueError,
        r"extra_k has shape \[2, 5, 2, 8\]",
    ),
    "rank": (tensor(*GOOD), tensor(2, 5, 32), ValueError, r"extra_v has shape \[2, 5, 32\]"),
    "lengths": (
        tensor(*GOOD),
        tensor(2, 6, 2, 16),
        ValueError,
        "extra_k has .*5.*, extra_v has .*6",
    ),
    "stride": (
        tensor(2, 5, 2, 32)[..., ::2],
        tensor(*GOOD),
        ValueError,
        "extra_k has stride 2 in its last dimension; 1 is needed",
    ),
    "dtype": (
        tensor(*GOOD),
        tensor(*GOOD, dtype=torch.float16),
        TypeError,
        "extra_v (has dtype torch.float16, q has torch.float32|and q differ in dtype)",
    ),
}


@cases(BAD_EXTRAS)
def test_extra_tokens(case):
    extra_k, extra_v, error, message = case
    with pytest.raises(error, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, extra_k=extra_k, extra_v=extra_v)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(), [4], [1], [1], [0], None, extra_k, extra_v)
