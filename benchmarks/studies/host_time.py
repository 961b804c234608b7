"""Host time of one call: the raw ops and the public functions beside torch's and FlashAttention-3.

    python -m benchmarks.studies.host_time [--tiny] [--out PATH]

A shape so small that a GPU is done before the host: one batch entry, 128 tokens, 2 heads of 64
channels, eager, without gradients. A sample is the wall time per call of a batch of calls; nothing
waits for the device inside a batch, and each begins with an idle one. Batches of all ops take turns
in shuffled rounds. On the CPU a call computes before it returns, so there the times are of whole
calls. Of FlashAttention-3 the package fa3-fwd takes `--dtype bfloat16` only.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from benchmarks.cases.case import Case
from benchmarks.harness import environment, report, timing
from benchmarks.harness.names import UnavailableError
from benchmarks.peers.fa3 import fa3
from sparse_fmha import BlockMask, StripeMask
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "host_time"
HEADS, DIM = 2, 64
GRID, WINDOW = (8, 16), (4, 8)
TOKENS = GRID[0] * GRID[1]
BLOCK = 64
SDPA = "torch sdpa"
RAW = {  # of each public function
    "attention": "fmha_fwd",
    "neighborhood_attention": "neighborhood_fwd",
    "block_sparse_attention": "block_sparse_fwd",
    "stripe_attention": "stripe_fwd",
}
HEADER = ["op", "us", "p10", "p90", "over raw op", "over sdpa"]
TINY = {"calls": 2, "rounds": 3}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.host_time", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    gpu = torch.cuda.is_available()
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    p.add_argument("--dtype", choices=("float16", "bfloat16", "float32"),
                   help="default: float16 on cuda, float32 on cpu")  # fmt: skip
    p.add_argument("--calls", type=report.at_least_one, default=50, metavar="N", help="of a batch")
    p.add_argument(
        "--rounds", type=report.at_least_one, default=100, metavar="N", help="batches of each op"
    )
    p.add_argument("--without", default="", metavar="NAMES", help="peers to leave out: fa3")
    p.add_argument("--tiny", action="store_true", help="few calls, to try it")
    report.add_options(p, RESULTS)
    return p


def block_mask(device: str) -> BlockMask:
    """Three of the four blocks, for all heads."""
    blocks = torch.tensor([[True, False], [True, True]], device=device)
    return BlockMask.from_blocks(blocks[None, None], TOKENS, TOKENS, BLOCK, BLOCK)


def stripe_mask(device: str) -> StripeMask:
    """Every other key, for all heads and groups of queries."""
    seen = torch.arange(TOKENS, device=device) % 2 == 0
    return StripeMask.from_columns(seen.expand(1, 1, TOKENS // BLOCK, -1), TOKENS, BLOCK)


def ours(q, k, v) -> dict[str, timing.Op]:
    """A call of each raw op and of each public function that ends in it."""
    raw, device = torch.ops.sparse_fmha, q.device.type
    blocks, stripes = block_mask(device), stripe_mask(device)
    block_lists = (blocks.counts, blocks.indices, None, None, None, BLOCK, BLOCK)
    columns = (stripes.columns, stripes.counts, None, None, BLOCK)
    fmha, neighborhood = raw.fmha_fwd, raw.neighborhood_fwd
    block_sparse, stripe = raw.block_sparse_fwd, raw.stripe_fwd
    on_grid = [x.view(1, *GRID, HEADS, DIM) for x in (q, k, v)]
    window, ones, never = list(WINDOW), [1, 1], [0, 0]
    return {
        "fmha_fwd": lambda: fmha(q, k, v),
        "attention": lambda: sparse_fmha.attention(q, k, v),
        "neighborhood_fwd": lambda: neighborhood(*on_grid, window, ones, ones, never),
        "neighborhood_attention": lambda: sparse_fmha.neighborhood_attention(*on_grid, WINDOW),
        "block_sparse_fwd": lambda: block_sparse(q, k, v, *block_lists),
        "block_sparse_attention": lambda: sparse_fmha.block_sparse_attention(q, k, v, blocks),
        "stripe_fwd": lambda: stripe(q, k, v, *columns),
        "stripe_attention": lambda: sparse_fmha.stripe_attention(q, k, v, stripes),
    }


def calls(
    device: str, dtype: str, seed: int, without: str = ""
) -> tuple[dict[str, timing.Op], dict[str, str]]:
    """The calls by name, and why a peer has none."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = 1, TOKENS, HEADS, DIM
    q, k, v = (
        torch.randn(shape, device=device, dtype=getattr(torch, dtype), generator=generator)
        for _ in range(3)
    )
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    found = {SDPA: lambda: scaled_dot_product_attention(*heads_first)}
    skipped = {}
    case = Case("host_time", device, dtype, *shape[:2], HEADS, HEADS, DIM)
    try:
        if "fa3" in without.split(","):
            raise UnavailableError("left out by --without")
        if device == "cpu":
            raise UnavailableError("runs on GPUs only")
        found["fa3"] = fa3(case, q, k, v)
    except UnavailableError as problem:
        skipped["fa3"] = str(problem)
    return found | ours(q, k, v), skipped


def compared(rows: list[dict]) -> list[tuple[float | None, float | None]]:
    """Of each row the median relative to that of the raw op, and to that of torch's sdpa."""
    ms = {row["op"]: row["ms"]["median"] for row in rows}
    return [
        (
            ms[op] / ms[RAW[op]] if op in RAW else None,
            ms[op] / ms[SDPA] if op != SDPA else None,
        )
        for op in ms
    ]


def table(rows: list[dict]) -> str:
    lines = []
    for row, ratios in zip(rows, compared(rows), strict=True):
        us = (f"{1e3 * row['ms'][x]:.1f}" for x in ("median", "p10", "p90"))
        lines.append([row["op"], *us, *("" if r is None else f"{r:.2f}x" for r in ratios)])
    return report.plain_table(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no GPU; --device cpu times whole calls")
    for name in TINY if args.tiny else ():
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name} is of --tiny's own choice")
    vars(args).update(TINY if args.tiny else {})
    dtype = args.dtype or ("float16" if args.device == "cuda" else "float32")
    ops, skipped = calls(args.device, dtype, args.seed, args.without)
    counts = {"calls": args.calls, "rounds": args.rounds, "warmup": 1, "seed": args.seed}
    times = timing.measure_host(ops, device=args.device, **counts)
    results = environment.results(
        args.device,
        settings={**counts, "dtype": dtype, "tokens": TOKENS, "heads": HEADS, "head_dim": DIM},
        rows=[{"op": name, "ms": asdict(ms)} for name, ms in times.items()],
        skipped=skipped,
    )
    print(table(results["rows"]))
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    report.keep(results, report.out_of(args, RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
