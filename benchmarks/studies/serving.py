"""Methods that choose keys of a cache, each with its choice; packed calls that skip; and gradients
of packed calls.

    python -m benchmarks.studies.serving [--tiny] [--out PATH]

A step of decode takes the newest key into what a method keeps, chooses and attends, as one CUDA
graph, beside attention over all keys. SnapKV chooses once for a prompt. Packed calls are compared
with the same kernels in a loop of calls, one for each sequence or image.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch

from benchmarks.cases import decode, packed, serving
from benchmarks.harness import report, study, timing
from benchmarks.tables.serving import ALL, CHOICE, DECODE, GRADIENTS, LOOP, PACKED, PLAIN, SKIP
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "serving"
PERCENT = (0, 50, 75)
SIZES = {
    "full": {"length": 65536, "batch": 16, "heads": (32, 8)},
    "tiny": {"length": 2048, "batch": 2, "heads": (4, 2)},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.serving", description=__doc__.partition("\n\n")[0]
    )
    report.add_op_options(p, RESULTS, iterations=15)
    return p


def rows(group: str, case: str, ops: dict, args: argparse.Namespace, device: str) -> list[dict]:
    times = timing.measure(
        ops, device=device, l2="clean", iterations=args.iterations, warmup=1, seed=args.seed
    )
    return [
        {"group": group, "case": case, "op": name, "ms": asdict(ms)} for name, ms in times.items()
    ]


def measure(size: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    length, batch, heads = size["length"], size["batch"], size["heads"]
    room = 4 * batch * length * heads[1] * decode.DIM * dtype.itemsize
    found: list[dict] = []
    with torch.no_grad():
        cache = decode.Cache(room // 2, device, dtype, args.seed)
        everything, methods = serving.methods(length, batch, heads, cache)
        ops = {ALL: everything}
        for name, method in methods.items():
            ops |= {name: method.step, name + CHOICE: method.choice}
        ops = {name: timing.captured(op, device) for name, op in ops.items()}
        found += rows(DECODE, f"{batch}x{length // 1024}k", ops, args, device)
        del cache, ops, everything, methods
        cases = [case.tiny() if args.tiny else case for case in packed.CASES]
        prefill = next(case for case in cases if case.group == "prefill")
        for percent in PERCENT:
            calls = serving.skipping(prefill, percent, device, dtype)
            ops = dict(zip((PLAIN, PACKED, LOOP), calls, strict=True))
            found += rows(SKIP, f"{prefill.name}, {percent}% low", ops, args, device)
    for case in cases:
        if case.group != "chunks":  # keys in pages have no gradient
            ops = dict(zip((PACKED, LOOP), serving.gradients(case, device, dtype), strict=True))
            found += rows(GRADIENTS, case.name, ops, args, device)
    return {"rows": found}


def table(rows: list[dict]) -> str:
    return study.table([], rows, lambda _row: [])


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
