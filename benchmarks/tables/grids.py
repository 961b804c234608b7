"""The table of the cases on grids."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, OURS
from benchmarks.tables.markdown import lines_of, measured, source
from benchmarks.tables.published import NATTEN_MS
from benchmarks.tables.rates import by_op, number, percent_of_dense, predicted, unit

PEERS = {
    "over FlashAttention-3 dense": "fa3" + DENSE,
    "over cuDNN dense": "cudnn" + DENSE,
    "over FlexAttention": "flex",
    "over FlexAttention in tiles": "flex_tiled",
    "over sliding tile attention": "sta",
}


COLUMNS = (  # of which those are shown that have a number
    *("case", "grid", "window", "stride", "ms", "useful {unit}", "executed {unit}"),
    *("of our dense rate", *PEERS, "NATTEN, ms", "simulated / measured"),
)


def caption(results: dict) -> str:
    name, _ = unit(results)
    dtypes = ", ".join(dict.fromkeys(case["shape"]["dtype"] for case in results["cases"]))
    return (
        f"Neighborhood attention, {dtypes}, whole ops. {source(results)}. Times are the "
        f"{measured(results)}. Useful {name} count the visible pairs. Executed {name} count all "
        "pairs of the computed tiles; the share of our dense rate is of these, on the same tokens. "
        "The simulated time is that of the tile simulator. NATTEN's times are published ones, of "
        "its whole op on another H100 in fp16."
    )


def row_of(case: dict, l2: str, scale: float) -> dict[str, str]:
    """What is known of a case, by column."""
    s, runs = case["shape"], by_op(case, l2)
    ours, ms = runs[OURS], runs[OURS]["ms"]["median"]
    stride, dilation, causal = (
        [one] * len(s["grid"]) if s.get(name) in (None, one) else s[name]
        for name, one in (("stride", 1), ("dilation", 1), ("causal", False))
    )
    window = "x".join(map(str, s["window"]))
    if set(dilation) != {1}:
        window += ", dilation " + "x".join(map(str, dilation))
    if any(causal):
        axes = ", ".join(str(axis) for axis, flag in enumerate(causal) if flag)
        window += ", causal" if all(causal) else f", causal on axis {axes}"
    row = {
        "case": case["name"],
        "grid": f"{'x'.join(map(str, s['grid']))}, {s['heads_q']} heads, D={s['head_dim']}",
        "window": window,
        "stride": "1" if set(stride) == {1} else "x".join(map(str, stride)),
        "ms": f"{ms:.3g}",
        "useful {unit}": number(ours["useful_tflops"] * scale),
    }
    if "executed_tflops" in ours:
        row["executed {unit}"] = number(ours["executed_tflops"] * scale)
    if percent := percent_of_dense(runs):
        row["of our dense rate"] = f"{percent:.0f}%"
    for column, op in PEERS.items():
        if op in runs:
            row[column] = f"{runs[op]['ms']['median'] / ms:.2f}x"
    if case["name"] in NATTEN_MS:
        row["NATTEN, ms"] = f"{NATTEN_MS[case['name']]:.1f}"
    if ratio := predicted(ours):
        row["simulated / measured"] = f"{ratio:.2f}"
    return row


def table(results: dict) -> str:
    name, scale = unit(results)
    rows = [row_of(case, results["settings"]["l2"][0], scale) for case in results["cases"]]
    return lines_of(caption(results), COLUMNS, rows).replace("{unit}", name)
