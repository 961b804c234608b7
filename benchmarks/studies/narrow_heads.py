"""What heads of 32 lose in kernels made for 64: dense attention at both head dims.

    python -m benchmarks.studies.narrow_heads [--tiny] [--out PATH]

The kernel for head dim 64 runs both. At 32, copies fill the other half of each row with zeros: half
the bytes are read, and all products of 64 are computed. FlashAttention-2, through torch, has a
kernel of its own for 32, so its ratio is what such a kernel gains. Numbers of heads, tokens and
scores are equal at both head dims.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

import torch

import sparse_fmha
from benchmarks.cases.gradients import Case, attention_of, dense, problem
from benchmarks.harness import report, study, timing
from benchmarks.studies.other_gpus import flash, of_arch
from benchmarks.tables.other_gpus import FLASH
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "narrow_heads"
NARROW, WIDE = 32, 64
HEADER = ["case", "op", "ms at D32", "ms at D64", "D64 over D32", "MB at D32", "MB at D64"]
CASES = tuple(dense(WIDE, length, causal) for causal in (False, True) for length in (2048, 16384))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.narrow_heads", description=__doc__
    )
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    report.add_op_options(p, RESULTS)
    return p


def times_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    """Spreads by op and head dim; all calls of a case take turns."""
    built = {row["arch"] for row in sparse_fmha.kernels()} - {"cpu"}
    archs = ["cpu"] if device == "cpu" else sorted(built)
    ops = {}
    for dim in (NARROW, WIDE):
        one = replace(case, head_dim=dim)
        attend, _ = attention_of(one, device, args.seed)
        q, k, v, _ = problem(one, device, dtype, args.seed)
        for arch in archs:
            run = of_arch(arch, attend)
            ops[f"{arch} {dim}"] = lambda run=run, given=(q, k, v): run(*given)
        if device == "cuda":
            ops[f"{FLASH} {dim}"] = lambda given=(q, k, v): flash(*given, case.causal)
    return timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )


def rows_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    small = case.tiny() if args.tiny else case
    rows = []
    for name, ms in times_of(small, args, device, dtype).items():
        op, _, dim = name.rpartition(" ")
        tokens = small.batch * small.grid[0] * small.heads
        rows.append({
            "case": case.name.partition(" ")[2], "op": op, "head_dim": int(dim), "ms": asdict(ms),
            "bytes": 4 * tokens * int(dim) * dtype.itemsize,
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    by_dim = {dim: [row for row in rows if row["head_dim"] == dim] for dim in (NARROW, WIDE)}
    lines = []
    for narrow, wide in zip(by_dim[NARROW], by_dim[WIDE], strict=True):
        assert (narrow["case"], narrow["op"]) == (wide["case"], wide["op"])
        times = [row["ms"]["median"] for row in (narrow, wide)]
        lines.append([
            narrow["case"], narrow["op"], *(f"{ms:.4g}" for ms in times),
            f"{times[1] / times[0]:.2f}", *(f"{row['bytes'] / 1e6:.4g}" for row in (narrow, wide)),
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


@torch.no_grad()
def measure(size: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    return {"rows": [row for case in CASES for row in rows_of(case, args, device, dtype)]}


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
