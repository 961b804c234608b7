"""The table of the newest run of benchmarks.studies.host_time."""

from __future__ import annotations

TITLE = "Host time of a call"
DEVICE = "cuda"
COLUMNS = ("op", "median, us", "10th percentile, us", "over torch's sdpa")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        f"Microseconds of the calling thread for one call, eager, one sequence of {s['tokens']} "
        f"tokens, {s['heads']} heads, D={s['head_dim']}, {s['dtype']}. {source}. Each time is the "
        f"median of {s['rounds']} rounds of {s['calls']} calls."
    )


def rows(results: dict) -> list[dict[str, str]]:
    sdpa = results["rows"][0]["ms"]["median"]
    found = []
    for row in results["rows"]:
        ms = row["ms"]
        values = (row["op"], f"{1e3 * ms['median']:.1f}", f"{1e3 * ms['p10']:.1f}")
        found.append(dict(zip(COLUMNS, (*values, f"{ms['median'] / sdpa:.2f}x"), strict=True)))
    return found
