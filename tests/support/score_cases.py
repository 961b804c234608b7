"""Cases of kernels that reduce scores, drawn, and their comparison with the whole map in fp64."""

import random

import torch
from score_oracle import probabilities, reduced

from sparse_fmha._extension import _C
from sparse_fmha.selection import reductions, score_kernels

NAMES = ("columns", "blocks_max", "blocks_sum")
DIMS = (8, 64, 72, 128, 200, 256)
# Of the number of keys over that of queries: where the diagonal meets the corners of tiles.
SHIFTS = (-130, -129, -128, -127, -2, -1, 0, 1, 2, 126, 127, 128, 129)


def only_kernels(monkeypatch, emulated):
    """Calls that would be computed in slices fail; on the emulator, CPU tensors are the GPU's."""
    if emulated:
        monkeypatch.setattr(score_kernels, "largest_head_dim", lambda *_: 256)

    def fail(*_):
        raise AssertionError("computed in slices")

    monkeypatch.setattr(reductions, "_in_slices", fail)


def check(q, k, *, causal=False, scale=0.2, lse=None, rows=None, sizes=(64, 64), **drawn):
    """Compares all reductions that the kernels take."""
    names = NAMES
    if causal and min(rows or q.shape[1], q.shape[1]) <= score_kernels.DIAGONAL_ROWS:
        names += ("diagonals",)
    made = reductions.reductions(
        q, k, names, lse=lse, rows=rows, causal=causal, scale=scale, block_q=sizes[0],
        block_kv=sizes[1],
    )  # fmt: skip
    known = probabilities(q, k, causal, scale, lse)
    for name, found in zip(names, made, strict=True):
        expected = reduced(known, name, rows or q.shape[1], *sizes)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(),
            expected,
            atol=2e-6,
            rtol=1e-3,
            msg=lambda m, n=name: f"{n} {drawn}: {m}",
        )


def built():
    """The dtypes and head dims that there are kernels for; an emulated build may have few."""
    largest = {}
    for row in _C.score_kernel_table():
        of = getattr(torch, row["dtype"])
        largest[of] = max(largest.get(of, 0), row["head_dim"])
    return [(dtype, [dim for dim in DIMS if dim <= most]) for dtype, most in largest.items()]


def draw(seed, make):
    """A case, with a log-sum-exp that is given, or not, or has rows that see nothing."""
    choose = random.Random(seed)
    lengths = [choose.choice([1, 20, 127, 128, 129, 200, 256, 300]) for _ in range(2)]
    heads, heads_kv = choose.choice([(1, 1), (2, 1), (3, 3), (4, 2)])
    dtype, dims = choose.choice(built())
    batch, dim = choose.choice([1, 1, 2]), choose.choice(dims)
    case = {
        "q": make(batch, lengths[0], heads, dim, dtype=dtype, seed=seed),
        "k": make(batch, lengths[1], heads_kv, dim, dtype=dtype, seed=seed + 1),
        "causal": choose.random() < 0.5,
        "scale": choose.choice([0.2, -0.1, dim**-0.5, 0.0]),
        "rows": choose.choice([None, None, 1, 64, 200]),
        "sizes": (choose.choice(score_kernels.BLOCKS), choose.choice(score_kernels.BLOCKS)),
    }
    if choose.random() < 0.4:
        lse = 3 + make(batch, lengths[0], heads, dtype=torch.float32, seed=seed + 2)
        lse[:, choose.randrange(lengths[0])] = -torch.inf
        case["lse"] = lse
    return case
