"""Bad input: what is raised, and that the message names the argument, its value and the rule."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_fmha

OPS = torch.ops.sparse_fmha
FP8 = torch.float8_e4m3fn


def tensor(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype)


def qkv(q=(2, 12, 4, 16), k=(2, 12, 2, 16), v=None, dtype=torch.float32):
    return [tensor(*shape, dtype=dtype) for shape in (q, k, v or k)]


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


def cases(table):
    return pytest.mark.parametrize("case", table.values(), ids=table)


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


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.attention(*qkv(), True)
    with pytest.raises(TypeError, match="positional"):
        sparse_fmha.neighborhood_attention(*qkv(), 4, 1)


def run_without(tmp_path, patterns, code):
    """Runs Python code on a copy of the package that lacks the files of these patterns."""
    copy = tmp_path / "sparse_fmha"
    ignored = shutil.ignore_patterns(*patterns, "__py*")
    shutil.copytree(Path(sparse_fmha.__file__).parent, copy, ignore=ignored, dirs_exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("function", ["kernels", "build_info"])
def test_extension_of_another_python(tmp_path, function):
    """Without `_C` the ops work; the two functions that need it say what is missing."""
    code = (
        "import torch, sparse_fmha as s; x = torch.ones(1, 2, 1, 8); "
        f"print(s.attention(x, x, x).equal(x)); s.{function}()"
    )
    run = run_without(tmp_path, ["_C.*"], code)
    assert run.stdout == "True\n"
    last = run.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: sparse_fmha's extension _C is not .*pip install", last)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "libsparse_fmha.so is missing; .*pip install"),
        (b"text", "libsparse_fmha.so does not load"),
    ],
    ids=["missing", "damaged"],
)
def test_library(tmp_path, library, message):
    """A package without its op library, or with a file that is none."""
    if library is not None:
        (tmp_path / "sparse_fmha").mkdir()
        (tmp_path / "sparse_fmha/libsparse_fmha.so").write_bytes(library)
    run = run_without(tmp_path, ["*.so"], "import sparse_fmha")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparse_fmha's op library")
    assert str(tmp_path) in last
    assert re.search(message, last)


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
