"""How long masks take to make, and how much memory, on the CPU.

    python -m benchmarks.studies.builders [--quick] [--case NAME ...] [--out PATH]

Each builder runs once untimed. `seconds` is the median of the calls after it, `cpu_seconds` the
processor time of all threads in that call. `peak_bytes` is the most that torch's CPU allocator had
handed out at a time during one more call, with the mask and without the arguments, from the
allocations that torch's profiler records; `mask_bytes` are those of the mask's tensors. Builders
that look at all pairs of tokens are not run where that would take minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import sparse_fmha
from benchmarks.harness import environment, report
from sparse_fmha import BlockMask, StripeMask, patterns, selection
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "builders"
LENGTHS = {"16k": 1 << 14, "128k": 1 << 17, "1M": 1 << 20}
DIM, BLOCK = 64, 128
DOCUMENT = 1000  # tokens of a document
TENSORS = (
    *("counts", "indices", "partial_counts", "partial_indices", "partial_bits"),
    *("columns", "range_starts", "range_counts"),
)
Build = Callable[[], object]


class Case(NamedTuple):
    """A builder: its arguments are made of the number of tokens, and not measured."""

    prepare: Callable[[int], Build]
    most: str = "1M"  # the longest it is run at
    why: str = ""  # what keeps it from longer ones


def queries_and_keys(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, 1, length, 1, DIM)
    options = {"generator": generator, "device": "cpu", "dtype": torch.bfloat16}
    return tuple(torch.randn(shape, **options))


def starts(length: int) -> Tensor:
    cu = torch.arange(0, length + DOCUMENT, DOCUMENT, dtype=torch.int32, device="cpu")
    return cu.clamp_(max=length)


def of_q_and_k(build: Callable[[Tensor, Tensor], object]) -> Callable[[int], Build]:
    def prepare(length: int) -> Build:
        q, k = queries_and_keys(length)
        return lambda: build(q, k)

    return prepare


def of_grid(build: Callable[[sparse_fmha.BlockGrid], object]) -> Callable[[int], Build]:
    def prepare(length: int) -> Build:
        grid = sparse_fmha.BlockGrid(length, length, BLOCK, BLOCK, causal=True)
        return lambda: build(grid)

    return prepare


def from_blocks(length: int) -> Build:
    grid = sparse_fmha.BlockGrid(length, length, BLOCK, BLOCK, causal=True)
    blocks = grid.sink(64) | grid.local(4096)
    return lambda: grid.mask(blocks)


def from_indices(length: int) -> Build:
    mask = patterns.power_attention(length, length)
    indices = mask.indices.flip(-1).contiguous()
    return lambda: BlockMask.from_indices(None, indices, length, length)


def from_dense(length: int) -> Build:
    visible = patterns.streaming_llm(length, length).to_dense()
    return lambda: BlockMask.from_dense(visible)


def from_mask_mod(length: int) -> Build:
    document = torch.arange(length, device="cpu") // DOCUMENT

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (document[q] == document[k]) & (q >= k)

    return lambda: BlockMask.from_mask_mod(visible, 1, 1, length, length)


def union(length: int) -> Build:
    masks = patterns.streaming_llm(length, length), patterns.power_attention(length, length)
    return lambda: BlockMask.union(*masks)


def image(length: int) -> Tensor:
    side = 1 << (length.bit_length() - 1) // 2
    return patterns.image_regions(side, length // side)


def biformer(length: int) -> Build:
    q, k = queries_and_keys(length)
    layout = patterns.BiFormerLayout(image(length))
    return lambda: patterns.biformer(q, k, layout, top_k=4)


def documents(length: int) -> Build:
    cu = starts(length)
    return lambda: BlockMask.from_documents(cu, BLOCK, BLOCK, True)


def token_top_k_mask(length: int) -> Build:
    generator = torch.Generator("cpu").manual_seed(0)
    scores = torch.randn(1, 1, 1, length, generator=generator, device="cpu", dtype=torch.float32)
    return lambda: patterns.token_top_k_mask(scores, 1000, length, block_q=1024)


def dhsa(length: int) -> Build:
    q, k = queries_and_keys(length)
    boundaries = torch.arange(0, length + 1, 64, device="cpu")[None]
    return lambda: patterns.dhsa(q, k, boundaries, 2048, dense_rows=0, block_q=1024)


def seer(length: int) -> Build:
    q, k = queries_and_keys(length)
    gate = patterns.SeerAttentionGate(1, 1, DIM, gate_dim=DIM, device="cpu", dtype=torch.float32)
    return lambda: gate.mask(q, k, top_k=16)


def top_k_blocks(length: int) -> Build:
    q, k = queries_and_keys(length)
    grid = sparse_fmha.BlockGrid.of(q, k, BLOCK, BLOCK, causal=True)
    return lambda: grid.mask(selection.top_k_blocks(selection.block_scores(q, k, grid), 16), 16)


PAIRS = "all pairs of tokens"
CASES = {
    "streaming_llm": Case(lambda n: lambda: patterns.streaming_llm(n, n)),
    "longformer, a global block": Case(
        lambda n: lambda: patterns.longformer(n, global_tokens=range(BLOCK))
    ),
    "longformer, window": Case(lambda n: lambda: patterns.longformer(n, global_tokens=())),
    "bigbird": Case(lambda n: lambda: patterns.bigbird(n, 1, block=128, block_q=128, block_kv=128)),
    "bigbird, no global block": Case(lambda n: lambda: patterns.bigbird(n, 4, global_blocks=())),
    "s2_attention": Case(lambda n: lambda: patterns.s2_attention(n, n, 1)),
    "moa": Case(lambda n: lambda: patterns.moa(n, n, [0, 1024], [0.01, 0.05])),
    "power_attention": Case(lambda n: lambda: patterns.power_attention(n, n)),
    "BiFormerLayout": Case(lambda n: lambda: patterns.BiFormerLayout(image(n))),
    "biformer": Case(biformer),
    "vertical_slash": Case(of_q_and_k(patterns.vertical_slash)),
    "anchor_attention's near blocks": Case(
        lambda n: lambda: patterns.anchor.anchor_mask(n, BLOCK, 16, torch.device("cpu"))
    ),
    "minference_block_sparse": Case(of_q_and_k(patterns.minference_block_sparse)),
    "flexprefill_query_aware": Case(of_q_and_k(patterns.flexprefill_query_aware)),
    "SeerAttentionGate.mask": Case(seer),
    "token_top_k": Case(of_q_and_k(lambda q, k: patterns.token_top_k(q, k, 1000, block_q=1024))),
    "token_top_k_mask": Case(token_top_k_mask),
    "dhsa": Case(dhsa),
    "dhsa_blocks": Case(of_q_and_k(lambda q, k: patterns.dhsa_blocks(q, k, density=0.01))),
    "hip": Case(of_q_and_k(patterns.hip)),
    "ssa": Case(
        of_q_and_k(lambda q, k: patterns.ssa(q, k, width=256)), "128k", "each token has its scores"
    ),
    "BlockMask.from_documents": Case(documents),
    "BlockMask.from_blocks": Case(from_blocks),
    "BlockMask.from_indices": Case(from_indices),
    "BlockMask.union": Case(union),
    "BlockMask.from_dense": Case(from_dense, "16k", PAIRS),
    "BlockMask.from_mask_mod": Case(from_mask_mod, "16k", PAIRS),
    "BlockGrid.local": Case(of_grid(lambda grid: grid.local(4096))),
    "BlockGrid.tokens": Case(of_grid(lambda grid: grid.tokens(-256))),
    "selection.top_k_blocks": Case(top_k_blocks),
}


def tensor_bytes(made: object) -> int:
    """Of the tensors of what a builder made."""
    if isinstance(made, Tensor):
        return made.nbytes
    if isinstance(made, BlockMask | StripeMask):
        return sum(
            x.nbytes for x in (getattr(made, name, None) for name in TENSORS) if x is not None
        )
    if isinstance(made, patterns.BiFormerLayout):
        return sum(tensor_bytes(each) for each in (made.queries, made.keys))
    return sum(x.nbytes for x in vars(made).values() if isinstance(x, Tensor))


def peak_bytes(build: Build) -> int:
    """The most that torch's CPU allocator had handed out at a time during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = build()
    del made
    live = most = 0
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


