"""The table of the newest run of benchmarks.studies.score_sums."""

from __future__ import annotations

TITLE = "Reductions of scores"
DEVICE = "cuda"
DENSE = "dense"
TORCH = ", torch"
COLUMNS = ("case", "reduction", "ms", "TFLOP/s of Q.K", "rate relative to dense", "torch code, ms")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "`score_sums`, bfloat16. A rate counts the products of queries and keys: one with a given "
        "log-sum-exp, two with its own; of dense attention both of its products. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    ms = {(row["case"], row["op"]): row["ms"]["median"] for row in results["rows"]}
    found = []
    for row in results["rows"]:
        case, op = row["case"], row["op"]
        if op == DENSE or op.endswith(TORCH):
            continue
        of_dense = row["of_dense"]
        slices = ms.get((case, op + TORCH))
        values = (
            case.replace("d", "D", 1).replace("/", " "), op, f"{ms[case, op]:.3g}",
            f"{row['tflops']:.0f}", "" if of_dense is None else f"{of_dense:.2f}",
            "" if slices is None else f"{slices:.3g}",
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
