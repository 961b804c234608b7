"""The ops that reduce scores, without a GPU: their arguments, shapes and errors.

Kernels are tested in tests/gpu/test_score_sums_gpu.py.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.sparse_fmha
BLOCKS = ("score_block_sums", "score_block_maxima")


def call(name, length=9, **changes):
    """One call of an op, with 2 query heads and 1 key head."""
    bf16 = torch.bfloat16
    arguments = {
        "q": torch.zeros(2, length, 2, 16, dtype=bf16),
        "k": torch.zeros(2, 300, 1, 16, dtype=bf16),
        "lse": torch.zeros(2, 2, length),
        "causal": True,
        "parts": 3,
        "block_q": 32,
        "block_kv": 128,
        "scale": 0.5,
    } | changes
    op = getattr(OPS, name)
    names = [argument.name for argument in op.default._schema.arguments]
    return op(*(arguments[name] for name in names))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("score_rows", (2, 2, 3, 100)),
        ("score_columns", (2, 2, 300)),
        ("score_diagonals", (2, 2, 2, 300)),
        ("score_block_sums", (2, 2, 4, 3)),
        ("score_block_maxima", (2, 2, 4, 3)),
    ],
)
def test_shapes_for_tracing(name, shape):
    with FakeTensorMode():
        made = call(name, length=100)
    assert made.shape == shape
    assert made.dtype == torch.float32


@pytest.mark.parametrize("name", ["score_rows", "score_columns", "score_diagonals", *BLOCKS])
def test_the_cpu_has_no_kernels(name):
    with pytest.raises(
        RuntimeError, match=r"NotImplementedError: .* no kernel for arch=cpu.*score_sums takes"
    ):
        call(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("score_rows", {"parts": 0}, "parts must be from 1 to 2\\^16, got 0"),
        ("score_rows", {"scale": float("nan")}, "scale must be a finite number"),
        ("score_rows", {"k": torch.zeros(2, 9, 1, 16)}, "k must have q's dtype"),
        ("score_columns", {"k": torch.zeros(2, 9, 3, 16).bfloat16()}, "heads of q must be a"),
        ("score_columns", {"lse": torch.zeros(2, 9, 2)}, "lse must have shape"),
        ("score_columns", {"lse": torch.zeros(2, 2, 9).double()}, "lse must have dtype Float"),
        ("score_columns", {"lse": torch.zeros(2, 9, 2).mT}, "lse must be contiguous"),
        ("score_diagonals", {"q": torch.zeros(2, 129, 2, 16).bfloat16()}, "lse must have shape"),
        ("score_diagonals", {"length": 129}, "q must have at most 128 tokens, got 129"),
        *((name, {"block_q": 48}, "block_q must be 16, 32, 64 or 128, got 48") for name in BLOCKS),
        *((name, {"block_kv": 0}, "block_kv must be 16, 32, 64 or 128, got 0") for name in BLOCKS),
        *((name, {"block_q": 256}, "block_q must be 16, 32, 64 or 128") for name in BLOCKS),
    ],
)
def test_errors(name, changes, message):
    with pytest.raises(RuntimeError, match=f"sparse_fmha: {message}"):
        call(name, **changes)