def measure(build: Build, calls: int) -> dict:
    made = build()
    size = tensor_bytes(made)
    del made
    times = []
    for _ in range(calls):
        wall, cpu = time.perf_counter(), time.process_time()
        build()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        "seconds": statistics.median(wall for wall, _ in times),
        "cpu_seconds": statistics.median(cpu for _, cpu in times),
        "calls": calls,
        "mask_bytes": size,
        "peak_bytes": peak_bytes(build),
    }


def table(results: dict) -> tuple[list[str], list[list[str]]]:
    header = ["builder", "tokens", "seconds", "CPU seconds", "mask, MB", "peak / mask"]
    rows = []
    for case in results["cases"]:
        ratio = case["peak_bytes"] / case["mask_bytes"]
        seconds = (f"{case[name]:.3f}" for name in ("seconds", "cpu_seconds"))
        rows.append(
            [
                case["name"],
                case["tokens"],
                *seconds,
                f"{case['mask_bytes'] / 1e6:.2f}",
                f"{ratio:.2f}",
            ]
        )
    return header, rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.builders", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--quick", action="store_true", help="16k tokens, one call; nothing is kept"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="only these")
    parser.add_argument(
        "--calls", type=report.at_least_one, metavar="N", help="timed calls of each; default 3"
    )
    parser.add_argument(
        "--out", type=report.out_path, metavar="PATH", help=f"file or folder, not {RESULTS}"
    )
    args = parser.parse_args(arguments)
    if args.calls is not None and args.quick:
        parser.error("--calls is of --quick's own choice")
    calls = 1 if args.quick else 3 if args.calls is None else args.calls
    lengths = ["16k"] if args.quick else list(LENGTHS)
    results = environment.results("cpu", cases=[], not_run={})
    for name in args.case or CASES:
        case = CASES[name]
        for tokens in lengths:
            if LENGTHS[tokens] > LENGTHS[case.most]:
                results["not_run"][f"{name}, {tokens}"] = case.why
                continue
            print(f"{name}, {tokens}", file=sys.stderr)
            made = measure(case.prepare(LENGTHS[tokens]), calls)
            results["cases"].append({"name": name, "tokens": tokens} | made)
    print(report.plain_table(*table(results)))
    for name, why in results["not_run"].items():
        print(f"not run: {name}: {why}")
    report.keep(results, args.out or (None if args.quick else RESULTS))


if __name__ == "__main__":
    with one_line_errors():
        main()
