"""Rates of the kernels for other GPUs: what the study prints, and the table of its newest run."""

from __future__ import annotations

import re

FLASH, FLEX = PEERS = "FlashAttention-2", "FlexAttention"
OWN_DENSE = {"forward": "D128 full 32k", "backward": "D128 full 16k"}
DENSE_NAME = re.compile(r"D\d+ (full|causal) ")

TITLE = "Kernels for other GPUs, on a Hopper GPU"
DEVICE = "cuda"


def columns(arch: str) -> tuple[str, ...]:
    over = (f"{arch} over {peer}" for peer in PEERS)
    return f"{arch}, TFLOP/s", *over, f"{arch}, of its dense rate"


COLUMNS = ("pass", "case", *columns("sm80"), *columns("sm86"), "error")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "The mma.sync kernels of both classes, bfloat16, run on a Hopper GPU beside torch's "
        f"{FLASH} and {FLEX}: no other GPU has run them. {FLEX} has the tokens of grids in tiles, "
        "and its copies into and out of them count. TFLOP/s over visible pairs; the share of the "
        "dense rate is of executed pairs. The error is the larger one of a small problem against "
        "fp64. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rate(row: dict, flops: str) -> float:
    """TFLOP/s."""
    return row[flops] / row["ms"]["median"] * 1e-9


def pass_of(row: dict) -> str:
    return row.get("pass", "forward")  # the first results had one pass


def beside(rows: list[dict]) -> list[tuple[dict, dict[str, float], float | None]]:
    """Each row, its speeds over the peers that ran it, and its share of its own dense rate."""
    by_name = {(pass_of(row), row["case"], row["op"]): row for row in rows}
    found = []
    for row in rows:
        theirs = {peer: by_name.get((pass_of(row), row["case"], peer)) for peer in PEERS}
        own = by_name.get((pass_of(row), OWN_DENSE[pass_of(row)], row["op"]))
        ms = row["ms"]["median"]
        speeds = {peer: other["ms"]["median"] / ms for peer, other in theirs.items() if other}
        share = None
        if own and not DENSE_NAME.match(row["case"]):
            share = rate(row, "executed_flops") / rate(own, "useful_flops")
        found.append((row, speeds, share))
    return found


def rows(results: dict) -> list[dict[str, str]]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    errors: dict[tuple[str, str], float] = {}
    for row, speeds, share in beside(results["rows"]):
        if row["op"] in PEERS:
            continue
        key = pass_of(row), row["case"]
        line = found.setdefault(key, {"pass": key[0], "case": key[1]})
        rate_column, *over, share_column = columns(row["op"])
        line[rate_column] = f"{rate(row, 'useful_flops'):.3g}"
        for peer, column in zip(PEERS, over, strict=True):
            if peer in speeds:
                line[column] = f"{speeds[peer]:.2f}x"
        if share is not None:
            line[share_column] = f"{share:.0%}"
        if row["error"] is not None:
            errors[key] = max(errors.get(key, 0.0), row["error"])
            line["error"] = f"{errors[key]:.1e}"
    return list(found.values())
