"""Small problems on every GPU kernel, for compute-sanitizer: python tests/gpu/sanitize.py

SPARSE_FMHA_TEST_ARCH=sm80 (or sm86) takes that architecture's kernels, as in the tests.

Each is also checked against the fp64 reference, so a run that computes nothing does not pass.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a tensor's end is an allocation's end
sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import decode_cases
import decode_oracle
import gradient_oracle
import other_archs
import packed_cases
import torch
from block_lists import compact
from gradient_cases import LARGE

import sparse_fmha
from sparse_fmha import reference
from sparse_fmha.cli import one_line_errors

HEAD_DIMS = (64, 96, 128, 256)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}  # about two units of the last place
# batch, length of queries, length of keys, query heads, key heads, strided: one tile, ragged tiles,
# several tiles, grouped heads, unequal lengths, rows that see nothing.
SHAPES = [
    (1, 128, 128, 1, 1, False),
    (2, 77, 201, 2, 1, True),
    (1, 333, 333, 4, 2, False),
    (1, 65, 500, 2, 2, True),
    (1, 300, 40, 1, 1, False),
]

# grid, (window, stride, dilation, causal) by axis, extra tokens, batch, query heads, key heads,
# strided: ragged tiles on each axis, residues of two lengths, full tiles, blocks, batches of grids,
# one token.
NEIGHBORHOODS = [
    ((333,), [(32, 1, 1, True)], 0, 1, 1, 1, False),
    ((333,), [(37, 5, 9, False)], 7, 2, 2, 1, True),
    ((17, 23), [(5, 2, 2, False), (6, 1, 1, True)], 0, 1, 1, 1, False),
    ((20, 19), [(2, 2, 9, True), (2, 1, 9, False)], 130, 2, 2, 1, True),
    ((16, 24), [(16, 1, 1, False), (24, 1, 1, False)], 3, 1, 1, 1, False),
    ((5, 7, 9), [(3, 1, 1, False), (4, 2, 1, False), (5, 5, 1, False)], 0, 2, 1, 1, True),
    ((9, 6, 5), [(2, 1, 2, False), (3, 3, 2, False), (2, 1, 2, True)], 9, 3, 2, 1, True),
    ((18, 4, 6), [(2, 1, 9, False), (2, 1, 2, False), (6, 3, 1, False)], 0, 2, 2, 2, False),
    ((1,), [(1, 1, 1, False)], 0, 1, 1, 1, False),
    ((1, 77), [(1, 1, 1, True), (9, 2, 1, False)], 5, 2, 2, 1, True),
]

# length of queries, length of keys, blocks, shares of full and of partial blocks, causal, batch,
# query heads, key heads, strided: one tile, granules, an odd number of 64-row blocks, bits alone,
# ragged ends, rows that list nothing, nothing at all.
BLOCK_LISTS = [
    (128, 128, (128, 128), 1.0, 0.0, False, 1, 1, 1, False),
    (333, 420, (64, 16), 0.3, 0.3, True, 2, 4, 2, True),
    (321, 200, (64, 128), 0.4, 0.0, False, 1, 2, 1, False),
    (200, 333, (128, 32), 0.0, 0.5, True, 1, 2, 2, False),
    (77, 201, (64, 64), 0.3, 0.3, False, 2, 2, 1, True),
    (300, 450, (128, 16), 0.02, 0.02, False, 2, 4, 4, True),
    (450, 300, (64, 32), 0.05, 0.0, True, 1, 3, 1, False),
    (130, 300, (128, 64), 0.0, 0.0, False, 1, 1, 1, False),
]


# length of queries, length of keys, rows of a group, keys of a run, causal, batch, query heads, key
# heads, strided: groups of one and of both halves of a tile, runs that end behind the last key.
STRIPES = [
    (128, 128, 128, 64, False, 1, 1, 1, False),
    (333, 420, 64, 128, True, 2, 4, 2, True),
    (450, 300, 192, 64, True, 1, 2, 1, False),
    (65, 500, 1024, 128, False, 2, 2, 2, True),
]


def tree(len_q: int) -> torch.Tensor:
    """Of drafts of the four requests that are drawn."""
    return decode_cases.bits_of_trees(torch.Generator().manual_seed(len_q), 4, len_q)


# form of the keys, rows of a page, new tokens, heads, tokens of a split, threshold, the rest: boxes
# and rows, masked tiles, several groups of rows, groups without keys, parts that are merged, votes,
# tables of KV heads, layouts, windows, trees, sinks and caps.
DECODES = [
    ("all", None, 1, (4, 2), None, None, {}),
    ("all", None, 2, (3, 3), 64, 0.1, {"layout": "heads first"}),
    ("all", 64, 12, (16, 2), None, None, {"layout": "halves"}),
    ("all", 16, 2, (8, 2), 512, 0.3, {"by_head": True}),
    ("all", 16, 1, (8, 2), None, None, {"by_head": True, "window": 70}),
    ("all", 7, 1, (4, 2), 128, 0.3, {"layout": "heads first", "softcap": 2.0}),
    ("all", 16, 5, (4, 2), None, None, {"tree_mask": tree(5), "sink": torch.linspace(-1, 1, 4)}),
    ("all", None, 40, (4, 2), 128, None, {"tree_mask": tree(40)}),
    ("blocks", 16, 5, (4, 2), None, None, {"by_head": True}),
    ("blocks", None, 1, (4, 1), 512, 0.3, {}),
    ("blocks", 64, 1, (4, 2), None, None, {"layout": "halves", "softcap": 2.0, "window": 300}),
    ("tokens", 1, 2, (4, 2), None, None, {}),
    ("tokens by query", 64, 3, (4, 2), 512, 0.3, {}),
    ("spans", None, 2, (4, 2), None, None, {"causal": False, "sink": torch.linspace(-1, 1, 4)}),
    ("spans", 16, 2, (4, 2), 256, 0.3, {}),
]


# lengths of queries, of keys and of keys in use, causal, tokens of no sequence before and after the
# sequences, keys of a page: one sequence, ragged ends, sequences without queries or keys, pages.
PACKED = [
    (((192, 192, 192),), False, 0, 0, None),
    (((1, 300, 250), (0, 40, 40), (333, 130, 130), (70, 90, 0)), True, 3, 70, None),
    (((5, 5, 5),) * 40, False, 0, 1, None),
    (((1, 300, 250), (0, 40, 40), (333, 430, 430)), True, 0, 70, 16),
    (((200, 300, 300), (20, 20, 20)), False, 5, 0, 7),
]


def tensor(batch: int, grid: tuple[int, ...], heads: int, head_dim: int, dtype, strided: bool):
    """[B, *L, H, D]; strided is a transposed slice of a larger tensor."""
    if not strided:
        return torch.randn(batch, *grid, heads, head_dim, dtype=dtype, device="cuda")
    *rest, last = grid
    storage = torch.randn(batch, heads, *rest, last + 3, head_dim + 8, dtype=dtype, device="cuda")
    return storage[..., :last, :head_dim].movedim(1, -2)


def dense_error(shape: tuple, causal: bool, head_dim: int, dtype) -> float:
    batch, len_q, len_kv, heads_q, heads_kv, strided = shape
    q = tensor(batch, (len_q,), heads_q, head_dim, dtype, strided)
    k, v = (tensor(batch, (len_kv,), heads_kv, head_dim, dtype, strided) for _ in range(2))
    results = sparse_fmha.attention(q, k, v, causal=causal, return_lse=True)
    return relative_error(*results, q, k, v, dense_mask(len_q, len_kv, causal))


def neighborhood_error(
    grid: tuple[int, ...],
    axes: list,
    extra: int,
    batch,
    heads_q,
    heads_kv,
    strided,
    head_dim,
    dtype,
) -> float:
    q = tensor(batch, grid, heads_q, head_dim, dtype, strided)
    k, v = (tensor(batch, grid, heads_kv, head_dim, dtype, strided) for _ in range(2))
    more = [tensor(batch, (extra,), heads_kv, head_dim, dtype, strided) for _ in range(2)]
    per_axis = zip(*axes, strict=True)
    options = dict(zip(("window", "stride", "dilation", "causal"), per_axis, strict=True))
    results = sparse_fmha.neighborhood_attention(
        q, k, v, extra_k=more[0], extra_v=more[1], return_lse=True, **options
    )
    k, v = (torch.cat([x.flatten(1, -3), y], 1) for x, y in zip((k, v), more, strict=True))
    visible = reference.neighborhood_mask(grid, extra=extra, **options)
    return relative_error(*results, q, k, v, visible)


def block_sparse_error(
    len_q, len_kv, blocks, full, partial, causal, batch, heads_q, heads_kv, strided, head_dim, dtype
) -> float:
    q = tensor(batch, (len_q,), heads_q, head_dim, dtype, strided)
    k, v = (tensor(batch, (len_kv,), heads_kv, head_dim, dtype, strided) for _ in range(2))
    block_q, block_kv = blocks
    grid = -(-len_q // block_q), -(-len_kv // block_kv)
    drawn = torch.rand(batch, heads_q, *grid, device="cpu")
    lists = [*compact(drawn < full), None, None]
    pairs = bits = None
    if partial:
        lists[2:] = compact((drawn >= full) & (drawn < full + partial))
        pairs = torch.rand(*lists[3].shape, *blocks, device="cpu") < 0.5
        places = torch.arange(8, dtype=torch.uint8, device="cpu")
        bits = (pairs.unflatten(-1, (-1, 8)).to(torch.uint8) << places).sum(-1, dtype=torch.uint8)
    on_device = [None if x is None else x.cuda() for x in (*lists, bits)]
    results = torch.ops.sparse_fmha.block_sparse_fwd(q, k, v, *on_device, *blocks, causal)
    visible = reference.block_sparse_mask(
        *lists[:2], len_q, len_kv, *blocks, *lists[2:], pairs, causal
    )
    return relative_error(*results, q, k, v, visible)


def stripe_error(
    len_q, len_kv, block_q, range_size, causal, batch, heads_q, heads_kv, strided, head_dim, dtype
) -> float:
    q = tensor(batch, (len_q,), heads_q, head_dim, dtype, strided)
    k, v = (tensor(batch, (len_kv,), heads_kv, head_dim, dtype, strided) for _ in range(2))
    lists = batch, heads_q, -(-len_q // block_q)
    # Runs in the last part of the keys, one of them cut by the end; columns before them.
    starts = len_kv - torch.tensor([range_size + 40, 40], device="cpu")
    starts = starts.clamp(min=0).int().expand(*lists, 2).contiguous()
    runs = (torch.rand(lists, device="cpu") * 3).int() * int(len_kv > range_size + 40)
    before = torch.arange(len_kv, device="cpu") < len_kv - range_size - 40
    drawn = torch.rand(*lists, len_kv, device="cpu") < 0.4
    counts, columns = compact(drawn & before)
    given = (x.cuda() for x in (columns, counts, starts, runs))
    results = torch.ops.sparse_fmha.stripe_fwd(q, k, v, *given, block_q, range_size, causal)
    visible = reference.stripe_mask(
        columns, counts, len_q, len_kv, block_q, starts, runs, range_size, causal
    )
    return relative_error(*results, q, k, v, visible)


def skipping_error(shape: tuple, causal: bool, head_dim: int, dtype) -> float:
    """A threshold this small skips what fp16 does not show."""
    batch, len_q, len_kv, heads_q, heads_kv, strided = shape
    q = 6 * tensor(batch, (len_q,), heads_q, head_dim, dtype, strided)
    k, v = (tensor(batch, (len_kv,), heads_kv, head_dim, dtype, strided) for _ in range(2))
    results = sparse_fmha.attention(q, k, v, causal=causal, skip_threshold=1e-6, return_lse=True)
    return relative_error(*results, q, k, v, dense_mask(len_q, len_kv, causal))


def decode_error(form, page, len_q, heads, split_tokens, threshold, more, head_dim, dtype) -> float:
    """Drawn requests, whose caches hold NaN where no query looks."""
    options = {"len_q": len_q, "heads": heads, "dim": head_dim, "dtype": dtype, "rows": 700}
    options |= {"scale": 5 / head_dim**0.5} | more
    call = decode_cases.draw(head_dim, form, page, **options)
    call["split_tokens"] = split_tokens
    if threshold is not None:
        call["skip_threshold"] = threshold
    on_device = {name: on_gpu(value) for name, value in call.items()}
    counted = {} if threshold is None else {"return_stats": True}
    out, lse, *stats = sparse_fmha.decode_attention(**on_device, return_lse=True, **counted)
    exact = decode_oracle.expected(call)
    if stats and not stats[0].skipped.cpu().equal(exact.skipped):
        return float("inf")
    return error_of_rows(out, lse, exact.out, exact.lse)


def packed_error(lengths, causal, before, after, page, head_dim, dtype) -> float:
    """Sequences around whose tokens there is NaN."""
    case = packed_cases.Packed(
        lengths, before, after, dim=head_dim, causal=causal, counts_used=True
    )
    given, visible = case.arguments(dtype)
    paged = packed_cases.in_pages(given, page) if page else given
    on_device = {name: on_gpu(value) for name, value in paged.items()}
    out, lse = sparse_fmha.varlen_attention(**on_device, return_lse=True)
    inputs = packed_cases.clean(*(given[x] for x in "qkv"))
    return relative_error(out[None], lse[None], *inputs, visible)


def on_gpu(value):
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


def backward_error(name: str, head_dim: int, dtype, device: str = "cuda") -> float:
    """Of the worst gradient of a case; rounding to 16 bits comes twice, before products of sums."""
    case = LARGE[name]
    arguments = case.arguments(dtype, device, head_dim)
    out, lse = case.forward(arguments)
    dout = torch.randn_like(out)
    founds = [
        case.backward(arguments, out, lse, dout, deterministic=deterministic)
        for deterministic in (False, True)
    ]
    there = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    expected = gradient_oracle.gradients(case.mechanism, there, dout.cpu(), None)
    errors = [distance(found[n], exact) for found in founds for n, exact in expected.items()]
    return max(errors) / 3


def dense_mask(len_q: int, len_kv: int, causal: bool) -> torch.Tensor:
    """Bool [len_q, len_kv] on the CPU."""
    i, j = (torch.arange(n, device="cpu") for n in (len_q, len_kv))
    limit = i + len_kv - len_q if causal else torch.full_like(i, len_kv)
    return j <= limit[:, None]


def relative_error(out, lse, q, k, v, visible) -> float:
    """Against fp64; of lse the largest absolute error."""
    return error_of_rows(out, lse, *reference.attention(q.cpu(), k.cpu(), v.cpu(), visible))


def error_of_rows(out, lse, exact, exact_lse) -> float:
    lse, seen = lse.cpu().double(), exact_lse.isfinite()
    if not torch.equal(lse.isfinite(), seen):
        return float("inf")
    lse_error = (lse - exact_lse)[seen].abs().max().item() if seen.any() else 0.0
    return max(distance(out, exact), lse_error)


def distance(found, exact) -> float:
    """Relative to what is exact, unless that is zero."""
    difference, size = (found.cpu().double() - exact).norm(), exact.norm()
    return (difference / size if size else difference).item()


DENSE = list(itertools.product(SHAPES, (False, True)))
PROBLEMS = {
    "dense": (dense_error, DENSE),
    "neighborhood": (neighborhood_error, NEIGHBORHOODS),
    "block_sparse": (block_sparse_error, BLOCK_LISTS),
    "stripe": (stripe_error, STRIPES),
    "skipping": (skipping_error, DENSE),
    "decode": (decode_error, DECODES),
    "packed": (packed_error, PACKED),
    "backward": (backward_error, [(name,) for name in LARGE]),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/gpu/sanitize.py", description=__doc__)
    parser.add_argument("--only", choices=PROBLEMS, action="append", help="default: all")
    parser.add_argument(
        "--head-dim", type=int, choices=HEAD_DIMS, action="append", help="default: all"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    with other_archs.chosen():
        return solve(args.only or list(PROBLEMS), args.head_dim or HEAD_DIMS)


def solve(names: Sequence[str], head_dims: Sequence[int]) -> int:
    """Returns 1 if any result is wrong, or none is there."""
    torch.manual_seed(0)
    failed = count = lacked = 0
    problems = [(PROBLEMS[name][0], case) for name in names for case in PROBLEMS[name][1]]
    for head_dim, dtype, (error_of, case) in itertools.product(head_dims, TOLERANCE, problems):
        try:
            error = error_of(*case, head_dim, dtype)
        except RuntimeError as miss:
            if other_archs.reason(miss) is None:
                raise
            lacked += 1
            continue
        count += 1
        if not error <= TOLERANCE[dtype]:
            failed += 1
            print(f"error {error:.1e}: {dtype}, D={head_dim}, {error_of.__name__}{case}")
    print(f"{count} problems, {failed} wrong, {lacked} that the architecture has no kernels for")
    return int(failed > 0 or count == 0)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
