"""The CPU's kernels in each dtype beside torch's attention, by pass and instruction set.

    python -m benchmarks.studies.cpu [--tiny] [--sets] [--threads N] [--only GLOB]
                                     [--clock {wall,cpu}] [--iterations N] [--out PATH]

--sets also runs the code of every instruction set that this CPU has. A backward call computes all
gradients. Operations are 4 * head dim for each visible pair forward, 2.5 times that backward. `of
torch` is torch's time by ours; where only some pairs are visible, torch's is dense attention on the
same tokens. --clock cpu takes the processor's time of one thread, which other work on the machine
changes less than the time that passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases.gradients import Case, attention_of, problem
from benchmarks.harness import environment, report
from sparse_fmha import _C
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "cpu"
HEADER = ["case", "dtype", "pass", "op", "ms", "GFLOP/s a thread", "of torch"]
DTYPES = ("float32", "bfloat16", "float16")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CASES = (
    *(
        Case(f"D{d} {'causal' if causal else 'dense'} {n}", (n,), 4, d, causal=causal)
        for d in (64, 128)
        for causal in (False, True)
        for n in (1024, 2048)
    ),
    Case("1-D window 256 of 2048", (2048,), 4, 128, window=(256,)),
    Case("2-D window 16x16 of 48x48", (48, 48), 4, 64, window=(16, 16)),
    Case("lists 64x64, a quarter of 2048", (2048,), 4, 128, blocks=(64, 64, 0.25)),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.cpu", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    report.add_op_options(p, RESULTS, iterations=9)
    p.add_argument("--sets", action="store_true", help="also each instruction set")
    p.add_argument("--threads", type=report.at_least_one, default=1, metavar="N")
    p.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    p.add_argument("--only", default="*", metavar="GLOB", help="cases whose name matches")
    return p


@contextmanager
def limited_to(isa: str) -> Iterator[None]:
    before = _C.set_cpu_isa(isa)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def medians(
    ops: dict[str, Callable[[], object]], isas: dict[str, str], clock: Callable[[], float], n: int
) -> dict[str, float]:
    """Milliseconds of each op, one call of each in a round."""
    samples: dict[str, list[float]] = {name: [] for name in ops}
    for turn in range(n + 1):
        for name, op in ops.items():
            with limited_to(isas.get(name, _C.cpu_isas()[-1])):
                start = clock()
                op()
                if turn > 0:
                    samples[name].append(1e3 * (clock() - start))
    return {name: statistics.median(found) for name, found in samples.items()}


def rows_of(case: Case, dtype: str, args: argparse.Namespace) -> list[dict]:
    case = case.tiny() if args.tiny else case
    attend, _ = attention_of(case, "cpu", args.seed)
    q, k, v, dout = problem(case, "cpu", getattr(torch, dtype), args.seed)
    isas = {"sparse_fmha": _C.cpu_isas()[-1]}
    if args.sets:
        isas |= {isa: isa for isa in _C.cpu_isas()}

    def ours() -> torch.Tensor:
        return attend(q, k, v)

    def torchs() -> torch.Tensor:
        heads_first = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, is_causal=bool(case.causal))

    ops: dict[str, Callable[[], torch.Tensor]] = dict.fromkeys(isas, ours) | {"torch": torchs}

    def gradients(name: str) -> Callable[[], object]:
        with limited_to(isas.get(name, _C.cpu_isas()[-1])):
            out = ops[name]()
        given = dout.flatten(1, -3).transpose(1, 2) if name == "torch" else dout
        return lambda: torch.autograd.grad(out, (q, k, v), given, retain_graph=True)

    flops = 4 * case.heads * case.head_dim * case.pairs()
    clock, rows = CLOCKS[args.clock], []
    with torch.no_grad():
        forward = medians({**ops}, isas, clock, args.iterations)
    backward = medians({name: gradients(name) for name in ops}, isas, clock, args.iterations)
    for of_pass, times, work in (("forward", forward, flops), ("backward", backward, 2.5 * flops)):
        for name, ms in times.items():
            rate = (
                work / ms * 1e-6 / args.threads if name != "torch" or not is_sparse(case) else None
            )
            rows.append({
                "case": case.name, "dtype": dtype, "pass": of_pass, "op": name, "ms": ms,
                "gflops": rate, "of_torch": times["torch"] / ms,
            })  # fmt: skip
    return rows


def is_sparse(case: Case) -> bool:
    return case.window is not None or case.blocks is not None


def table(rows: list[dict]) -> str:
    return report.plain_table(
        HEADER,
        [
            [
                row["case"], row["dtype"], row["pass"], row["op"], f"{row['ms']:.4g}",
                "" if row["gflops"] is None else f"{row['gflops']:.1f}", f"{row['of_torch']:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        sys.exit("error: --clock cpu: --threads must be 1, got " + str(args.threads))
    chosen = [case for case in CASES if fnmatchcase(case.name, args.only)]
    if not chosen:
        sys.exit(f"error: --only {args.only}: no case has such a name")
    settings = {x: getattr(args, x) for x in ("iterations", "seed", "threads", "clock")}
    results = {**report.stamp(), **environment.describe("cpu"), "settings": settings, "rows": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        for case in chosen:
            for dtype in DTYPES:
                results["rows"] += rows_of(case, dtype, args)
    finally:
        torch.set_num_threads(threads)
    print(table(results["rows"]))
    report.keep(results, args.out or (None if args.tiny else RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
