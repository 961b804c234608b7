"""The table of the newest run of benchmarks.studies.query_rows."""

from __future__ import annotations

TITLE = "Listed queries"
DEVICE = "cuda"
CONTIGUOUS, LISTS, GATHERED = "in one piece", "in one piece, lists", "gathered"
COLUMNS = (
    "case", "in one piece, ms", "gathered, ms", "TFLOP/s", "rate relative to one piece",
    "to one piece by lists",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "`row_attention`, bfloat16, rows at random for each head, a quarter of the queries or "
        "(`all`) a permutation of them, beside attention of as many queries in one piece; causal "
        "ones are the last, also computed by the kernels of block lists, which gathered ones take. "
        "Rates count the pairs that queries see; at least 0.85 is wanted. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    by = {(row["case"], row["op"]): row for row in results["rows"]}
    for (case, op), row in by.items():
        if op != GATHERED:
            continue
        lists = by.get((case, LISTS))
        values = (
            case.replace("d", "D", 1).replace("/", " "),
            f"{by[case, CONTIGUOUS]['ms']['median']:.3g}", f"{row['ms']['median']:.3g}",
            f"{row['tflops']:.0f}", f"{row['rate']:.2f}",
            f"{row['tflops'] / lists['tflops']:.2f}" if lists else "",
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
