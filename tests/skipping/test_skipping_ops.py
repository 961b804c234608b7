"""Softmax skipping as a part of PyTorch, and its errors."""

import pytest
import torch
from op_calls import CALLS, SKIPPING, run
from skip_cases import inputs

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

# With a threshold for each batch entry, not for each sequence.
BATCHED = [name for name in CALLS if name.endswith("_fwd") and name != "varlen_fwd"]


def calls():
    q, k, v = (x.float() for x in inputs(length=128, dim=64))
    mask = BlockMask.from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), 128, 128, 128, 128)
    stripes = StripeMask.from_columns(torch.ones(1, 1, 1, 128, dtype=torch.bool), 128, 128)
    return {
        "attention": (sparse_fmha.attention, (q, k, v)),
        "neighborhood": (sparse_fmha.neighborhood_attention, (q, k, v, 40)),
        "block_sparse": (sparse_fmha.block_sparse_attention, (q, k, v, mask)),
        "stripe": (sparse_fmha.stripe_attention, (q, k, v, stripes)),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize(
    ("threshold", "error", "message"),
    [
        (1.0, ValueError, r"skip_threshold must be at least 0 and less than 1, got 1.0"),
        (-0.5, ValueError, r"skip_threshold must be at least 0 and less than 1, got -0.5"),
        (float("nan"), ValueError, r"skip_threshold must be at least 0 and less than 1, got nan"),
        ("0", TypeError, r"skip_threshold must be a number or a tensor, got '0'"),
        (True, TypeError, r"skip_threshold must be a number or a tensor, got True"),
        (torch.zeros(3), ValueError, r"skip_threshold must have .*\[2\].*, got .*\[3\]"),
        (
            torch.zeros(2).double(),
            TypeError,
            r"skip_threshold must have .*dtype.*, got torch.float64",
        ),
        (
            torch.zeros(2, device="meta"),
            ValueError,
            "skip_threshold must be on q's device, cpu, got meta",
        ),
    ],
)
def test_errors(name, threshold, error, message):
    function, args = calls()[name]
    with pytest.raises(error, match=message):
        function(*args, skip_threshold=threshold)


@pytest.mark.parametrize("name", calls())
def test_ops(name):
    """opcheck, torch.compile and autocast of the op behind each function."""
    function, args = calls()[name]
    threshold = torch.full((2,), 0.01)

    def run(q, k, v, threshold):
        return function(
            q, k, v, *args[3:], skip_threshold=threshold, return_lse=True, return_stats=True
        )

    eager = run(*args[:3], threshold)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*args[:3], threshold)
    for a, b in zip([*eager[:2], *eager[2]], [*compiled[:2], *compiled[2]], strict=True):
        assert a.equal(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _, stats = run(*args[:3], threshold)
    assert out.dtype == torch.bfloat16
    assert stats.visited.equal(eager[2].visited)
    q = args[0].clone().requires_grad_()
    run(q, *args[1:3], threshold)[0].sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad.ne(0).any()


def test_opcheck():
    q, k, v = (x.float() for x in inputs(length=70, dim=16))
    ops = torch.ops.sparse_fmha
    counts, indices = torch.ones(1, 1, 1).int(), torch.zeros(1, 1, 1, 1).int()
    for op, rest in (
        (ops.fmha_fwd, (True, None)),
        (ops.neighborhood_fwd, ([9], [1], [1], [0])),
        (ops.block_sparse_fwd, (counts, indices, None, None, None, 128, 128)),
        (ops.stripe_fwd, (indices, counts, None, None, 128)),
    ):
        for threshold in (None, torch.full((2,), 0.1)):
            torch.library.opcheck(op, (q, k, v, *rest), {"skip_threshold": threshold})


@pytest.mark.parametrize("name", BATCHED)
def test_results_of_ops(name):
    """A pair; with a threshold the tiles, too, of which 0 leaves out nothing."""
    plain, skipping = run(name), run(name + SKIPPING)
    assert len(plain) == 2
    out, lse, tiles = run(name + SKIPPING, skip_threshold=torch.zeros(2))
    torch.testing.assert_close((out, lse), plain)
    assert tiles.dtype == torch.int64
    assert tiles.shape == skipping[2].shape == (2, 2, 2)
    assert tiles[..., 0].min() > 0
    assert not tiles[..., 1].any()
    assert skipping[2][..., 0].equal(tiles[..., 0])


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (torch.zeros(3), r"skip_threshold must have .*\[2\].*, got .*\[3\]"),
        (torch.zeros(2).double(), "skip_threshold must have dtype float32, got Double"),
        (torch.zeros(4)[::2], "skip_threshold must be contiguous, got stride 2"),
    ],
)
@pytest.mark.parametrize("name", [name + SKIPPING for name in BATCHED])
def test_raw_op_errors(name, threshold, message):
    with pytest.raises(RuntimeError, match=message):
        run(name, skip_threshold=threshold)
