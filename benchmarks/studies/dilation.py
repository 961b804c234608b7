"""What a large dilation costs: neighborhoods beside undilated ones of the same size.

    python -m benchmarks.studies.dilation [--tiny] [--out PATH]

Both see as many pairs, so the ratio of their times is that of their rates. A class has 64 tokens
on an axis; "uneven": some classes have 65.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.harness import report, study, timing
from benchmarks.tables.dilation import UNDILATED
from sparse_fmha import neighborhood_attention
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "dilation"
COLUMNS = ["TFLOP/s", "of the undilated rate"]
# grid, window, dilation, heads
Problem = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
SIZES: dict[str, dict] = {
    "full": {
        "problems": {
            "2-D 11x11 w16": ((704, 704), (16, 16), (11, 11), 8),
            "2-D 11x11 w32": ((704, 704), (32, 32), (11, 11), 8),
            "2-D 13x13 w16": ((832, 832), (16, 16), (13, 13), 8),
            "2-D 13x13 w32": ((832, 832), (32, 32), (13, 13), 8),
            "2-D 11x11 w32 uneven": ((712, 712), (32, 32), (11, 11), 8),
            "2-D 16x16 w32": ((1024, 1024), (32, 32), (16, 16), 4),
            "3-D 1x11x11 w4x16x16": ((8, 704, 704), (4, 16, 16), (1, 11, 11), 1),
            "1-D 3 w1024": ((65536,), (1024,), (3,), 16),
        },
        "dims": (64, 128, 256),
    },
    "tiny": {"problems": {"2-D": ((44, 44), (2, 2), (11, 11), 2)}, "dims": (64,)},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.dilation", description=__doc__.partition("\n")[0]
    )
    report.add_op_options(p, RESULTS, iterations=15)
    return p


def rows(case: str, problem: Problem, dim: int, args, device: str, dtype) -> list[dict]:
    rng = torch.Generator(device).manual_seed(args.seed)
    grid, window, dilation, heads = problem
    shape = (1, *grid, heads, dim)
    q, k, v = (torch.randn(shape, generator=rng, device=device).to(dtype) for _ in range(3))
    attend = partial(neighborhood_attention, q, k, v, window)
    ops = {UNDILATED: attend, "dilated": partial(attend, dilation=dilation)}
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=2, seed=args.seed
    )
    flops = 4 * heads * dim * torch.Size(grid).numel() * torch.Size(window).numel()
    base = times[UNDILATED].median
    return [
        {"case": f"d{dim}/{case}", "op": op, "ms": asdict(ms), "tflops": flops / ms.median / 1e9,
         "rate": base / ms.median}
        for op, ms in times.items()
    ]  # fmt: skip


@torch.no_grad()
def measure(size: dict, args, device: str, dtype) -> dict:
    return {
        "rows": [
            row
            for dim in size["dims"]
            for case, problem in size["problems"].items()
            for row in rows(case, problem, dim, args, device, dtype)
        ]
    }


def table(rows: list[dict]) -> str:
    return study.table(COLUMNS, rows, lambda row: [f"{row['tflops']:.1f}", f"{row['rate']:.1%}"])


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
