"""Whether calibrated thresholds skip what was asked for, and what the order of key tiles decides.

    python -m benchmarks.studies.calibrate [--tiny] [--out PATH]

Thresholds are fitted on drawn inputs (`decaying`) of several lengths and tried, by the kernel's own
count, on others. Then, tile by tile in torch: how many tiles the same threshold skips where tiles
are visited from the last key to the first, as the kernels do, and in two other orders, and how much
of the probability the skipped tiles had.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.harness import environment, report
from sparse_fmha.calibration import GROUP, TILE_K, Calibration
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "calibration"
SPARSITIES = (0.25, 0.5, 0.75)
SINKS = 4  # keys that every query sees well
SINK, NOISE = 14.0, 1.5  # natural-log units; the second is a standard deviation
NEAR = (10.0, 20.0)  # scores of a query's own key, in the first and in the last head of k
SAMPLED = 24  # groups of queries whose tiles are put in other orders
SIZES = {
    "full": dict(
        heads=16, heads_kv=4, dim=128, lengths=(4096, 8192, 16384, 32768, 65536), ordered=16384
    ),
    "tiny": dict(heads=2, heads_kv=2, dim=128, lengths=(1024, 2048), ordered=2048),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.calibrate", description=__doc__)
    p.add_argument("--tiny", action="store_true", help="small problems, also without a GPU")
    report.add_options(p, RESULTS)
    return p


def decaying(size: dict, length: int, device: str, dtype, seed: int) -> tuple[Tensor, Tensor]:
    """q `[1, length, heads, D]` and k whose scores fall with the logarithm of the distance.

    Three quarters of a head turn with the position, as rotary embeddings do, with wave lengths from
    8 tokens to four times the length; so scores are `NEAR` at the query itself and fall about as
    the logarithm of the distance. Along one direction of the rest the first keys have `SINK` with
    every query. The rest is noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    heads, heads_kv, dim = size["heads"], size["heads_kv"], size["dim"]
    turning, root = dim * 3 // 4, dim**0.5
    q, k = (
        torch.randn(1, length, h, dim, device=device, generator=generator) * NOISE**0.5
        for h in (heads, heads_kv)
    )
    q[..., :turning] *= 0.1
    k[..., :turning] *= 0.1
    longest = math.log2(4 * length)
    waves = 2 * math.pi * torch.logspace(-3, -longest, turning // 2, base=2, device=device)
    angles = torch.arange(length, device=device)[:, None] * waves
    circle = torch.cat([angles.cos(), angles.sin()], -1)[:, None]
    near = torch.linspace(*NEAR, heads_kv, device=device)[:, None]
    amplitude = (near * root / (turning // 2)).sqrt()
    k[..., :turning] += amplitude * circle
    q[..., :turning] += amplitude.repeat_interleave(heads // heads_kv, 0) * circle
    q[..., -1] = root
    k[..., -1] = 0
    k[:, :SINKS, :, -1] = SINK
    return q.to(dtype), k.to(dtype)


def reached(size: dict, device: str, dtype, seed: int) -> list[dict]:
    """For each length and sparsity the threshold, and what it skips of inputs not seen before."""
    calibration = Calibration()
    for length in size["lengths"]:
        calibration.add(*decaying(size, length, device, dtype, seed), causal=True)
    rows = []
    for length in size["lengths"]:
        q, k = decaying(size, length, device, dtype, seed + 1)
        for wanted in SPARSITIES:
            row = {"length": length, "wanted": wanted}
            for law, gamma in (("gamma 1", 1.0), ("gamma fitted", None)):
                threshold = calibration.threshold_for(wanted, length, gamma=gamma)
                _, stats = sparse_fmha.attention(
                    q, k, k, causal=True, skip_threshold=threshold, return_stats=True
                )
                share = int(stats.skipped.sum()) / int(stats.visited.sum())
                row[law] = {"threshold": threshold, "skipped": share}
            rows.append(row)
    return rows


def orders(tiles: int, device: str) -> dict[str, Tensor]:
    ascending = torch.arange(tiles, device=device)
    return {
        "last to first": ascending.flip(0),
        "first to last": ascending,
        "the first, then last to first": torch.cat([ascending[:1], ascending[1:].flip(0)]),
    }


def by_order(size: dict, device: str, dtype, seed: int, thresholds: list[float]) -> list[dict]:
    """Tiles skipped and the probability lost with them, of groups from all over the input."""
    length, heads = size["ordered"], size["heads"]
    q, k = decaying(size, length, device, dtype, seed + 1)
    k = k[0].float().repeat_interleave(heads // size["heads_kv"], 1)  # [L, H, D]
    tiles = -(-length // TILE_K)
    sums = {(t, name): [0, 0, 0.0] for t in thresholds for name in orders(tiles, device)}
    keys = torch.arange(length, device=device)
    firsts = torch.linspace(0, length // GROUP - 1, SAMPLED, device="cpu").long().unique() * GROUP
    for first in firsts.tolist():
        rows = slice(first, first + GROUP)
        scores = torch.einsum("ihd,jhd->hij", q[0, rows].float(), k) * size["dim"] ** -0.5
        scores.masked_fill_(keys > keys[rows, None], -torch.inf)
        padded = torch.nn.functional.pad(scores, (0, -length % TILE_K), value=-torch.inf)
        padded = padded.unflatten(-1, (-1, TILE_K))
        top = padded.amax(-1)  # [H, rows, tiles]
        mass = (padded - padded.amax((-2, -1), keepdim=True)).exp().sum(-1)
        mass /= mass.sum(-1, keepdim=True)
        for name, order in orders(tiles, device).items():
            margin, seen = margins(top[..., order])
            for threshold in thresholds:
                skipped = seen & (margin < math.log(threshold))
                lost = (mass[..., order] * skipped[:, None]).sum(-1).mean()
                sums[threshold, name][0] += int(skipped.sum())
                sums[threshold, name][1] += int(seen.sum())
                sums[threshold, name][2] += lost.item() / len(firsts)
    return [
        {"threshold": t, "order": name, "skipped": skipped / seen, "lost": lost}
        for (t, name), (skipped, seen, lost) in sums.items()
    ]


def margins(top: Tensor) -> tuple[Tensor, Tensor]:
    """Of the largest scores `[H, rows, tiles]` in the order of the visits: the largest `mt - m` of
    a group's rows, and whether any row sees a key. A first key that a row sees is never skipped."""
    before = torch.full_like(top, -torch.inf)
    before[..., 1:] = top.cummax(-1).values[..., :-1]
    margin = torch.where(top == -torch.inf, top, top - before)
    return margin.amax(1), (top > -torch.inf).any(1)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, dtype = environment.of_study(args.tiny)
    size = SIZES["tiny" if args.tiny else "full"]
    rows = reached(size, device, dtype, args.seed)
    at = [row["gamma fitted"]["threshold"] for row in rows if row["length"] == size["ordered"]]
    results = environment.results(
        device,
        settings={"seed": args.seed, "causal": True, **size},
        reached=rows,
        orders=by_order(size, device, dtype, args.seed, at),
    )
    lines = [
        [str(row["length"]), f"{row['wanted']:.0%}"]
        + [f(row[law]) for law in ("gamma 1", "gamma fitted") for f in (_threshold, _skipped)]
        for row in rows
    ]
    header = ["keys", "wanted", "lambda", "skipped", "lambda, gamma fitted", "skipped"]
    print(report.plain_table(header, lines))
    lines = [
        [_threshold(r), r["order"], _skipped(r), f"{r['lost']:.2%}"] for r in results["orders"]
    ]
    print(
        report.plain_table(["lambda", "order of key tiles", "skipped", "probability lost"], lines)
    )
    report.keep(results, report.out_of(args, RESULTS))
    return 0


def _threshold(entry: dict) -> str:
    return f"{entry['threshold']:.2e}"


def _skipped(entry: dict) -> str:
    return f"{entry['skipped']:.1%}"


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
