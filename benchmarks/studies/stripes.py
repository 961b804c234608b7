"""Stripe attention beside block lists of as many keys, and AnchorAttention from end to end.

    python -m benchmarks.studies.stripes [--tiny] [--out PATH]

Rates: all queries of a head group see as many keys, as lone columns drawn at random, as runs of 128
keys at any offset, or through block lists: contiguous blocks, and blocks drawn at random. Queries
and keys of AnchorAttention have a structure that is known (`planted`), of which also follows which
blocks of 128 x 128 a block mask has to list to see the same keys.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch

import sparse_fmha
from benchmarks.cases.stripes import (
    BLOCK,
    SIZES,
    STRIPES,
    attend,
    blocks_with,
    error,
    masks,
    planted,
    tensors,
)
from benchmarks.harness import report, study, timing
from sparse_fmha.cli import one_line_errors
from sparse_fmha.patterns import anchor

RESULTS = report.RESULTS / "stripes"
HEADER = ["case", "op", "ms", "p10", "p90", "TFLOP/s", "of block lists", "error"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.stripes", description=__doc__)
    report.add_op_options(p, RESULTS)
    return p


def rates(size: dict, keys: int, args, device: str, dtype) -> list[dict]:
    generator = torch.Generator(device).manual_seed(args.seed)
    q, k, v = tensors(size, device, dtype, generator)
    ops, errors = {}, {}
    for name, mask in masks(size, keys, device, generator).items():
        ops[name] = lambda mask=mask: attend(q, k, v, mask)
        errors[name] = error(ops[name](), mask, q, k, v)
    flops = 4 * size["heads"] * size["dim"] * size["length"] * keys
    return rows_of(f"{keys} keys", ops, dict.fromkeys(ops, flops), errors, args, device)


def rows_of(case: str, ops: dict, flops: dict, errors: dict, args, device: str) -> list[dict]:
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    return [
        {"case": case, "op": name, "ms": asdict(ms), "useful_flops": flops[name],
         "error": errors.get(name)}
        for name, ms in times.items()
    ]  # fmt: skip


def end_to_end(size: dict, args, device: str, dtype) -> tuple[list[dict], dict]:
    q, k, v, distant = planted(size, device, dtype, args.seed)
    mask = blocks_with(distant, size, device)
    result = anchor.anchor_attention(q, k, v, recall=True)
    _, dense_lse = sparse_fmha.attention(q, k, v, causal=True, return_lse=True)
    _, blocks_lse = sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True)
    width = int(result.kept.max())
    scale = size["dim"] ** -0.5

    def identify():
        return anchor.distant_keys(q, k, 12.0, 16, BLOCK, scale, width)

    ops = {
        "dense": lambda: sparse_fmha.attention(q, k, v, causal=True),
        "anchor_attention": lambda: anchor.anchor_attention(q, k, v, width=width).out,
        "its identification": identify,
        "blocks with these keys": lambda: sparse_fmha.block_sparse_attention(q, k, v, mask),
    }
    flops = dict.fromkeys(ops, 2 * size["heads"] * size["dim"] * size["length"] ** 2)
    facts = {
        "recall": result.recall.mean().item(),
        "recall_of_blocks": (blocks_lse - dense_lse).exp().mean().item(),
        "kept": result.kept.float().mean().item(),
        "planted": STRIPES,
        "density_of_blocks": mask.density,
    }
    return rows_of("anchor", ops, flops, {}, args, device), facts


def measure(size: dict, args, device: str, dtype) -> dict:
    found = [row for keys in size["keys"] for row in rates(size, keys, args, device, dtype)]
    rows, facts = end_to_end(size, args, device, dtype)
    print(", ".join(f"{name} {value:.4g}" for name, value in facts.items()))
    return {"rows": found + rows, "anchor": facts}


def table(rows: list[dict]) -> str:
    lines = []
    lists = {row["case"]: row["ms"]["median"] for row in rows if row["op"] == "contiguous blocks"}
    for row in rows:
        ms = row["ms"]
        base = lists.get(row["case"])
        error = row["error"]
        lines.append([
            row["case"], row["op"], *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
            f"{row['useful_flops'] / ms['median'] * 1e-9:.0f}",
            f"{base / ms['median']:.0%}" if base else "", f"{error:.1e}" if error else "",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
