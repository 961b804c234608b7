"""The README's table of the cases in which key tiles are skipped."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, OURS
from benchmarks.harness.report import by_op

COLUMNS = ("case", "tokens, heads", "skipped", "ms", "over our dense", "over FlashAttention-3",
           "target")  # fmt: skip
TARGETS = {10: 1.0, 50: 1.32, 75: 1.65, 90: 1.9}  # times as fast as our dense kernel


def caption(source: str, measured: str) -> str:
    return (
        "Attention that skips tiles (BLASST), whole ops, on inputs made for it: the share is the "
        f"one counted by `return_stats`. {source}. Times are the {measured}."
    )


def row(case: dict, l2: str) -> dict[str, str]:
    """What is known of a case, by column."""
    s, runs = case["shape"], by_op(case, l2)
    ours, ms = runs[OURS], runs[OURS]["ms"]["median"]
    found = {
        "case": case["name"],
        "tokens, heads": f"{s['length']}, {s['heads_q']}/{s['heads_kv']}"
        + (", causal" if s["causal"] else ""),
        "ms": f"{ms:.3g}",
        "target": f"{TARGETS[s['skip']]:.2f}x" if s["skip"] in TARGETS else "",
    }
    if "skipped_tiles" in ours:
        found["skipped"] = f"{100 * ours['skipped_tiles']:.0f}%"
    for column, op in (("over our dense", OURS + DENSE), ("over FlashAttention-3", "fa3")):
        if op in runs:
            found[column] = f"{runs[op]['ms']['median'] / ms:.2f}x"
    return found
