"""Reductions of attention probabilities, beside the dense forward pass of the same sizes.

    python -m benchmarks.studies.score_sums [--tiny] [--out PATH]

A rate counts the products of queries and keys: of the dense forward pass two (Q.K and P.V), of a
reduction one with a given log-sum-exp, two with its own. "torch" is the code in slices, which other
GPUs run. "last 64" are column sums of the last 64 queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

import sparse_fmha
from benchmarks.harness import report, study, timing
from sparse_fmha.cli import one_line_errors
from sparse_fmha.selection import reductions

RESULTS = report.RESULTS / "score_sums"
COLUMNS = ["TFLOP/s", "of dense"]
ELEMENTS = 2048  # heads x head dim
SIZES = {
    "full": {"lengths": (8192, 32768), "dims": (64, 128, 256), "last": 131072},
    "tiny": {"lengths": (256,), "dims": (64,), "last": 512},
}
REDUCED = {
    "columns": {"reduce": "columns"},
    "maxima 64x64": {"reduce": "blocks_max"},
    "sums 128x128": {"reduce": "blocks_sum", "block_q": 128, "block_kv": 128},
}
Ops = dict[str, tuple[float, Callable[[], object]]]  # products, call


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.score_sums", description=__doc__.partition("\n")[0]
    )
    report.add_op_options(p, RESULTS, iterations=15)
    return p


def in_slices(q, k, reduce, lse=None, causal=False, block_q=64, block_kv=64):
    scale = q.shape[3] ** -0.5
    return reductions._in_slices(q, k, (reduce,), lse, causal, scale, block_q, block_kv)


def of_all(q, k, causal: bool, torch_too: bool) -> Ops:
    """Reductions over all queries."""
    _, lse = sparse_fmha.attention(q, k, k, causal=causal, return_lse=True)
    ops: Ops = {"dense": (2, partial(sparse_fmha.attention, q, k, k, causal=causal))}
    for name, options in REDUCED.items():
        call = partial(sparse_fmha.score_sums, q, k, causal=causal, **options)
        ops[name] = (2, call)
        ops[f"{name}, lse given"] = (1, partial(call, lse=lse))
        if torch_too:
            slices = partial(in_slices, q, k, causal=causal, **options)
            ops[f"{name}, lse given, torch"] = (1, partial(slices, lse=lse))
    return ops


def of_last(q, k) -> Ops:
    """Column sums of the last queries, with their own log-sum-exp."""
    return {
        "columns": (2, partial(sparse_fmha.score_sums, q, k, causal=True)),
        "columns, torch": (2, partial(in_slices, q, k, "columns", causal=True)),
    }


def rows(case: str, ops: Ops, pairs: float, dim: int, args, device: str) -> list[dict]:
    times = timing.measure(
        {name: op for name, (_, op) in ops.items()}, device=device, l2="cold",
        iterations=args.iterations, warmup=2, seed=args.seed,
    )  # fmt: skip
    rates = {
        name: products * 2 * pairs * dim / (times[name].median * 1e9)
        for name, (products, _) in ops.items()
    }
    dense = rates.get("dense")
    return [
        {"case": case, "op": name, "ms": asdict(ms), "tflops": rates[name],
         "of_dense": rates[name] / dense if dense else None}
        for name, ms in times.items()
    ]  # fmt: skip


@torch.no_grad()
def measure(size: dict, args, device: str, dtype) -> dict:
    rng = torch.Generator(device).manual_seed(args.seed)
    found: list[dict] = []

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    for dim in size["dims"]:
        heads = 2 if args.tiny else ELEMENTS // dim
        for length in size["lengths"]:
            q, k = normal(1, length, heads, dim), normal(1, length, heads, dim)
            torch_too = length == min(size["lengths"])
            for causal in (False, True):
                pairs = heads * length * (length + 1) / 2 if causal else heads * length**2
                case = f"d{dim}/{length}/{'causal' if causal else 'full'}"
                ops = of_all(q, k, causal, torch_too)
                found += rows(case, ops, pairs, dim, args, device)
    last = size["last"]
    q, k = normal(1, 64, 32, 128), normal(1, last, 8, 128)
    case = f"d128/{last}/last 64"
    return {"rows": found + rows(case, of_last(q, k), 32 * 64 * last, 128, args, device)}


def _rates(row: dict) -> list[str]:
    of_dense = "" if row["of_dense"] is None else f"{row['of_dense']:.0%}"
    return [f"{row['tflops']:.1f}", of_dense]


def table(rows: list[dict]) -> str:
    return study.table(COLUMNS, rows, _rates)


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
