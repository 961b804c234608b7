"""Whole calls of published methods, their selection included, beside dense attention.

    python -m benchmarks.studies.methods [--case NAME] [--length N] [--against none] [--tiny]

Times, the memory that a call takes beside its inputs, and how far its result is from that of dense
attention on the same inputs, in which the keys that count are known (benchmarks.cases.stripes). It
says nothing of a model's accuracy. `--against none` leaves dense attention out, which takes minutes
at a million tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import methods
from benchmarks.cases.methods import CASES, DENSE, FA3, Case
from benchmarks.harness import environment, report, timing
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.names import UnavailableError
from benchmarks.peers import fa3
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "methods"
HEADER = ["method", "op", "ms", "p10", "p90", "speedup", "peak, MiB", "difference"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.methods", description=__doc__.partition("\n")[0]
    )
    p.add_argument("--case", choices=CASES, action="append", help="default: all")
    p.add_argument("--length", type=report.at_least_one, metavar="N", help="tokens of every case")
    p.add_argument("--against", choices=("all", "none"), default="all", help="dense attention")
    report.add_op_options(p, RESULTS, iterations=5)
    return p


def dense_ops(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ours, and FlashAttention-3 where it is installed and takes the inputs."""
    found = {DENSE: lambda: sparse_fmha.attention(q, k, v, causal=case.causal)}
    if q.is_cuda and case.whole:
        with contextlib.suppress(UnavailableError):
            found[FA3] = fa3.forward(q, k, v, case.causal)
    return found


def run(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    q, k, v = methods.tensors(case, device, dtype, args.seed)
    ops = case.ops(case, q, k, v)
    own = set(ops) - {case.against}
    if args.against == "all":
        ops = dense_ops(case, q, k, v) | ops
    else:
        ops.pop(DENSE, None)
    facts = {}
    expected = None
    if case.exact and DENSE in ops:
        expected = ops[DENSE]()
    for name, op in list(ops.items()):
        try:
            out = op()  # compiles and allocates what a first call does
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            facts[name] = {"error": str(error).splitlines()[0]}
            del ops[name]
            continue
        difference = None
        if expected is not None and name in own and out.shape == expected.shape:
            difference = ((out - expected).float().norm() / expected.float().norm()).item()
        del out
        facts[name] = {"peak_bytes": peak_bytes(op, device), "difference": difference}
    del expected
    timed = {
        name: timing.captured(op.op, device) if isinstance(op, methods.Captured) else op
        for name, op in ops.items()
    }
    times = timing.measure(
        timed, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    measured = [{"op": name, "ms": asdict(ms), **facts[name]} for name, ms in times.items()]
    return measured + [{"op": name, **fact} for name, fact in facts.items() if "error" in fact]


def table(found: list[dict]) -> str:
    lines = []
    for one in found:
        base = {row["op"]: row["ms"]["median"] for row in one["rows"] if "ms" in row}
        base = base.get(one["against"]) or base.get(DENSE)
        for row in one["rows"]:
            if "error" in row:
                lines.append([one["method"], row["op"], row["error"], *[""] * (len(HEADER) - 3)])
                continue
            ms, size, difference = row["ms"], row["peak_bytes"], row["difference"]
            lines.append([
                one["method"], row["op"], *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
                f"{base / ms['median']:.2f}x" if base else "",
                "" if size is None else f"{size / 2**20:.0f}",
                "" if difference is None else f"{difference:.3f}",
            ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, dtype = environment.of_study(args.tiny)
    out = report.out_of(args, RESULTS)
    results = environment.results(
        device,
        settings={"iterations": args.iterations, "seed": args.seed, "l2": "cold"},
        methods=[],
    )
    for name in args.case or CASES:
        case = CASES[name].tiny() if args.tiny else CASES[name]
        if args.length:
            case = replace(case, length=args.length)
        facts = ("method", "causal", "headline", "against", "published")
        found = {**{fact: getattr(case, fact) for fact in facts}, **case.size}
        found["rows"] = run(case, args, device, dtype)
        results["methods"].append(found)
        print(table([found]), flush=True)
        report.keep_so_far(results, out)
        if device == "cuda":
            torch.cuda.empty_cache()
    report.keep(results, out)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
