"""The table of the cases with block lists."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, OURS
from benchmarks.tables.markdown import lines_of, measured, source
from benchmarks.tables.rates import by_op, percent_of_dense, share_of_dense, target

PEERS = {
    "over FlashAttention-3 dense": "fa3" + DENSE,
    "over FlexAttention": "flex",
    "over fastvideo-kernel": "vsa",
}


COLUMNS = (
    *("case", "blocks", "listed", "ms", "of our dense time", "of our dense rate", "target"),
    *PEERS,
)


def caption(results: dict) -> str:
    dtypes = ", ".join(dict.fromkeys(case["shape"]["dtype"] for case in results["cases"]))
    return (
        f"Block-sparse attention, {dtypes}, whole ops. The time of `select` is that of making the "
        f"mask, from q and k to the lists. {source(results)}. Times are the {measured(results)}. "
        "The rate counts the listed blocks and is relative to our dense kernel on the same tokens "
        "in the same run: at 100% the time is the dense time multiplied by the listed share. Lists "
        "are random and differ between heads. In `heavy` a tenth of the rows holds half of the "
        "blocks; in `partial` a bitmask shows half of the pairs of each listed block."
    )


def row_of(case: dict, cases: list[dict], l2: str) -> dict[str, str]:
    """What is known of a case, by column."""
    s, runs = case["shape"], by_op(case, l2)
    lists, ms = s["lists"], runs[OURS]["ms"]["median"]
    row = {
        "case": case["name"],
        "blocks": f"{lists['block_q']}x{lists['block_kv']} of {s['length']} tokens, "
        f"{s['heads_q']} heads, D={s['head_dim']}",
        "listed": f"{100 * lists['density']:.3g}%",
        "ms": f"{ms:.3g}",
    }
    if share := share_of_dense(runs):
        row["of our dense time"] = f"{share:.1f}%"
    if percent := percent_of_dense(runs):
        row["of our dense rate"] = f"{percent:.0f}%"
    if text := target(case, cases, l2):
        row["target"] = text
    for column, op in PEERS.items():
        if op in runs and lists["kind"] != "selected":
            row[column] = f"{runs[op]['ms']['median'] / ms:.2f}x"
    return row


def table(results: dict) -> str:
    cases, l2 = results["cases"], results["settings"]["l2"][0]
    rows = [row_of(case, cases, l2) for case in cases]
    return lines_of(caption(results), COLUMNS, rows)
