"""The table of the newest run of benchmarks.studies.backward."""

from __future__ import annotations

from benchmarks.harness.names import OURS

TITLE = "Backward passes"
DEVICE = "cuda"
PEERS = ("cuDNN", "FlexAttention")
COLUMNS = ("case", "ms", "TFLOP/s", *(f"relative to {peer}" for peer in PEERS), "error of dq")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "The backward pass alone, bfloat16, from the gradient of out to those of q, k and v. "
        "TFLOP/s count 2.5 times the operations of the forward pass over the visible pairs. The "
        "error is that of the gradient of q of a small problem against fp64, relative to its "
        "largest element. Relative speeds are above 1 where ours is faster. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def by_case(results: dict) -> dict[str, dict[str, dict]]:
    """The rows of each case by op."""
    found: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        found.setdefault(row["case"], {})[row["op"]] = row
    return found


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for case, ops in by_case(results).items():
        ours = ops[OURS]
        ms = ours["ms"]["median"]
        rate = f"{ours['useful_flops'] / ms * 1e-9:.0f}"
        line = dict(zip(COLUMNS, (case, f"{ms:.3g}", rate), strict=False))
        for peer, column in zip(PEERS, COLUMNS[3:], strict=False):
            if peer in ops:
                theirs = ops[peer]["ms"]["median"]
                line[column] = f"{theirs / ms:.2f}x ({theirs:.3g} ms)"
        found.append(line | {COLUMNS[-1]: f"{ours['error']:.1e}"})
    return found
