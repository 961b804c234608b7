"""Kernels for GPUs other than Hopper, run on whatever GPU is here.

    python -m benchmarks.studies.other_gpus [--tiny] [--archs sm80,sm86] [--passes forward,backward]
                                            [--no-flex] [--out PATH]

Dense and causal attention beside FlashAttention-2 through torch, neighborhoods beside its
FlexAttention, compiled for each case, block lists, and stripes of lone keys; decode has a study of
its own, other_gpus_decode. FlexAttention has the tokens of grids of more axes than one in tiles,
and its copies into and out of them count; its mask is lists of blocks. Rates of all but dense and
causal attention are a share of the kernel's own dense rate (D128, full, 32k; backward 16k): in the
forward pass over the tiles that the kernel computes, in the backward pass over visible pairs. A
backward call is row terms, dQ, dK and dV, 2.5 times the operations of the forward pass. The error
is that of out, or of the gradient of q, against fp64, at the size that --tiny runs, relative to the
largest element. The compiled code is the same on all GPUs, but a figure is for the GPU in its file
alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from benchmarks.cases.gradients import Case, attention_of, backward, dense, problem
from benchmarks.harness import environment, report, timing
from benchmarks.peers import gradients as peers
from benchmarks.studies.backward import error as gradient_error
from benchmarks.tables import other_gpus as figures
from sparse_fmha import reference
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "other_gpus"
HEADER = ["pass", "case", "op", "ms", "p10", "p90", "TFLOP/s", "of flash", "of flex",
          "of own dense", "error"]  # fmt: skip
ARCHS = ("sm80", "sm86")
PASSES = ("forward", "backward")
BACKWARD_LENGTHS = (4096, 16384)  # of dense and causal attention
FLUX = {"grid": (256, 256), "heads": 24, "window": (80, 80)}
HUNYUAN = {"grid": (30, 48, 80), "heads": 24, "window": (18, 24, 24)}

CASES = (
    *(
        dense(head_dim, length, causal)
        for head_dim in (64, 96, 128, 256)
        for causal in (False, True)
        for length in (2048, 4096, 8192, 16384, 32768)
    ),
    Case("FLUX", **FLUX),
    Case("FLUX, stride 16", **FLUX, stride=16),
    Case("HunyuanVideo", **HUNYUAN),
    Case("HunyuanVideo, stride 16x8x8", **HUNYUAN, stride=(16, 8, 8)),
    Case("Cosmos", (16, 44, 80), 32, window=(16, 24, 16)),
    Case("1-D, stride 256", (32768,), 16, window=(2048,), stride=256),
    *(
        Case(f"lists {q}x{k}", (32768,), 16, blocks=(q, k, 0.1))
        for q, k in ((128, 128), (64, 64), (128, 16))
    ),
    Case("stripes of 512 rows", (32768,), 16, columns=(512, 0.1)),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.other_gpus", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "--archs",
        type=lambda text: text.split(","),
        default=list(ARCHS),
        metavar="LIST",
        help="whose kernels are measured, on a GPU; default: sm80,sm86",
    )
    p.add_argument(
        "--passes",
        type=lambda text: text.split(","),
        default=list(PASSES),
        metavar="LIST",
        help="default: forward,backward",
    )
    p.add_argument(
        "--no-flex",
        action="store_true",
        help="leave out FlexAttention, which takes minutes to compile",
    )
    report.add_op_options(p, RESULTS)
    return p


def of_arch(arch: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the kernels of an architecture; on the CPU there are only its own."""
    if arch == "cpu":
        return function

    def run(*args: object) -> Any:
        with sparse_fmha.arch_override(arch):
            return function(*args)

    return run


def tiles_of(case: Case, arch: str) -> tuple[int, int]:
    """Query rows and keys of the kernel's tile."""
    mechanism = "neighborhood" if case.window else "block_sparse"
    rows = [
        row
        for row in sparse_fmha.kernels()
        if (row["arch"], row["pass"], row["mechanism"], row["skips"])
        == (arch, "forward", mechanism, False)
        and min(row["head_dim"], row["value_dim"]) >= case.head_dim
    ]
    row = min(rows, key=lambda row: row["head_dim"])
    return row["tile_q"], row["tile_k"]


def executed_pairs(case: Case, arch: str) -> float:
    """Of one head: those in the tiles that the kernel visits. Lists have no others."""
    if not case.window or arch == "cpu":
        return case.pairs()
    from sparse_fmha import _C

    walk = case.walk()
    tile_q, tile_k = tiles_of(case, arch)
    # As sm80/geometry/grid.h chooses them.
    shape = _C.tiles.choose(walk, tile_q, tile_k, (max(tile_q, tile_k),) * 3, (1.0, 1.0, 0.0))
    _, visited, *_ = _C.tiles.count(walk, shape)
    return visited * tile_q * tile_k


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool | None) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return scaled_dot_product_attention(*heads_first, is_causal=bool(causal))


