"""A model of time and bytes of each rank: arithmetic from a run of benchmarks.studies.scaling.

    python -m benchmarks.studies.scaling_model           # the tables of docs/distributed.md
    python -m benchmarks.studies.scaling_model --write   # writes them there
    python -m benchmarks.studies.scaling_model --check   # beside the times of that run

Rates of computing are those of one GPU, rates of the links those of the calls that compute nothing.
What no run has measured is an assumption: the network between hosts, and that messages and
computing do not slow each other down. One layer, batch 1, forward.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import report
from sparse_fmha.cli import one_line_errors

HOST = 8  # GPUs of a host
NETWORK = 40e9  # bytes per second of a GPU to other hosts, an assumption: 0.8 of 400 Gb/s
MEMORY = 2.7e12  # bytes per second, an assumption: 0.8 of an H100's
STEPS = 8  # of pass_kv, at most
HEADS, HEADS_KV, HEAD_DIM, ITEM = 32, 8, 128, 2
LENGTHS = (1 << 20, 10 << 20)
RANKS = (8, 16, 64, 512)
PAIRS = {"full": 1.0, "causal": 0.5, "block_sparse": 0.1}
TITLES = {"full": "dense", "causal": "causal", "block_sparse": "lists of 10% of the blocks"}
WAYS = ("ulysses", "pass_kv", "two_levels")
MEASURED = ("one rank", "ulysses", "all_gather_kv", "zigzag")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
BEGIN = "<!-- calculated numbers: written by python -m benchmarks.studies.scaling_model --write -->"
END = "<!-- end of calculated numbers -->"


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one GPU for each op, and bytes per second between two GPUs of a host."""

    flops: dict[str, float]
    all_to_all: float
    keys: float

    @staticmethod
    def of(rows: list[dict]) -> Rates:
        flops, moved = {}, {}
        for row in rows:
            if row["ranks"] == 1:
                flops[row["op"]] = row["useful_flops"] / row["ms"]["median"] * 1e3
            elif row["op"] == "full":
                moved[row["way"]] = row["sent_bytes"] / row["communication_ms"]["median"] * 1e3
        return Rates(flops, moved["ulysses"], moved["all_gather_kv"])


@dataclass(frozen=True)
class Cost:
    """Of one rank: seconds of computing alone and in all, bytes to its host and to others."""

    computing: float
    seconds: float
    within: float
    across: float


def of_ulysses(ranks: int, tokens: float) -> float:
    """Bytes that a rank with so many tokens sends."""
    moved = 2 * HEADS + 2 * max(HEADS_KV, ranks)
    return moved * (ranks - 1) / ranks * tokens * HEAD_DIM * ITEM


def of_keys(ranks: int, tokens: float, heads: int) -> float:
    """Bytes of keys that a rank sends, if all other ranks need all of them."""
    return 2 * heads * (ranks - 1) * tokens * HEAD_DIM * ITEM


def in_steps(computing: float, moving: float, ranks: int, rows: float) -> float:
    """Seconds of pass_kv: a step's keys travel while those of the step before are used."""
    steps = min(STEPS, ranks - 1)
    if not steps:
        return computing
    own, step = computing / ranks, computing * (ranks - 1) / ranks / steps
    message = moving / steps
    # Reads the step's result, writes it in fp32, reads both and writes their mean.
    merging = steps * rows * HEAD_DIM * (ITEM + 4 * 4) / MEMORY
    return max(own, message) + (steps - 1) * max(step, message) + step + merging


def cost(way: str, op: str, length: int, ranks: int, rates: Rates) -> Cost | None:
    """What a rank needs; None where heads do not divide."""
    tokens = length / ranks
    flops = 4.0 * HEADS * HEAD_DIM * PAIRS[op] * length * length / ranks
    computing = flops / rates.flops[op]
    hosts, inner = max(ranks // HOST, 1), min(HOST, ranks)
    if way == "ulysses":
        if HEADS % ranks:
            return None
        sent = of_ulysses(ranks, tokens)
        across = sent * (ranks - inner) / (ranks - 1)
        moving = max((sent - across) / rates.all_to_all, across / NETWORK)
        return Cost(computing, computing + moving, sent - across, across)
    if way == "pass_kv":
        sent = of_keys(ranks, tokens, HEADS_KV)
        across = sent * (ranks - inner) / (ranks - 1)
        moving = max((sent - across) / rates.keys, across / NETWORK)
        seconds = in_steps(computing, moving, ranks, tokens * HEADS)
        return Cost(computing, seconds, sent - across, across)
    within = of_ulysses(inner, tokens)
    across = of_keys(hosts, tokens * inner, max(HEADS_KV // inner, 1))
    passed = in_steps(computing, across / NETWORK, hosts, tokens * HEADS)
    return Cost(computing, passed + within / rates.all_to_all, within, across)


def tables(rates: Rates) -> list[str]:
    """Lines of Markdown: one table for each op."""
    lines = []
    for op, title in TITLES.items():
        lines += [
            f"{title[0].upper()}{title[1:]}, {rates.flops[op] * 1e-12:.0f} TFLOP/s on a GPU:", "",
            "| tokens | GPUs | computing | " + " | ".join(f"`{way}`" for way in WAYS) + " |",
            "| --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for length in LENGTHS:
            for ranks in RANKS:
                found = [cost(way, op, length, ranks, rates) for way in WAYS]
                computing = next(one.computing for one in found if one)
                cells = [
                    "heads do not divide" if one is None
                    else f"{seconds(one.seconds)}, {one.computing / one.seconds:.0%}; "
                    f"{one.within * 1e-9:.2f} + {one.across * 1e-9:.2f} GB"
                    for one in found
                ]  # fmt: skip
                name = f"{length >> 20}M"
                cells = [name, str(ranks), seconds(computing), *cells]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def checks(rows: list[dict]) -> list[tuple[str, str, float, float]]:
    """op, way, milliseconds of the model and of the run, where nothing overlaps."""
    rates, found = Rates.of(rows), []
    alone = {row["op"]: row["ms"]["median"] for row in rows if row["ranks"] == 1}
    for row in rows:
        if row["ranks"] > 1 and (row["op"], row["way"]) != ("causal", "all_gather_kv"):
            rate = rates.all_to_all if row["way"] == "ulysses" else rates.keys
            model = alone[row["op"]] / row["ranks"] + row["sent_bytes"] / rate * 1e3
            found.append((row["op"], row["way"], model, row["ms"]["median"]))
    return found


def newest() -> list[dict]:
    """The rows of the newest run in the repository, forward and without overlap."""
    run = report.newest(report.RESULTS / "scaling")
    if run is None:
        sys.exit(f"error: no run of benchmarks.studies.scaling in {report.RESULTS / 'scaling'}")
    return [row for row in run["rows"] if row["way"] in MEASURED and row["op"] in PAIRS]


def written(page: str, lines: list[str]) -> str:
    """The page with the tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, END]) + after


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.scaling_model", description=__doc__.partition("\n")[0]
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the run it is made from")
    what.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    args = p.parse_args(argv)
    rows = newest()
    if args.write:
        PAGE.write_text(written(PAGE.read_text(), tables(Rates.of(rows))))
        return 0
    if not args.check:
        print("\n".join(tables(Rates.of(rows))))
        return 0
    lines = [
        [op, way, f"{model:.1f}", f"{measured:.1f}", f"{model / measured - 1:+.1%}"]
        for op, way, model, measured in checks(rows)
    ]
    print(report.plain_table(["op", "way", "model, ms", "measured, ms", "difference"], lines))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
