"""Dense and causal attention of small and middle sizes, ours beside cuDNN and FlashAttention-3.

    python -m benchmarks.studies.small [--only GLOB] [--rows] [--tiny] [--out PATH]

Every op is a CUDA graph of 20 calls (fewer of long ones), so that no time of the host is in it; the
caches are as the calls leave them. Cases are DIM/dense or causal/BATCHxTOKENS with 16 heads, and a
few of vision transformers. The table has the case first that is worst beside the best peer. --rows
also forces each kernel that a call chooses among.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase

import torch

from benchmarks.cases.case import Case
from benchmarks.harness import environment, report, timing
from benchmarks.harness.names import OURS, UnavailableError
from benchmarks.harness.query_tile import query_tile
from benchmarks.peers import registry
from sparse_fmha import _C
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "small"
HEADER = ["case", "of the best peer", "us", "peers, us", "query tile", "others, us"]
PEERS = {"cuda": ("cudnn", "fa3"), "cpu": ("torch",)}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 4, 16, 64)
MOST_TOKENS = 64 * 1024  # of a case: beyond, all is as at the large sizes
CALLS = 20  # in a graph, fewer where they would take longer than GRAPH_US
GRAPH_US = 3000
TILES = (64, 128, 192)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.small", description=__doc__)
    report.add_op_options(p, RESULTS, iterations=9)
    p.add_argument("--only", default="*", metavar="GLOB", help="cases whose name matches")
    p.add_argument("--rows", action="store_true", help="also force each kernel")
    return p


def cases(tiny: bool) -> list[Case]:
    found = []

    def add(
        dim: int, causal: bool, batch: int, length: int, heads: int = 16, end: str = ""
    ) -> None:
        kind = "causal" if causal else "dense"
        name = f"small/d{dim}/{kind}/{batch}x{length}{end}"
        found.append(Case(name, "cuda", "bfloat16", batch, length, heads, heads, dim, causal))

    if tiny:
        add(64, False, 2, 40, heads=2)
        add(64, True, 2, 40, heads=2)
        return found
    for dim in (64, 128):
        for causal in (False, True):
            for batch in BATCHES:
                for length in LENGTHS:
                    if batch * length <= MOST_TOKENS:
                        add(dim, causal, batch, length)
    add(64, False, 64, 197, heads=12, end="-vit")
    add(64, False, 64, 197, heads=3, end="-vit-tiny")
    add(64, False, 8, 577, end="-vit-384")
    return found


class Forced:
    """The op, with its query tile set while it is captured."""

    def __init__(self, op: Callable[[], object], tile_q: int) -> None:
        self._op, self._tile_q = op, tile_q

    def __call__(self) -> object:
        before = _C.set_tile_q_override(self._tile_q)
        try:
            return self._op()
        finally:
            _C.set_tile_q_override(before)


def measure(case: Case, args, device: str, dtype) -> dict:
    rng = torch.Generator(device).manual_seed(args.seed)
    shape = (case.batch, case.length, case.heads_q, case.head_dim)
    q, k, v = (torch.randn(shape, generator=rng, device=device).to(dtype) for _ in range(3))
    us = 10 + case.useful_flops / 4e8  # about, on a Hopper GPU
    calls = max(min(CALLS, round(GRAPH_US / us)), 1) if device == "cuda" else 1
    ours = registry.sparse_fmha(case, q, k, v)
    ops: dict[str, Callable[[], object]] = {OURS: ours}
    skipped = {}
    for name in PEERS[device]:
        try:
            ops[name] = registry.PEERS[device][name](case, q, k, v)
        except UnavailableError as why:
            skipped[name] = str(why)
    if args.rows:
        ops |= {f"q{tile}": Forced(ours, tile) for tile in TILES}
    graphs = {
        name: timing.Replay(op, calls) if device == "cuda" else op for name, op in ops.items()
    }
    times = timing.measure(
        graphs, device=device, l2="warm", iterations=args.iterations, warmup=1, seed=args.seed
    )
    ms = {
        name: {key: x if key == "samples" else x / calls for key, x in asdict(spread).items()}
        for name, spread in times.items()
    }
    peers = [ms[name]["median"] for name in PEERS[device] if name in ms]
    instances = case.batch * case.heads_q
    tile = query_tile(bool(case.causal), case.head_dim, instances, case.length)
    ratio = min(peers) / ms[OURS]["median"] if peers else None
    return {
        "case": case.name, "calls": calls, "tile_q": tile, "ms": ms, "skipped": skipped,
        "of_best_peer": ratio,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    def us(row: dict, name: str) -> str:
        return f"{1e3 * row['ms'][name]['median']:.1f}"

    lines = []
    for row in sorted(rows, key=lambda row: row["of_best_peer"] or 0):
        peers = [name for names in PEERS.values() for name in names if name in row["ms"]]
        others = [name for name in row["ms"] if name not in (OURS, *peers)]
        lines.append([
            row["case"], "-" if row["of_best_peer"] is None else f"{row['of_best_peer']:.2f}",
            us(row, OURS), " ".join(f"{name} {us(row, name)}" for name in peers),
            str(row["tile_q"]), " ".join(f"{name} {us(row, name)}" for name in others),
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, dtype = environment.of_study(args.tiny)
    chosen = [case for case in cases(args.tiny) if fnmatchcase(case.name, args.only)]
    if not chosen:
        sys.exit(f"error: --only {args.only}: no case has such a name")
    random.Random(args.seed).shuffle(chosen)  # the clock drifts
    results = environment.results(
        device,
        settings={"iterations": args.iterations, "seed": args.seed, "calls": CALLS},
        rows=[],
    )
    for case in chosen:
        results["rows"].append(measure(case, args, device, dtype))
        print(table(results["rows"][-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(results["rows"]))
    report.keep(results, report.out_of(args, RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
