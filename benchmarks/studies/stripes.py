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
from benchmarks.harness import environment, report, timing
from sparse_fmha import BlockMask, StripeMask, reference
from sparse_fmha.cli import one_line_errors
from sparse_fmha.patterns import anchor

RESULTS = report.RESULTS / "stripes"
RUN = 128  # keys
BLOCK = 128
SINKS = 4
STRIPES = 256  # distant keys of each key head that count
HEADER = ["case", "op", "ms", "p10", "p90", "TFLOP/s", "of block lists", "error"]
SIZES = {  # heads of queries and keys, head dim, tokens, rows of a group, keys it sees
    "full": dict(
        heads=32, heads_kv=8, dim=128, length=128 * 1024, rows=2048, keys=(4096, 16384, 65536)
    ),
    "tiny": dict(heads=2, heads_kv=1, dim=128, length=8192, rows=2048, keys=(512,)),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.stripes", description=__doc__)
    p.add_argument("--tiny", action="store_true", help="small problems, also without a GPU")
    p.add_argument("--iterations", type=int, default=7, metavar="N", help="timed calls of each op")
    report.add_options(p, RESULTS)
    return p


def tensors(size: dict, device: str, dtype, generator) -> list[torch.Tensor]:
    shapes = [(1, size["length"], size[h], size["dim"]) for h in ("heads", "heads_kv", "heads_kv")]
    return [torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes]


def draw(size: dict, count: int, below: int, device: str, generator) -> torch.Tensor:
    """int32 `[1, H, groups, count]`, ascending: so many of `below`, others for each group."""
    heads, groups = size["heads"], size["length"] // size["rows"]
    rows = [
        torch.rand(groups, below, device=device, generator=generator).topk(count).indices
        for _ in range(heads)
    ]
    return torch.stack(rows).sort(-1).values.int()[None]


def masks(size: dict, keys: int, device: str, generator) -> dict[str, StripeMask | BlockMask]:
    """By name, masks of as many keys for each query."""
    length, rows = size["length"], size["rows"]
    heads, groups = size["heads"], length // rows

    def full(value: int, n: int = groups) -> torch.Tensor:
        return torch.full((1, heads, n), value, dtype=torch.int32, device=device)

    columns = draw(size, keys, length, device, generator)
    # One run in each piece of two runs' length, at any offset in it: none overlap.
    starts = draw(size, keys // RUN, length // (2 * RUN), device, generator) * (2 * RUN)
    offsets = torch.randint(0, RUN, starts.shape, device=device, generator=generator)
    starts = starts + offsets.int()
    none = columns[..., :0].contiguous()

    def blocks(indices: torch.Tensor) -> BlockMask:
        indices = indices.repeat_interleave(rows // BLOCK, 2).contiguous()
        counts = full(indices.shape[-1], indices.shape[2])
        return BlockMask(counts, indices, length, length, BLOCK, BLOCK)

    first = torch.arange(keys // BLOCK, dtype=torch.int32, device=device)
    return {
        "contiguous blocks": blocks(first.expand(1, heads, groups, -1)),
        "random blocks": blocks(draw(size, keys // BLOCK, length // BLOCK, device, generator)),
        "columns": StripeMask(columns, full(keys), length, length, rows),
        "runs": StripeMask(none, full(0), length, length, rows, starts, full(keys // RUN), RUN),
    }


def error(out: torch.Tensor, mask, q, k, v) -> float:
    """Root mean square of the difference from fp64, relative; a few rows of the last head."""
    rows = torch.linspace(0, q.shape[1] - 1, 7, device=q.device).round().long()
    group = q.shape[2] // k.shape[2]
    seen = torch.zeros(len(rows), k.shape[1], dtype=torch.bool, device="cpu")
    for i, row in enumerate(rows.tolist()):
        if isinstance(mask, StripeMask):
            n = row // mask.block_q
            seen[i, mask.columns[0, -1, n, : mask.counts[0, -1, n]].long().cpu()] = True
            runs = 0 if mask.range_starts is None else int(mask.range_counts[0, -1, n])
            for start in mask.range_starts[0, -1, n, :runs].tolist() if runs else ():
                seen[i, start : start + mask.range_size] = True
        else:
            n = row // mask.block_q
            listed = mask.indices[0, -1, n, : mask.counts[0, -1, n]].long().cpu()
            seen[i].view(-1, mask.block_kv)[listed] = True
    head = [q.shape[2] - 1]
    heads_kv = [head[0] // group]
    exact, _ = reference.attention(
        q[:, rows][:, :, head], k[:, :, heads_kv], v[:, :, heads_kv], seen.to(q.device)
    )
    difference = out[:, rows][:, :, head].double() - exact
    return (difference.norm() / exact.norm()).item()


def rates(size: dict, keys: int, args, device: str, dtype) -> list[dict]:
    generator = torch.Generator(device).manual_seed(args.seed)
    q, k, v = tensors(size, device, dtype, generator)
    ops, errors = {}, {}
    for name, mask in masks(size, keys, device, generator).items():
        attend = (
            sparse_fmha.stripe_attention
            if isinstance(mask, StripeMask)
            else sparse_fmha.block_sparse_attention
        )
        ops[name] = lambda attend=attend, mask=mask: attend(q, k, v, mask)
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


def planted(size: dict, device: str, dtype, seed: int):
    """q, k, v and, for each key head, the distant keys that count.

    Scores, in natural-log units: 16 with the first `SINKS` keys and 12 with `STRIPES` keys at
    random, for every query, along one direction of the first half of the head; and around 12 with
    the nearest keys, as the second half turns with the position (as rotary embeddings do, with wave
    lengths of 25 to 400 tokens). The rest is noise of standard deviation 1.5 and less.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (0.1 * x for x in tensors(size, device, torch.float32, generator))
    v = v * 10
    length, dim, heads_kv = size["length"], size["dim"], size["heads_kv"]
    half, root = dim // 2, dim**0.5
    distant = torch.rand(heads_kv, length, device=device, generator=generator)
    distant = distant.topk(STRIPES).indices.sort(-1).values
    way = torch.nn.functional.normalize(
        torch.randn(heads_kv, half, device=device, generator=generator), dim=-1
    )
    q[..., :half] += root * way.repeat_interleave(size["heads"] // heads_kv, 0)
    for head in range(heads_kv):
        k[0, distant[head], head, :half] += 12 * way[head]
    k[0, :SINKS, :, :half] += 16 * way
    waves = torch.logspace(0, 1, half // 2, base=1 / 16, device=device) / 4
    angles = torch.arange(length, device=device)[:, None] * waves
    turning = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
    amplitude = (12 * root / (half // 2)) ** 0.5
    q[..., half:] += amplitude * turning
    k[..., half:] += amplitude * turning
    return *(x.to(dtype) for x in (q, k, v)), distant


def blocks_with(distant: torch.Tensor, size: dict, device: str) -> BlockMask:
    """Blocks with a key that counts, the first ones, and those near the diagonal."""
    n = size["length"] // BLOCK
    seen = torch.zeros(size["heads_kv"], n, dtype=torch.bool, device=device)
    seen.scatter_(1, distant // BLOCK, True)
    seen[:, 0] = True
    q = torch.arange(n, device=device)[:, None]
    near = (torch.arange(n, device=device) > q - 3).expand(n, n)
    seen = seen.repeat_interleave(size["heads"] // size["heads_kv"], 0)
    blocks = (seen[:, None] | near) & (torch.arange(n, device=device) <= q)
    return BlockMask.from_blocks(
        blocks[None], size["length"], size["length"], BLOCK, BLOCK, causal=True
    )


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
    args = parser().parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU; --tiny runs on the CPU")
    if args.iterations < 1:
        sys.exit("error: --iterations is at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = SIZES["tiny" if args.tiny else "full"]
    results = {
        **report.stamp(),
        **environment.describe(device),
        "settings": {"iterations": args.iterations, "seed": args.seed, "l2": "cold", **size},
        "rows": [],
    }
    for keys in size["keys"]:
        results["rows"] += rates(size, keys, args, device, dtype)
    rows, results["anchor"] = end_to_end(size, args, device, dtype)
    results["rows"] += rows
    print(table(results["rows"]))
    print(", ".join(f"{name} {value:.4g}" for name, value in results["anchor"].items()))
    report.keep(results, args.out or (None if args.tiny else RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
