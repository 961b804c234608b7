"""The table of the cases in which key tiles are skipped."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, OURS
from benchmarks.tables.markdown import lines_of, measured, source
from benchmarks.tables.rates import by_op

COLUMNS = ("case", "tokens, heads", "skipped", "ms", "over our dense", "over FlashAttention-3",
           "target")  # fmt: skip
TARGETS = {10: 1.0, 50: 1.32, 75: 1.65, 90: 1.9}  # times as fast as our dense kernel


def caption(results: dict) -> str:
    return (
        "Attention that skips tiles (BLASST), whole ops, on synthetic inputs. `return_stats` "
        f"counts the skipped share. {source(results)}. Times are the {measured(results)}."
    )


def row_of(case: dict, l2: str) -> dict[str, str]:
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


def table(results: dict) -> str:
    rows = [row_of(case, results["settings"]["l2"][0]) for case in results["cases"]]
    return lines_of(caption(results), COLUMNS, rows)
