"""Decode attention beside its peers, and what a server runs beside it.

    python -m benchmarks.studies.decode [--only GROUP,...] [--peers NAME,...] [--limit SECONDS]

Groups of cases: dense (batch x length), pages (16 and 1), ragged, blocks (lists of 64 keys), select
(Quest's choice of pages and the attention in one call), skip, prefill (packed prompts), chunks (of
prompts whose keys are in pages), grids (packed neighborhoods). Each call is a CUDA graph of the
whole call, replayed after a buffer several times the size of the L2 cache has been read. Only
FlashInfer's plan, made on the host, is not in it. The caches of all cases share their memory. Peers
are torch's SDPA with the cuDNN backend, FlashAttention-3 (package fa3-fwd) and FlashInfer, where
they can be imported; with block lists and skipping they read all keys. Rates count the bytes that
must be read, or operations over visible pairs. R is the fastest of torch's reductions that read one
buffer, and `empty` a call of one element. Errors are against fp64: of the first request, or for
packed tokens at the size that --tiny runs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import decode, packed
from benchmarks.cases.decode import Cache, Call, DecodeCase
from benchmarks.cases.packed import PackedCase
from benchmarks.harness import environment, report, timing
from benchmarks.harness.names import OURS, UnavailableError
from benchmarks.peers import decode as peers
from benchmarks.tables import decode as tables
from sparse_fmha import patterns
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "decode"
GROUPS = ("dense", "pages", "ragged", "blocks", "select", "skip", "prefill", "chunks", "grids")
FLOOR = "floor"  # the group of the read-only streams and of the empty call
READ_BYTES = {"cuda": 6 << 30, "cpu": 1 << 20}
Build = Callable[[], Callable[[], Tensor]]


@dataclass
class Ready:
    """The calls of a case that can run, and why others cannot."""

    device: str
    ops: dict[str, timing.Op] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Build, work: float, peer: bool = False) -> None:
        try:
            self.ops[name] = timing.captured(build(), self.device)
            self.work[name] = work
        except (UnavailableError, NotImplementedError) as reason:
            self.skipped[name] = str(reason)
        except Exception as problem:
            if not peer:
                raise
            self.skipped[name] = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.decode", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--only", type=names(GROUPS), default=list(GROUPS), metavar="GROUP,...")
    p.add_argument("--peers", type=names((*peers.DECODE, "none")), default=list(peers.DECODE),
                   metavar="NAME,...", help="default: all of them; none: ours alone")  # fmt: skip
    p.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS",
                   help="cases are begun before that")  # fmt: skip
    p.add_argument("--memory", type=float, default=40, metavar="GB", help="of the caches, at most")
    report.add_op_options(p, RESULTS)
    return p


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return found

    return parse


def ours(call: Call) -> Build:
    run = sparse_fmha.decode_attention
    return lambda: lambda: run(call.q, call.k, call.v, call.seq_lens, **call.options)


def decode_ops(case: DecodeCase, cache: Cache, wanted: list[str]) -> tuple[Ready, Call, Call]:
    """Ours, the base that it is compared with, and the peers; our call, and that of the peers."""
    ready = Ready(cache.device)
    itemsize = cache.dtype.itemsize
    size = case.read_bytes(itemsize)
    call = whole = cache.call(case)
    if case.group == "blocks":
        call = replace(whole, blocks=cache.lists(case))
    elif case.group == "skip":
        call = cache.shape_scores(case, whole)
        whole = replace(call, threshold=0.0)
    if case.group == "select":
        given = whole.q, cache.bounds(case, whole), whole.seq_lens, whole.page_table

        def choose() -> Call:
            blocks = patterns.quest(*given, budget=(case.listed - 1) * decode.BLOCK or decode.BLOCK)
            return replace(whole, blocks=blocks)

        call = choose()
        ready.add(OURS, lambda: lambda: ours(choose())()(), size)
    else:
        ready.add(OURS, ours(call), size)
    bases = dict.fromkeys(("blocks", "select"), "own, all keys") | {"skip": "own, no threshold"}
    if case.group in bases:
        everything = replace(case, group="dense", sparsity=0).read_bytes(itemsize)
        ready.add(bases[case.group], ours(whole), everything)
    elif case.group == "pages":
        ready.add("own, page 64", ours(cache.call(replace(case, page=64))), size)
        ready.add("own, contiguous", ours(cache.call(replace(case, page=None))), size)
    elif case.group == "ragged":
        mean = sum(case.lengths) // len(case.lengths) // case.page * case.page
        uniform = replace(case, lengths=(mean,) * len(case.lengths))
        ready.add("own, uniform", ours(cache.call(uniform)), uniform.read_bytes(itemsize))
    for name in wanted:
        work = everything if case.group in bases else size
        ready.add(name, lambda name=name: peers.DECODE[name](whole), work, peer=True)
    return ready, call, whole


def packed_ops(
    case: PackedCase, device: str, dtype: torch.dtype, args: argparse.Namespace
) -> Ready:
    ready = Ready(device)
    work = case.flops
    if case.group == "grids":
        q, k, v = packed.draw(case, device, dtype, args.seed)
        run, grids = sparse_fmha.varlen_neighborhood_attention, case.grids
        ready.add(OURS, lambda: lambda: run(q, k, v, grids, case.window), work)
        sizes = [height * width for height, width in grids]
        samples = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        shaped = [
            [x.view(1, *grid, *x.shape[1:]) for x in one]
            for one, grid in zip(samples, grids, strict=True)
        ]
        attend = sparse_fmha.neighborhood_attention
        loop = lambda: [attend(*one, case.window) for one in shaped]  # noqa: E731
        ready.add("own, in a loop", lambda: loop, work)
        return ready
    given = packed.sequences(case, device, dtype, args.seed)
    run, lists = sparse_fmha.varlen_attention, (given.cu_q, given.cu_k, *given.bounds)
    whole = lambda: run(given.q, given.k, given.v, *lists, causal=True)  # noqa: E731
    if case.group == "prefill":
        ready.add(OURS, lambda: whole, work)
        attend, parts = sparse_fmha.attention, given.slices()
        longest = max(parts, key=lambda one: one[0].shape[1])
        dense = replace(case, lengths=(longest[0].shape[1],)).flops
        ready.add("own, the longest", lambda: lambda: attend(*longest, causal=True), dense)
        loop = lambda: [attend(*one, causal=True) for one in parts]  # noqa: E731
        ready.add("own, one call each", lambda: loop, work)
        if "fa3" in args.peers:
            ready.add("fa3", lambda: peers.fa3_packed(given), work, peer=True)
        return ready
    options = {"seqused_k": given.used, "page_table": given.page_table, "causal": True}
    bounds = (given.cu_q, None, *given.bounds)
    ready.add(OURS, lambda: lambda: run(given.q, *given.paged, *bounds, **options), work)
    ready.add("own, contiguous", lambda: whole, work)
    if "fa3" in args.peers:
        ready.add("fa3", lambda: peers.fa3_chunks(given), work, peer=True)
        ready.add("fa3, contiguous", lambda: peers.fa3_packed(given), work, peer=True)
    return ready


def floor_ops(cache: Cache) -> Ready:
    """Ways to read one buffer, and a call of one element."""
    ready = Ready(cache.device)
    rows = READ_BYTES[cache.device] // cache.dtype.itemsize // 4096
    matrix = cache.k[: rows * 4096].view(rows, 4096)
    size = matrix.numel() * matrix.itemsize
    ones, one = matrix.new_ones(4096), matrix.new_ones(1)
    wide = matrix.view(torch.float32)
    ready.add("read, sum", lambda: wide.sum, size)
    ready.add("read, sums of rows", lambda: lambda: wide.sum(1), size)
    ready.add("read, product", lambda: lambda: matrix @ ones, size)
    ready.add("empty", lambda: lambda: one.add_(1), 0)
    return ready


def rows_of(ready: Ready, group: str, case: str, unit: str, args: argparse.Namespace) -> list[dict]:
    if not ready.ops:
        return []
    times = timing.measure(
        ready.ops, device=ready.device, l2="clean", iterations=args.iterations, warmup=1,
        seed=args.seed,
    )  # fmt: skip
    return [
        {"group": group, "case": case, "op": name, "ms": asdict(ms), unit: ready.work[name]}
        for name, ms in times.items()
    ]


def decode_rows(case: DecodeCase, cache: Cache, args: argparse.Namespace) -> tuple[list, dict]:
    ready, call, whole = decode_ops(case, cache, args.peers)
    rows = rows_of(ready, case.group, case.name, "bytes", args)
    for row in rows:
        if not row["op"].startswith(tables.OWN):
            used = call if row["op"] == OURS else whole
            row["error"] = decode.error(used, ready.ops[row["op"]]())
    if OURS in ready.ops and case.group == "skip":
        given = call.q, call.k, call.v, call.seq_lens
        _, stats = sparse_fmha.decode_attention(*given, **call.options, return_stats=True)
        rows[0]["skipped"] = (stats.skipped.sum() / stats.visited.sum()).item()
    return rows, ready.skipped


def packed_rows(
    case: PackedCase, device: str, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[list, dict]:
    ready = packed_ops(case, device, dtype, args)
    rows = rows_of(ready, case.group, case.name, "flops", args)
    if OURS in ready.ops:
        rows[0]["error"] = packed.error(case, device, dtype, args.seed)
    return rows, ready.skipped


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    started = time.monotonic()
    device, dtype = environment.of_study(args.tiny)
    args.peers = [] if "none" in args.peers else args.peers
    cases = [case for case in (*decode.CASES, *packed.CASES) if case.group in args.only]
    sizes = {"iterations": args.iterations, "seed": args.seed, "l2": "clean", "tiny": args.tiny}
    skipped: dict[str, dict[str, str]] = {}
    results = environment.results(device, settings=sizes, rows=[])
    results["skipped"] = skipped
    out = report.out_of(args, RESULTS)
    most = 2 * READ_BYTES[device]
    chosen = []
    for named in cases:
        case = named.tiny() if args.tiny else named
        if isinstance(case, DecodeCase):
            size = case.cache_bytes(dtype.itemsize)
            if size > args.memory * 1e9:
                skipped[case.name] = {OURS: f"the cache takes {size / 1e9:.1f} GB"}
                continue
            most = max(most, size)
        chosen.append(case)
    with torch.no_grad():
        cache = Cache(most, device, dtype, args.seed)
        results["rows"] += rows_of(floor_ops(cache), FLOOR, FLOOR, "bytes", args)
        for case in chosen:
            if time.monotonic() - started > args.limit:
                skipped[case.name] = {OURS: f"more than {args.limit:g} s had passed"}
                continue
            if isinstance(case, DecodeCase):
                rows, reasons = decode_rows(case, cache, args)
            else:
                rows, reasons = packed_rows(case, device, dtype, args)
            results["rows"] += rows
            if reasons:
                skipped[case.name] = reasons
            report.keep_so_far(results, out)
    for line in tables.reasons(skipped):
        print(line)
    report.keep(results, out)
    print(tables.summary(results))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
