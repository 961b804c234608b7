"""Bad input: what is raised, and that the message names the argument, its value and the rule."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from bad_arguments import cases, qkv, tensor

import sparse_fmha

OPS = torch.ops.sparse_fmha
FP8 = torch.float8_e4m3fn


def swapped(place, new):
    """Good q, k and v, but for one of them."""
    tensors = qkv()
    tensors[place] = new
    return tensors


# q, k, v; the error of the Python function; the start of what it and the raw op say.
BAD_TENSORS = {
    "q of rank 3": (
        swapped(0, tensor(2, 12, 16)),
        ValueError,
        r"q must have 4 .*dimensions \(batch, .*tokens, heads, head dim\), got shape",
    ),
    "k of rank 5": (
        swapped(1, tensor(2, 3, 4, 2, 16)),
        ValueError,
        r"k must have .*, got .*\[2, 3, 4, 2, 16\]",
    ),
    "v of rank 3": (
        swapped(2, tensor(2, 12, 16)),
        ValueError,
        r"v must have .*, got .*\[2, 12, 16\]",
    ),
    "batch of k": (swapped(1, tensor(3, 12, 2, 16)), ValueError, "k must have q's batch, 2, got 3"),
    "batch of v": (swapped(2, tensor(1, 12, 2, 16)), ValueError, "v must have q's batch, 2, got 1"),
    "head dim of k": (
        swapped(1, tensor(2, 12, 2, 24)),
        ValueError,
        "k must have q's head dim, 16, got 24",
    ),
    "head dim of v": (
        swapped(2, tensor(2, 12, 2, 12)),
        ValueError,
        "head dim of v must be a multiple of 8 from 8 to 256, got 12",
    ),
    "length of v": (
        swapped(2, tensor(2, 11, 2, 16)),
        ValueError,
        r"v must have k's shape but for the head dim, \[2, 12, 2, 16\], got \[2, 11, 2, 16\]",
    ),
    "heads of v": (
        swapped(2, tensor(2, 12, 4, 16)),
        ValueError,
        r"v must have k's shape but for the head dim, \[2, 12, 2, 16\], got \[2, 12, 4, 16\]",
    ),
    "heads not a multiple": (
        qkv(k=(2, 12, 3, 16)),
        ValueError,
        "heads of q must be a multiple of those of k and v, got 4 and 3",
    ),
    "fewer query heads": (
        qkv(k=(2, 12, 8, 16)),
        ValueError,
        "heads of q must be a multiple of those of k and v, got 4 and 8",
    ),
    "no key heads": (
        qkv(k=(2, 12, 0, 16)),
        ValueError,
        "heads of q must be a multiple of those of k and v, got 4 and 0",
    ),
    "head dim of q must be a multiple of 8 from 8 to 256, got 12": (
        qkv(q=(2, 12, 4, 12), k=(2, 12, 2, 12)),
        ValueError,
        "head dim of q must be a multiple of 8 from 8 to 256, got 12",
    ),
    "head dim 264": (
        qkv(q=(2, 12, 4, 264), k=(2, 12, 2, 264)),
        ValueError,
        "head dim of q must be a multiple of 8 from 8 to 256, got 264",
    ),
    "head dim 0": (
        qkv(q=(2, 12, 4, 0), k=(2, 12, 2, 0)),
        ValueError,
        "head dim of q must be a multiple of 8 from 8 to 256, got 0",
    ),
    "q by columns": (
        swapped(0, tensor(2, 12, 16, 4).mT),
        ValueError,
        "q must have stride 1 in its last dimension, got 4",
    ),
    "k with every other element": (
        swapped(1, tensor(2, 12, 2, 32)[..., ::2]),
        ValueError,
        "k must have stride 1 in its last dimension, got 2",
    ),
    "v of one element": (
        swapped(2, tensor(2, 12, 2, 1).expand(2, 12, 2, 16)),
        ValueError,
        "v must have stride 1 in its last dimension, got 0",
    ),
}
# q, k, v; what the Python function says; what the raw op says.
BAD_DTYPES = {
    "int32": (
        qkv(dtype=torch.int32),
        "q must have .*dtype.*, got torch.int32",
        "q must have dtype float16, bfloat16, float32 or float64, got Int",
    ),
    "float8": (
        qkv(dtype=FP8),
        "q must have .*dtype.*, got torch.float8_e4m3fn",
        "q must have dtype float16, bfloat16, float32 or float64, got",
    ),
    "bool": (
        qkv(dtype=torch.bool),
        "q must have .*dtype.*, got torch.bool",
        "q must have dtype float16, bfloat16, float32 or float64, got Bool",
    ),
    "complex": (
        qkv(dtype=torch.complex64),
        "q must have .*dtype.*, got torch.complex64",
        "q must have dtype float16, bfloat16, float32 or float64, got",
    ),
    "k other than q": (
        swapped(1, tensor(2, 12, 2, 16, dtype=torch.bfloat16)),
        "k must have q's dtype, torch.float32, got torch.bfloat16",
        "k must have q's dtype, Float, got BFloat16",
    ),
    "v other than q": (
        swapped(2, tensor(2, 12, 2, 16, dtype=torch.float64)),
        "v must have q's dtype, torch.float32, got torch.float64",
        "v must have q's dtype, Float, got Double",
    ),
}


@cases(BAD_TENSORS)
def test_tensors(case):
    tensors, error, message = case
    with pytest.raises(error, match=f"^{message}"):
        sparse_fmha.attention(*tensors)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.fmha_fwd(*tensors)


@cases(BAD_TENSORS)
def test_tensors_of_a_neighborhood(case):
    tensors, error, message = case
    with pytest.raises(error, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*tensors, 4)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*tensors, [4], [1], [1], [0])


@cases(BAD_DTYPES)
def test_dtypes(case):
    tensors, message, raw_message = case
    with pytest.raises(TypeError, match=f"^{message}"):
        sparse_fmha.attention(*tensors)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {raw_message}"):
        OPS.fmha_fwd(*tensors)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_a_tensor(place):
    with pytest.raises(TypeError, match=f"^{'qkv'[place]} must be a tensor, got list"):
        sparse_fmha.attention(*swapped(place, [1.0]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_device(place):
    with pytest.raises(ValueError, match=f"^{'qkv'[place]} must be on cpu or cuda, got meta"):
        sparse_fmha.attention(*swapped(place, qkv()[place].to("meta")))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale(scale):
    message = f"scale must be a finite number, got {scale}"
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.attention(*qkv(), scale=scale)
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, scale=scale)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.fmha_fwd(*qkv(), False, scale)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(), [4], [1], [1], [0], scale)


@pytest.mark.parametrize("scale", ["1", 1j, [1.0], True])
def test_scale_is_no_number(scale):
    with pytest.raises(TypeError, match=r"^scale must be a finite number or None, got .*"):
        sparse_fmha.attention(*qkv(), scale=scale)


def test_causal_is_no_bool():
    with pytest.raises(TypeError, match=r"^causal must be True or False, got 'yes'"):
        sparse_fmha.attention(*qkv(), causal="yes")
    with pytest.raises(TypeError, match=r"^causal must be a bool or a tuple of them, got 1"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, causal=1)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.attention(*qkv(), True)
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, 1)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (
            0,
            lambda x: torch.nested.as_nested_tensor(list(x)),
            r"q must be a dense \(strided\) tensor, got a nested tensor",
        ),
        (
            1,
            lambda x: torch.nested.as_nested_tensor(x, layout=torch.jagged),
            r"k must be a dense \(strided\) tensor, got a nested tensor",
        ),
        (
            2,
            lambda x: x.to_sparse(),
            r"v must be a dense \(strided\) tensor, got layout torch.sparse_coo",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_strides(place, new, message):
    tensors = qkv()
    tensors[place] = new(tensors[place])
    with pytest.raises(TypeError, match=f"^{message}"):
        sparse_fmha.attention(*tensors)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction])
def test_numbers_of_other_types(kind):
    """A bound as a narrow number of NumPy would overflow, which NumPy warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sparse_fmha.attention(*qkv(), scale=kind(0.5), skip_threshold=kind(0.25))
        assert found.equal(sparse_fmha.attention(*qkv(), scale=0.5, skip_threshold=0.25))
        with pytest.raises(ValueError, match=r"skip_threshold must be .*, got "):
            sparse_fmha.attention(*qkv(), skip_threshold=kind(1.5))


@pytest.mark.parametrize("scale", [10**400, -(10**400), Fraction(10**400)])
def test_a_scale_that_no_float_holds(scale):
    with pytest.raises(ValueError, match=r"scale must be a finite number, got -?10+"):
        sparse_fmha.attention(*qkv(), scale=scale)
