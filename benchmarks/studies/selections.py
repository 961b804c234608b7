"""What the selections of methods would cost on a GPU, counted without one.

    python -m benchmarks.studies.selections [--case NAME] [--length N]

Kernels, bytes and products of the torch ops of each selection, without attention, and the most that
its tensors take at a time, with the mask and without q and k. The time is an estimate from these
(benchmarks.harness.counted), not a measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import counted, report
from sparse_fmha import patterns
from sparse_fmha.cli import one_line_errors

HEADER = ["selection", "tokens", "kernels", "GB moved", "TFLOP", "ms, estimate", "peak, GB"]


class Case(NamedTuple):
    """A selection at the sizes of the study of methods."""

    choose: Callable[[Tensor, Tensor], object]
    length: int = 128 * 1024
    heads: int = 32
    heads_kv: int = 8
    dim: int = 128


def _chunks(q: Tensor) -> Tensor:
    return torch.arange(0, q.shape[1] + 1, 32, device=q.device)[None]


def _token_top_k(q: Tensor, k: Tensor) -> object:
    return patterns.token_top_k(q, k, 1024)


def _dma(q: Tensor, k: Tensor) -> object:
    bias = torch.empty(1, k.shape[2], k.shape[1], dtype=torch.float32, device=q.device)
    return patterns.dma_mask(bias, 1024, heads=q.shape[2])


CASES = {
    "dhsa": Case(
        lambda q, k: patterns.dhsa(q, k, _chunks(q), q.shape[1] // 16), 32 * 1024, 8, 4, 256
    ),
    "dhsa_blocks": Case(patterns.dhsa_blocks, 32 * 1024, 8, 4, 256),
    "psa": Case(patterns.psa_levels, 32 * 1024, 12, 12),
    "ssa": Case(patterns.ssa),
    "ssa_attention": Case(lambda q, k: patterns.ssa_attention(q, k, k)),
    "ssa, width 256": Case(lambda q, k: patterns.ssa(q, k, width=256)),
    "token_sparse": Case(
        lambda q, k: patterns.token_sparse_indices(q, k, keep=q.shape[1] * 3 // 4)
    ),
    "hip": Case(patterns.hip),
    "token_top_k": Case(_token_top_k),
    "minference_block_sparse": Case(lambda q, k: patterns.minference_block_sparse(q, k)),
    "flexprefill_query_aware": Case(patterns.flexprefill_query_aware),
    "mminference_grid_lines": Case(
        lambda q, k: patterns.mminference_grid_lines(q, k, (64, 128, 256))
    ),
    "vertical_slash": Case(patterns.vertical_slash),
    "snapkv": Case(lambda q, k: patterns.snapkv(q, k)),
    "dma_mask": Case(_dma, 32 * 1024, 8, 2),
    "rectified": Case(lambda q, k: patterns.rectified(q, k, keep=0.11), 118800, 24, 24),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.selections", description=__doc__.partition("\n")[0]
    )
    p.add_argument("--case", choices=CASES, action="append", help="default: all")
    p.add_argument(
        "--length", type=report.at_least_one, metavar="N", help="tokens, with 32 and 8 heads of 128"
    )
    return p


def row(name: str, case: Case) -> list[str]:
    shapes = [(1, case.length, heads, case.dim) for heads in (case.heads, case.heads_kv)]
    try:
        found = counted.count(case.choose, *shapes, dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return [name, str(case.length), str(error).splitlines()[0], *[""] * (len(HEADER) - 3)]
    return [
        name, str(case.length), str(found.kernels), f"{found.bytes / 1e9:.3g}",
        f"{found.flops / 1e12:.2g}", f"{found.seconds * 1e3:.3g}", f"{found.peak / 1e9:.3g}",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in args.case or CASES:
        case = CASES[name]
        if args.length:
            case = Case(case.choose, args.length)
        print(report.plain_table(HEADER, [row(name, case)]), flush=True)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
