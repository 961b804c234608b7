"""What a bias of keys costs: each mechanism with and without it, on the same tensors.

    python -m benchmarks.studies.key_bias [--tiny] [--out PATH]

"padding" hides the last eighth of the keys of every batch entry by -inf and adds nothing to the
others; "bias" adds a number to each key and hides none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

import sparse_fmha
from benchmarks.harness import report, study, timing
from sparse_fmha import BlockMask, StripeMask
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "key_bias"
COLUMNS = ["of the rate without"]
ELEMENTS = 2048  # heads x head dim
SIZES = {
    "full": {"length": 16384, "batch": 2, "dims": (64, 128, 256)},
    "tiny": {"length": 256, "batch": 1, "dims": (64,)},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.key_bias", description=__doc__)
    report.add_op_options(p, RESULTS, iterations=15)
    return p


def calls(length: int, heads: int, device: str, rng: torch.Generator) -> dict[str, Callable]:
    """Each mechanism as a function of q, k, v and options; a quarter of the keys where sparse."""
    blocks = -(-length // 128)
    drawn = torch.rand(1, heads, blocks, blocks, generator=rng, device=device).argsort(-1)
    block_mask = BlockMask.from_blocks(drawn < max(blocks // 4, 1), length, length, 128, 128)
    groups = -(-length // 512)
    drawn = torch.rand(1, heads, groups, length, generator=rng, device=device) < 0.25
    stripe_mask = StripeMask.from_columns(drawn, length, 512)
    lists = sparse_fmha.block_sparse_attention
    stripes = sparse_fmha.stripe_attention
    return {
        "dense": sparse_fmha.attention,
        "causal": partial(sparse_fmha.attention, causal=True),
        "window": partial(sparse_fmha.neighborhood_attention, window=length // 4),
        "blocks": lambda q, k, v, **given: lists(q, k, v, block_mask, **given),
        "stripes": lambda q, k, v, **given: stripes(q, k, v, stripe_mask, **given),
    }


def rows(size: dict, dim: int, args, device: str, dtype) -> list[dict]:
    rng = torch.Generator(device).manual_seed(args.seed)
    batch, length, heads = size["batch"], size["length"], max(ELEMENTS // dim, 1)
    if args.tiny:
        heads = 2
    normal = partial(torch.randn, generator=rng, device=device)
    q, k, v = (normal(batch, length, heads, dim).to(dtype) for _ in range(3))
    padding = torch.arange(length, device=device) >= length - length // 8
    biases = {
        "without": {},
        "bias": {"key_bias": normal(batch, heads, length)},
        "padding": {
            "key_bias": torch.zeros(batch, 1, length, device=device).masked_fill(
                padding, -torch.inf
            )
        },
    }
    found = []
    for name, attend in calls(length, heads, device, rng).items():
        ops = {of: partial(attend, q, k, v, **given) for of, given in biases.items()}
        times = timing.measure(
            ops, device=device, l2="cold", iterations=args.iterations, warmup=2, seed=args.seed
        )
        base = times["without"].median
        found += [
            {"case": f"d{dim}/{name}", "op": of, "ms": asdict(ms), "rate": base / ms.median}
            for of, ms in times.items()
        ]
    return found


def measure(size: dict, args, device: str, dtype) -> dict:
    return {"rows": [row for dim in size["dims"] for row in rows(size, dim, args, device, dtype)]}


def table(rows: list[dict]) -> str:
    return study.table(COLUMNS, rows, lambda row: [f"{row['rate']:.1%}"])


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
