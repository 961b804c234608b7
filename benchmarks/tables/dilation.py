"""The table of the newest run of benchmarks.studies.dilation."""

from __future__ import annotations

TITLE = "Large dilations"
DEVICE = "cuda"
UNDILATED = "undilated"
COLUMNS = (
    "grid, heads", "window", "dilation", "D", "ms", "useful TFLOP/s", "of the undilated rate",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "Neighborhood attention, bfloat16, with dilations that the copy engine's strides do not "
        "reach: one launch each, beside the same grid and window without dilation. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    problems = results["settings"]["problems"]
    found = []
    for row in results["rows"]:
        if row["op"] == UNDILATED:
            continue
        dim, _, name = row["case"].partition("/")
        *sizes, heads = problems[name]
        grid, window, dilation = ("x".join(map(str, size)) for size in sizes)
        values = (
            f"{grid}, {heads}", window, dilation, dim.removeprefix("d"),
            f"{row['ms']['median']:.3g}", f"{row['tflops']:.0f}", f"{row['rate']:.0%}",
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
