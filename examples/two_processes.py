"""A sequence that is sharded over two processes, against one process. Needs no GPU.

    python examples/two_processes.py [--length 1024]

Each process has half of the tokens. The differences are those of rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparse_fmha
from sparse_fmha import BlockGrid, BlockMask
from sparse_fmha.cli import one_line_errors

with one_line_errors():
    import sparse_fmha.distributed as sd

RANKS = 2
HEADS, HEADS_KV, HEAD_DIM = 8, 2, 64
BLOCK = 64


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of both together")
    return p


def best_blocks(q: torch.Tensor, k: torch.Tensor) -> BlockMask:
    """For each block of queries the two key blocks with the best pooled scores, and its own."""
    grid = BlockGrid.of(q, k, BLOCK, BLOCK, causal=True)
    scores = sparse_fmha.selection.block_scores(q, k, grid)
    return grid.mask(sparse_fmha.selection.top_k_blocks(scores, 2) | grid.diagonal())


def work(rank: int, length: int, init: str) -> None:
    """What each process does; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    generator = torch.Generator("cpu").manual_seed(0)  # the same tensors on every rank
    q, k, v = (
        torch.randn(1, length, heads, HEAD_DIM, generator=generator, device="cpu")
        for heads in (HEADS, HEADS_KV, HEADS_KV)
    )
    sparse = sparse_fmha.block_sparse_attention(q, k, v, best_blocks(q, k))
    dense = sparse_fmha.attention(q, k, v, causal=True)

    # In the order of the sequence: rank 0 has the first half.
    mine = [x.chunk(RANKS, 1)[rank] for x in (q, k, v)]
    results = {
        "ulysses, causal": (sd.ulysses(*mine, causal=True), dense),
        "ulysses, block-sparse": (sd.ulysses(*mine, mask=best_blocks), sparse),
        "all_gather_kv, causal": (sd.all_gather_kv(*mine, causal=True), dense),
        "pass_kv, causal": (sd.pass_kv(*mine, causal=True), dense),
    }
    errors = {
        name: (out - expected.chunk(RANKS, 1)[rank]).abs().max()
        for name, (out, expected) in results.items()
    }
    # In the zig-zag order: rank 0 has the first and the last quarter, and as much to do as rank 1.
    mine = [sd.zigzag_shard(x) for x in (q, k, v)]
    for name, mask, expected in (("causal", None, dense), ("block-sparse", best_blocks, sparse)):
        out = sd.all_gather_kv(*mine, mask=mask, causal=True, zigzag=True)
        errors[f"all_gather_kv, {name}, zig-zag"] = (sd.zigzag_unshard(out) - expected).abs().max()

    worst = torch.stack(list(errors.values()))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{RANKS} processes, {length} tokens, {HEADS} heads to {HEADS_KV}; largest error")
        for name, error in zip(errors, worst.tolist(), strict=True):
            print(f"  {name:<40} {error:.1e}")
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    unit = 2 * RANKS * BLOCK
    if args.length < unit or args.length % unit:
        raise ValueError(f"--length must be a multiple of {unit}, got {args.length}")
    with tempfile.TemporaryDirectory() as folder:
        init = (Path(folder) / "init").as_uri()
        mp.spawn(work, (args.length, init), nprocs=RANKS)
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
