"""What studies that time ops at fixed sizes have in common: a run from options to results file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.harness import environment, report

# (size, options, device, dtype) -> what the results file has: "rows", and anything else
Measure = Callable[[dict, argparse.Namespace, str, torch.dtype], dict]


TIMES = ["case", "op", "ms", "p10", "p90"]


def table(columns: list[str], rows: list[dict], rest: Callable[[dict], list[str]]) -> str:
    """A line for each row: its case, its op, the median and percentiles of its time, and the rest,
    which has further columns."""
    lines = []
    for row in rows:
        times = (f"{row['ms'][x]:.4g}" for x in ("median", "p10", "p90"))
        lines.append([row["case"], row["op"], *times, *rest(row)])
    return report.plain_table(TIMES + columns, lines)


def run(
    args: argparse.Namespace,
    folder: Path,
    measure: Measure,
    table: Callable[[list[dict]], str],
    sizes: Mapping[str, dict] | None = None,
) -> int:
    """Measures at the size "full" or "tiny", prints the table and saves results in the folder.

    Args:
        args: of a parser with `report.add_op_options`.
    """
    device, dtype = environment.of_study(args.tiny)
    size = sizes["tiny" if args.tiny else "full"] if sizes else {}
    results = environment.results(
        device, settings={"iterations": args.iterations, "seed": args.seed, "l2": "cold", **size}
    )
    results |= measure(size, args, device, dtype)
    print(table(results["rows"]))
    report.keep(results, report.out_of(args, folder))
    return 0