def measures_flex(case: Case, args: argparse.Namespace, device: str) -> bool:
    return case.window is not None and device == "cuda" and not args.no_flex


def error(case: Case, arch: str, device: str, dtype: torch.dtype, seed: int) -> float:
    """Of the small problem, relative to its largest element."""
    small = case.tiny()
    attend, visible = attention_of(small, device, seed)
    q, k, v, _ = problem(small, device, dtype, seed)
    exact, _ = reference.attention(*(x.double() for x in (q, k, v)), visible)
    found = of_arch(arch, attend)(q, k, v).double().reshape(exact.shape)
    return ((found - exact).abs().max() / exact.abs().max()).item()


def rows_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    archs = args.archs if device == "cuda" else ["cpu"]
    errors = {arch: error(case, arch, device, dtype, args.seed) for arch in archs}
    name = case.name
    case = case.tiny() if args.tiny else case
    attend, _ = attention_of(case, device, args.seed)
    q, k, v, _ = problem(case, device, dtype, args.seed)
    ops = {arch: functools.partial(of_arch(arch, attend), q, k, v) for arch in archs}
    if case.causal is not None and device == "cuda":
        ops[figures.FLASH] = lambda: flash(q, k, v, case.causal)
    if measures_flex(case, args, device):
        ops[figures.FLEX] = peers.flex_op(case, (q, k, v), dtype)
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    of_pair = 4 * case.batch * case.heads * case.head_dim
    return [
        {"pass": "forward", "case": name, "op": op, "ms": asdict(ms),
         "useful_flops": of_pair * case.pairs(),
         "executed_flops": of_pair * (executed_pairs(case, op) if op in archs else case.pairs()),
         "error": errors.get(op)}
        for op, ms in times.items()
    ]  # fmt: skip


def backward_rows_of(
    case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype
) -> list[dict]:
    archs = args.archs if device == "cuda" else ["cpu"]
    errors = {arch: of_arch(arch, gradient_error)(case, device, dtype, args.seed) for arch in archs}
    name = case.name
    case = case.tiny() if args.tiny else case
    attend, _ = attention_of(case, device, args.seed)
    q, k, v, dout = problem(case, device, dtype, args.seed)
    ops = {}
    for arch in archs:
        out = of_arch(arch, attend)(q, k, v)
        ops[arch] = of_arch(arch, backward(out, (q, k, v), dout))
    if case.causal is not None and device == "cuda":
        ops[figures.FLASH] = backward(flash(q, k, v, case.causal), (q, k, v), dout.transpose(1, 2))
    if measures_flex(case, args, device):
        ops[figures.FLEX] = peers.flex(case, (q, k, v), dout)
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    flops = 2.5 * 4 * case.batch * case.heads * case.head_dim * case.pairs()
    return [
        {"pass": "backward", "case": name, "op": op, "ms": asdict(ms), "useful_flops": flops,
         "executed_flops": flops, "error": errors.get(op)}
        for op, ms in times.items()
    ]  # fmt: skip


def has_backward(case: Case) -> bool:
    return case.causal is None or case.grid[0] in BACKWARD_LENGTHS


def table(rows: list[dict]) -> str:
    lines = []
    for row, speeds, share in figures.beside(rows):
        ms = row["ms"]
        lines.append([
            row["pass"], row["case"], row["op"],
            *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
            f"{figures.rate(row, 'useful_flops'):.3g}",
            *(f"{speeds[peer]:.2f}" if peer in speeds else "" for peer in figures.PEERS),
            "" if share is None else f"{share:.0%}",
            "" if row["error"] is None else f"{row['error']:.1e}",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, dtype = environment.of_study(args.tiny)
    if not set(args.passes) <= set(PASSES):
        sys.exit(f"error: --passes is of {', '.join(PASSES)}")
    built = {row["arch"] for row in sparse_fmha.kernels()}
    if device == "cuda" and (missing := set(args.archs) - built):
        sys.exit(f"error: this build has no kernels of {', '.join(sorted(missing))}")
    results = environment.results(
        device,
        settings={"iterations": args.iterations, "seed": args.seed, "l2": "cold"},
        rows=[],
    )
    if "forward" in args.passes:
        with torch.no_grad():
            for case in CASES:
                results["rows"] += rows_of(case, args, device, dtype)
    if "backward" in args.passes:
        for case in filter(has_backward, CASES):
            results["rows"] += backward_rows_of(case, args, device, dtype)
    print(table(results["rows"]))
    report.keep(results, report.out_of(args, RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
