"""Backward passes: dense beside cuDNN through torch, neighborhoods, block lists and stripes.

    python -m benchmarks.studies.backward [--case NAME] [--flex] [--tiny] [--out PATH]

With --flex, FlexAttention runs beside ours, compiled for each case: on grids of more axes than one
with its tokens in tiles, copies into and out of them included. Beside lists of 64x64 blocks there
is fastvideo-kernel, if it is installed. Where a peer has no kernel, as FlexAttention for gradients
of lists of 64x64 blocks, its row is missing and the reason is printed.

A call is the backward op alone: row terms, lists by keys, dQ, dK and dV. The lse has no gradient of
its own. Dense calls run a second time as under `torch.use_deterministic_algorithms(True)`, where
bits repeat. Operations are 2.5 times those of the forward pass over the pairs that are visible; a
window's executed pairs are those in the tiles that the kernel visits, and `of dense` is the rate
over these relative to the rate of dense attention. Windows do not shrink at borders, so they have
as many pairs everywhere. The error is that of the gradient of q against fp64, at the size that
--tiny runs, relative to its largest element.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.cases.gradients import CASES, Case, attention_of, backward, problem
from benchmarks.harness import report, study, timing
from benchmarks.harness.names import OURS, UnavailableError
from benchmarks.peers.gradients import peers_of
from benchmarks.tables import backward as figures
from sparse_fmha import reference
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "backward"
HEADER = ["case", "op", "ms", "p10", "p90", "TFLOP/s", "of dense", "error of dq"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.backward", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [case.name for case in CASES]
    p.add_argument("--case", choices=names, metavar="NAME", action="append", help="default: all")
    p.add_argument("--flex", action="store_true", help="measure FlexAttention, too: minutes more")
    report.add_op_options(p, RESULTS)
    return p


def error(case: Case, device: str, dtype: torch.dtype, seed: int) -> float:
    """Of the gradient of q of the small problem, relative to its largest element."""
    small = case.tiny()
    attend, visible = attention_of(small, device, seed)
    q, k, v, dout = problem(small, device, dtype, seed)
    (found,) = torch.autograd.grad(attend(q, k, v), [q], dout)
    wide = q.detach().double().requires_grad_()
    out, _ = reference.attention(wide, k.detach().double(), v.detach().double(), visible)
    (expected,) = torch.autograd.grad(out, [wide], dout.double().reshape(out.shape))
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def executed_pairs(case: Case, device: str, dtype: torch.dtype) -> float | None:
    """Of one head by our kernel; None where it is not known. What has no window has no others than
    visible ones, up to the tiles at the diagonal and at the ends."""
    from sparse_fmha import _C

    if not case.window:
        return case.pairs()
    if device == "cpu" or _C.arch_for_call(*torch.cuda.get_device_capability()) != "sm90":
        return None
    fused = case.head_dim <= 128 and _C.tiles.why_two_kernels(case.walk(), 0) is None
    name = str(dtype).removeprefix("torch.")
    direction = "backward_fused" if fused else "backward_dkv"
    kernel = _C.find_kernel("sm90", "neighborhood", name, case.head_dim, False, direction)
    return case.executed_pairs(kernel["tile_q"], kernel["tile_k"])


def deterministic(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the backward pass does is as it was set when the forward pass ran."""
    torch.use_deterministic_algorithms(True)
    try:
        return attend(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)


def rows_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    of_error = error(case, device, dtype, args.seed)
    case = case.tiny() if args.tiny else case
    attend, _ = attention_of(case, device, args.seed)
    *inputs, dout = problem(case, device, dtype, args.seed)
    ops = {OURS: backward(attend(*inputs), inputs, dout)}
    if case.causal is not None and case.head_dim <= 128:  # above, there are two kernels anyway
        ops[figures.DETERMINISTIC] = backward(deterministic(attend, *inputs), inputs, dout)
    for name, peer in peers_of(case, args.flex).items() if device == "cuda" else ():
        try:
            ops[name] = peer(case, inputs, dout)
        except UnavailableError as reason:
            print(f"{case.name}: no row of {name}: {reason}", file=sys.stderr)
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    of_pair = 2.5 * 4 * case.batch * case.heads * case.head_dim
    executed = executed_pairs(case, device, dtype)
    return [
        {"case": case.name, "op": name, "ms": asdict(ms), "useful_flops": of_pair * case.pairs(),
         "executed_flops": of_pair * executed if executed and name == OURS else None,
         "error": of_error if name == OURS else None}
        for name, ms in times.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = []
    for row, share in figures.with_shares(rows):
        ms = row["ms"]
        lines.append([
            row["case"], row["op"], *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
            f"{figures.rate(row, 'useful_flops'):.3g}", "" if share is None else f"{share:.0%}",
            f"{row['error']:.1e}" if row["error"] is not None else "",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def measure(_: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    chosen = [case for case in CASES if not args.case or case.name in args.case]
    return {"rows": [row for case in chosen for row in rows_of(case, args, device, dtype)]}


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
