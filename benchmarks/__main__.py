"""Command line: python -m benchmarks"""

from __future__ import annotations

import argparse
import sys

import torch

import sparse_fmha
from benchmarks.cases.catalogue import select
from benchmarks.harness import environment, report
from benchmarks.peers import registry as peers
from benchmarks.run import run_case
from benchmarks.tables import rates, terminal
from sparse_fmha.cli import one_line_errors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times sparse_fmha beside the other attention kernels that are installed.",
    )
    # fmt: off
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    p.add_argument("--case", action="append", default=[], metavar="GLOB",
                   help="cases by name, such as 'fmha/d128/*'; may be repeated (default: all)")
    p.add_argument("--device", choices=["cuda", "cpu"],
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--peers", default="auto", metavar="NAMES",
                   help="auto (those that are quick and safe), none, or a list: fa3,sta,flex_tiled")
    p.add_argument("--without", default="", metavar="NAMES",
                   help="peers to leave out, fa3,sta; the results file names them")
    p.add_argument("--l2", choices=["cold", "warm", "both"],
                   help="state of the L2 cache before each call (default: both; cold with --quick)")
    p.add_argument("--iterations", type=report.at_least_one, default=20, metavar="N",
                   help="timed calls of each op (default: %(default)s)")
    p.add_argument("--warmup", type=int, default=3, metavar="N",
                   help="untimed calls before them (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a few cases that stand for the rest")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=report.out_path, default=report.RESULTS, metavar="PATH",
                   help="results file, or the folder to put it in (default: benchmarks/results)")
    p.add_argument("--plot", action="store_true", help="a picture beside the file (matplotlib)")
    # fmt: on
    return p


def kernel_table() -> list[dict]:
    """Rows of the compiled kernels. Module _C, which has them, is built for one version of Python;
    the op library is for all. Where it is for another one only the executed FLOPs are unknown."""
    try:
        return list(sparse_fmha.kernels())
    except ImportError as error:
        print(f"no kernel table, so no executed FLOP/s: {error}", file=sys.stderr)
        return []


def describe(results: dict, record: dict) -> str:
    """One line of progress: what ours and the fastest peer did."""
    name, scale = rates.unit(results)
    ours, *others = rates.by_op(record, results["settings"]["l2"][0]).values()
    text = f"{rates.number(ours['useful_tflops'] * scale)} {name}"
    if others:
        best = min(others, key=lambda run: run["ms"]["median"])
        text += f", {best['op']} {rates.number(best['useful_tflops'] * scale)}"
    return text


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        p.error("--device cuda: torch finds no GPU; --device cpu runs the CPU cases")
    if args.warmup < 0:
        p.error("--warmup is at least 0")
    if args.quick and args.case and args.l2:
        p.error("--quick changes nothing beside --case and --l2")
    try:
        cases = select(args.device, args.case, args.quick)
        builders = peers.choose(args.device, args.peers, args.without)
    except ValueError as problem:
        p.error(str(problem))
    if args.plot:
        from benchmarks.tables.plot import plot  # matplotlib is optional
    if args.list:
        print("\n".join(c.name for c in cases))
        return 0
    l2 = args.l2 or ("cold" if args.quick else "both")
    settings = {
        "l2": ["cold", "warm"] if l2 == "both" else [l2],
        "iterations": args.iterations,
        "warmup": args.warmup,
        "seed": args.seed,
    }
    results = environment.results(args.device, settings=settings, cases=[], failed={})
    path = report.place(results, args.out)
    kernels = kernel_table()
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", end=" ", file=sys.stderr, flush=True)
        try:
            record = run_case(case, builders, kernels, **settings)
        except RuntimeError as error:
            results["failed"][case.name] = str(error)
            print(f"failed: {error}", file=sys.stderr, flush=True)
            continue
        results["cases"].append(record)
        print(describe(results, record), file=sys.stderr, flush=True)
        report.save(results, path)  # a run that is cut short keeps what it measured
    if not results["cases"]:
        return 1
    if args.plot:
        plot(results, path.with_suffix(".png"))
    terminal.print_table(results)
    print(f"results: {path}")
    idle = peers.idle(args.peers, args.without, results["cases"])
    for name, reason in idle.items():
        print(f"error: --peers {name}: it ran no case: {reason}", file=sys.stderr)
    return int(bool(results["failed"] or idle))


if __name__ == "__main__":
    with one_line_errors(install="sparse-fmha[demo]"):
        sys.exit(main())
