"""Bad input: what is raised, and that the message names the argument, its value and the rule."""

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
    "q of rank 3": (swapped(0, tensor(2, 12, 16)), ValueError, r"q has shape \[2, 12, 16\]; 4"),
    "k of rank 5": (
        swapped(1, tensor(2, 3, 4, 2, 16)),
        ValueError,
        r"k has shape \[2, 3, 4, 2, 16\]",
    ),
    "v of rank 3": (swapped(2, tensor(2, 12, 16)), ValueError, r"v has shape \[2, 12, 16\]"),
    "batch of k": (swapped(1, tensor(3, 12, 2, 16)), ValueError, "k has batch 3, q has 2"),
    "batch of v": (swapped(2, tensor(1, 12, 2, 16)), ValueError, "v has batch 1, q has 2"),
    "head dim of k": (swapped(1, tensor(2, 12, 2, 24)), ValueError, "k has head dim 24, q has 16"),
    "head dim of v": (swapped(2, tensor(2, 12, 2, 8)), ValueError, "v has head dim 8, q has 16"),
    "length of v": (
        swapped(2, tensor(2, 11, 2, 16)),
        ValueError,
        r"k has shape \[2, 12, 2, 16\], v has \[2, 11, 2, 16\]; they must be the same",
    ),
    "heads of v": (
        swapped(2, tensor(2, 12, 4, 16)),
        ValueError,
        r"k has shape \[2, 12, 2, 16\], v has \[2, 12, 4, 16\]; they must be the same",
    ),
    "heads not a multiple": (
        qkv(k=(2, 12, 3, 16)),
        ValueError,
        "q has 4 heads, k and v have 3; q's must be a multiple",
    ),
    "fewer query heads": (
        qkv(k=(2, 12, 8, 16)),
        ValueError,
        "q has 4 heads, k and v have 8; q's must be a multiple",
    ),
    "no key heads": (
        qkv(k=(2, 12, 0, 16)),
        ValueError,
        "q has 4 heads, k and v have 0; q's must be a multiple",
    ),
    "head dim 12": (
        qkv(q=(2, 12, 4, 12), k=(2, 12, 2, 12)),
        ValueError,
        "q has head dim 12; multiples of 8 from 8 to 256 are allowed",
    ),
    "head dim 264": (
        qkv(q=(2, 12, 4, 264), k=(2, 12, 2, 264)),
        ValueError,
        "q has head dim 264; multiples of 8 from 8 to 256 are allowed",
    ),
    "head dim 0": (
        qkv(q=(2, 12, 4, 0), k=(2, 12, 2, 0)),
        ValueError,
        "q has head dim 0; multiples of 8 from 8 to 256 are allowed",
    ),
    "q by columns": (
        swapped(0, tensor(2, 12, 16, 4).mT),
        ValueError,
        "q has stride 4 in its last dimension; 1 is needed",
    ),
    "k with every other element": (
        swapped(1, tensor(2, 12, 2, 32)[..., ::2]),
        ValueError,
        "k has stride 2 in its last dimension; 1 is needed",
    ),
    "v of one element": (
        swapped(2, tensor(2, 12, 2, 1).expand(2, 12, 2, 16)),
        ValueError,
        "v has stride 0 in its last dimension; 1 is needed",
    ),
}
# q, k, v; what the Python function says; what the raw op says.
BAD_DTYPES = {
    "int32": (qkv(dtype=torch.int32), "q has dtype torch.int32; allowed", "q .*float64: Int"),
    "float8": (qkv(dtype=FP8), "q has dtype torch.float8_e4m3fn; allowed", "q .*: Float8_e4m3fn"),
    "bool": (qkv(dtype=torch.bool), "q has dtype torch.bool; allowed", "q .*float64: Bool"),
    "complex": (
        qkv(dtype=torch.complex64),
        "q has dtype torch.complex64; allowed",
        "q .*float64: ComplexFloat",
    ),
    "k other than q": (
        swapped(1, tensor(2, 12, 2, 16, dtype=torch.bfloat16)),
        "k has dtype torch.bfloat16, q has torch.float32; all must have one",
        "k and q differ in dtype; all must have one: BFloat16, Float",
    ),
    "v other than q": (
        swapped(2, tensor(2, 12, 2, 16, dtype=torch.float64)),
        "v has dtype torch.float64, q has torch.float32; all must have one",
        "v and q differ in dtype; all must have one: Double, Float",
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
    with pytest.raises(TypeError, match=f"^{'qkv'[place]} is a list, not a tensor"):
        sparse_fmha.attention(*swapped(place, [1.0]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_device(place):
    with pytest.raises(ValueError, match=f"^{'qkv'[place]} is on meta; .*cpu, cuda"):
        sparse_fmha.attention(*swapped(place, qkv()[place].to("meta")))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale(scale):
    message = f"scale is {scale}; a finite number is needed"
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.attention(*qkv(), scale=scale)
    with pytest.raises(ValueError, match=f"^{message}"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, scale=scale)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.fmha_fwd(*qkv(), False, scale)
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        OPS.neighborhood_fwd(*qkv(), [4], [1], [1], [0], scale)


@pytest.mark.parametrize("scale", ["1", 1j, [1.0]])
def test_scale_is_no_number(scale):
    with pytest.raises(TypeError, match=r"^scale is .*; a finite number or None is needed"):
        sparse_fmha.attention(*qkv(), scale=scale)


def test_causal_is_no_bool():
    with pytest.raises(TypeError, match=r"^causal is 'yes'; True or False is needed"):
        sparse_fmha.attention(*qkv(), causal="yes")
    with pytest.raises(TypeError, match=r"^causal is 1; a bool or a tuple of them is needed"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, causal=1)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.attention(*qkv(), True)
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, 1)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (0, lambda x: torch.nested.as_nested_tensor(list(x)), "q is nested; a dense"),
        (
            1,
            lambda x: torch.nested.as_nested_tensor(x, layout=torch.jagged),
            "k is nested; a dense",
        ),
        (2, lambda x: x.to_sparse(), "v is of layout torch.sparse_coo; a dense"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_strides(place, new, message):
    tensors = qkv()
    tensors[place] = new(tensors[place])
    with pytest.raises(TypeError, match=f"^{message}"):
        sparse_fmha.attention(*tensors)


@pytest.mark.parametrize("scale", [10**400, -(10**400)])
def test_a_scale_that_no_float_holds(scale):
    with pytest.raises(ValueError, match=r"scale is -?10+; a finite number is needed"):
        sparse_fmha.attention(*qkv(), scale=scale)
