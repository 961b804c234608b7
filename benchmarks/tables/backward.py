"""Rates of backward passes: what the study prints, and the table of its newest run."""

from __future__ import annotations

from benchmarks.harness.names import OURS
from benchmarks.tables.other_gpus import DENSE_NAME, rate

TITLE = "Backward passes"
DEVICE = "cuda"
DETERMINISTIC = f"{OURS}, deterministic"
OWN_DENSE = "D128 full 16k"  # whose rate others are a share of
PEERS = ("cuDNN", "FlexAttention", "fastvideo-kernel")
COLUMNS = (
    "case", "ms", "TFLOP/s", "of dense", "deterministic",
    *(f"relative to {peer}" for peer in PEERS), "error of dq",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    more = ""
    if any(row.get("executed_flops") for row in results["rows"]):  # the first results had none
        more = (
            "Of dense: the rate over the pairs in the tiles that a window's kernel visits, or over "
            f"the keys of lists, relative to that of {OWN_DENSE}. Deterministic: the time of a "
            "call whose bits repeat, and by how much it is longer. "
        )
    return (
        "The backward pass alone, bfloat16, from the gradient of out to those of q, k and v. "
        "TFLOP/s count 2.5 times the operations of the forward pass over the visible pairs. The "
        "error is that of the gradient of q of a small problem against fp64, relative to its "
        f"largest element. Relative speeds are above 1 where ours is faster. {more}"
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def with_shares(rows: list[dict]) -> list[tuple[dict, float | None]]:
    """Each row, and the rate over executed pairs relative to dense attention's; None where there is
    no such rate, and for dense attention itself."""
    dense = [rate(x, "useful_flops") for x in rows if (x["case"], x["op"]) == (OWN_DENSE, OURS)]
    found = []
    for row in rows:
        share = None
        if dense and row.get("executed_flops") and not DENSE_NAME.match(row["case"]):
            share = rate(row, "executed_flops") / dense[0]
        found.append((row, share))
    return found


def by_case(results: dict) -> dict[str, dict[str, dict]]:
    """The rows of each case by op."""
    found: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        found.setdefault(row["case"], {})[row["op"]] = row
    return found


def rows(results: dict) -> list[dict[str, str]]:
    shares = {row["case"]: f"{x:.0%}" for row, x in with_shares(results["rows"]) if x is not None}
    found = []
    for case, ops in by_case(results).items():
        ours = ops[OURS]
        ms = ours["ms"]["median"]
        line = {"case": case, "ms": f"{ms:.3g}", "TFLOP/s": f"{rate(ours, 'useful_flops'):.0f}"}
        if case in shares:
            line["of dense"] = shares[case]
        if DETERMINISTIC in ops:
            longer = ops[DETERMINISTIC]["ms"]["median"]
            line["deterministic"] = f"{longer:.3g} ms ({longer / ms:.2f}x)"
        for peer in PEERS:
            if peer in ops:
                theirs = ops[peer]["ms"]["median"]
                line[f"relative to {peer}"] = f"{theirs / ms:.2f}x ({theirs:.3g} ms)"
        found.append(line | {"error of dq": f"{ours['error']:.1e}"})
    return found
