"""Decode attention of the kernels for GPUs other than Hopper, beside Hopper's own.

    python -m benchmarks.studies.other_gpus_decode [--tiny] [--l2 warm] [--out PATH]

The architectures sm80 and sm86 share their kernels of decode, so one of them is measured. Each call
is a CUDA graph of the whole call, replayed after a buffer several times the size of the L2 cache
has been read; with --l2 warm after the same call, which leaves its code there, and of most cases no
more of its data. Rates count the bytes that must be read. Errors are of the first request against
fp64. On a GPU without Hopper's kernels there is nothing to compare with; benchmarks.studies.decode
times its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import decode
from benchmarks.cases.decode import Cache, Call, DecodeCase
from benchmarks.harness import environment, report, timing
from benchmarks.studies.other_gpus import of_arch
from benchmarks.tables import other_gpus_decode as tables
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "other_gpus_decode"
MARGIN = 1 << 20  # of the caches' bytes

CASES = (
    *(
        DecodeCase("dense", f"{batch}x{length}k", (1024 * length,) * batch)
        for batch, length in ((1, 128), (16, 4), (16, 32), (64, 4), (256, 1))
    ),
    *(
        DecodeCase("dense", f"{batch}x{length}k, D{dim}", (1024 * length,) * batch, head_dim=dim)
        for dim in (64, 256)
        for batch, length in ((16, 32), (64, 4))
    ),
    *(DecodeCase("pages", f"16x32k, page {p}", (32768,) * 16, page=p) for p in (16, 1)),
    DecodeCase("ragged", "1x128k + 63x2k", (131072, *(2048,) * 63), page=64),
    DecodeCase("blocks", "16x32k 64/8, 80% sparse", (32768,) * 16, (64, 8), sparsity=80),
    DecodeCase("skip", "16x32k 64/4, 70% skipped", (32768,) * 16, (64, 4), sparsity=70),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.other_gpus_decode", description=__doc__
    )
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--l2", choices=("clean", "warm"), default="clean")
    report.add_op_options(p, RESULTS)
    return p


def call_of(case: DecodeCase, cache: Cache) -> Call:
    call = cache.call(case)
    if case.group == "blocks":
        return replace(call, blocks=cache.lists(case))
    return cache.shape_scores(case, call) if case.group == "skip" else call


def attend(call: Call) -> Tensor:
    return sparse_fmha.decode_attention(call.q, call.k, call.v, call.seq_lens, **call.options)


def error(call: Call, out: Tensor) -> float | None:
    """Of calls that skip there is none: what they leave out is not rounding."""
    return None if call.threshold else decode.error(call, out)


def rows_of(case: DecodeCase, cache: Cache, args: argparse.Namespace) -> list[dict]:
    call = call_of(case, cache)
    archs = tables.ARCHS if cache.device == "cuda" else ("cpu",)
    ops: dict[str, Callable[[], object]] = {}
    errors = {}
    for arch in archs:
        run = of_arch(arch, attend)
        errors[arch] = error(call, run(call))
        ops[arch] = timing.captured(lambda run=run: run(call), cache.device)
    times = timing.measure(
        ops, device=cache.device, l2=args.l2, iterations=args.iterations, warmup=1, seed=args.seed
    )
    size = case.read_bytes(cache.dtype.itemsize)
    return [
        {"case": case.name, "op": arch, "ms": asdict(ms), "bytes": size, "error": errors[arch]}
        for arch, ms in times.items()
    ]


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, dtype = environment.of_study(args.tiny)
    built = {row["arch"] for row in sparse_fmha.kernels()}
    if device == "cuda" and (missing := set(tables.ARCHS) - built):
        sys.exit(f"error: this build has no kernels of {', '.join(sorted(missing))}")
    results = environment.results(
        device,
        settings={"iterations": args.iterations, "seed": args.seed, "l2": args.l2},
        rows=[],
    )
    cases = [case.tiny() if args.tiny else case for case in CASES]
    with torch.no_grad():
        most = max(case.cache_bytes(dtype.itemsize) for case in cases) + MARGIN
        cache = Cache(most, device, dtype, args.seed)
        for case in cases:
            results["rows"] += rows_of(case, cache, args)
    print(tables.summary(results))
    report.keep(results, report.out_of(args, RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
