"""What listed queries cost: `row_attention` beside attention of as many queries in one piece.

    python -m benchmarks.studies.query_rows [--tiny] [--out PATH]

Each head has rows of its own, drawn at random, in any order. "some" is a quarter of the queries,
"all" a permutation of them. Rates count the pairs that queries see; with `causal`, queries in one
piece are the last ones, and they are also computed by the kernels that listed queries take, those
of block lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.harness import report, study, timing
from benchmarks.tables.query_rows import CONTIGUOUS, GATHERED, LISTS
from sparse_fmha import BlockGrid, BlockMask
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "query_rows"
COLUMNS = ["TFLOP/s", "of the rate in one piece"]
ELEMENTS = 2048  # heads x head dim
MOST_DIM = 128  # of a causal call on a GPU: thresholds have no kernels above
SIZES = {
    "full": {"lengths": (32768, 131072), "dims": (64, 128, 256)},
    "tiny": {"lengths": (512,), "dims": (64, 256)},
}
Op = tuple[Callable[[], Tensor], float]  # and its pairs, of all heads


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.query_rows", description=__doc__.partition("\n")[0]
    )
    report.add_op_options(p, RESULTS, iterations=15)
    return p


def cases(q: Tensor, k: Tensor, v: Tensor, rng: torch.Generator) -> dict[str, dict[str, Op]]:
    """By name, the ops of the cases that run for this head dim."""
    _, length, heads, dim = q.shape
    drawn = torch.rand(1, heads, length, generator=rng, device=q.device).argsort(-1).int()
    some = drawn[..., : length // 4].contiguous()
    n = some.shape[2]
    scores = torch.rand(1, heads, -(-n // 128), -(-length // 128), generator=rng, device=q.device)
    few = max(1, scores.shape[3] // 4)
    mask = BlockMask.from_blocks(scores.argsort(-1) < few, n, length, 128, 128)
    first, last = q[:, :n].contiguous(), q[:, length - n :].contiguous()
    of_all = heads * n * length
    lists = sparse_fmha.block_sparse_attention
    gather = sparse_fmha.row_attention
    found = {
        "all keys": {
            CONTIGUOUS: (lambda: sparse_fmha.attention(first, k, v), of_all),
            GATHERED: (lambda: gather(q, k, v, some), of_all),
        },
        "block lists": {
            CONTIGUOUS: (lambda: lists(first, k, v, mask), of_all * mask.density),
            GATHERED: (lambda: gather(q, k, v, some, mask=mask), of_all * mask.density),
        },
    }
    if dim <= MOST_DIM:
        whole = heads * length * (length + 1) / 2
        tail = whole - heads * (length - n) * (length - n + 1) / 2
        pairs = (some.double() + 1).sum().item()
        found["causal, some"] = _causal(last, k, v, tail) | {
            GATHERED: (lambda: gather(q, k, v, some, causal=True), pairs)
        }
        found["causal, all"] = _causal(q, k, v, whole) | {
            GATHERED: (lambda: gather(q, k, v, drawn, causal=True), whole)
        }
    return found


def _causal(q: Tensor, k: Tensor, v: Tensor, pairs: float) -> dict[str, Op]:
    """Causal attention of the last queries, by both kinds of kernels."""
    grid = BlockGrid(q.shape[1], k.shape[1], 128, 128, causal=True, device=q.device)
    mask = grid.mask(grid.reachable())
    return {
        CONTIGUOUS: (lambda: sparse_fmha.attention(q, k, v, causal=True), pairs),
        LISTS: (lambda: sparse_fmha.block_sparse_attention(q, k, v, mask), pairs),
    }


def rows(case: str, ops: dict[str, Op], dim: int, args, device: str) -> list[dict]:
    times = timing.measure(
        {name: call for name, (call, _) in ops.items()}, device=device, l2="cold",
        iterations=args.iterations, warmup=2, seed=args.seed,
    )  # fmt: skip
    rates = {name: 4 * pairs * dim / (times[name].median * 1e9) for name, (_, pairs) in ops.items()}
    return [
        {"case": case, "op": name, "ms": asdict(times[name]), "tflops": rate,
         "rate": rate / rates[CONTIGUOUS]}
        for name, rate in rates.items()
    ]  # fmt: skip


@torch.no_grad()
def measure(size: dict, args, device: str, dtype) -> dict:
    rng = torch.Generator(device).manual_seed(args.seed)
    found: list[dict] = []
    for dim in size["dims"]:
        heads = 2 if args.tiny else ELEMENTS // dim
        for length in size["lengths"]:
            shape = (1, length, heads, dim)
            qkv = [torch.randn(shape, generator=rng, device=device).to(dtype) for _ in range(3)]
            for name, ops in cases(*qkv, rng).items():
                found += rows(f"d{dim}/{length}/{name}", ops, dim, args, device)
    return {"rows": found}


def table(rows: list[dict]) -> str:
    return study.table(COLUMNS, rows, lambda row: [f"{row['tflops']:.1f}", f"{row['rate']:.1%}"])


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
