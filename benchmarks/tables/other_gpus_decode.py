"""Decode of the kernels for other GPUs: what the study prints, and the table of its newest run."""

from __future__ import annotations

from benchmarks.harness import report

OWN, OTHER = ARCHS = "sm90", "sm80"

TITLE = "Decode of the kernels for other GPUs, on a Hopper GPU"
DEVICE = "cuda"
COLUMNS = (
    "case", "MB", "sm90, us", "sm90, GB/s", "sm80, us", "sm80, GB/s", "sm80 over sm90", "error",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "The decode kernel that sm80 and sm86 share, beside Hopper's own, both on a Hopper GPU: no "
        "other GPU has run it. One new token of each request, 32/8 heads and D128 unless said, "
        f"bfloat16, requests x tokens. Whole calls as CUDA graphs, {s['l2']} L2 cache. "
        "Rates are of the bytes that must be read; above 1.00x the kernel of sm80 is faster. "
        f"The error is the larger one, against fp64. {source}. Times are the median of "
        f"{s['iterations']}."
    )


def rate(row: dict) -> float:
    """GB/s."""
    return row["bytes"] / row["ms"]["median"] * 1e-6


def rows(results: dict) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    times: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    for row in results["rows"]:
        case, op = row["case"], row["op"]
        line = found.setdefault(case, {"case": case, "MB": f"{row['bytes'] / 1e6:.4g}"})
        times.setdefault(case, {})[op] = row["ms"]["median"]
        line[f"{op}, us"] = f"{1000 * row['ms']['median']:.4g}"
        line[f"{op}, GB/s"] = f"{rate(row):.4g}"
        if row["error"] is not None:
            errors[case] = max(errors.get(case, 0.0), row["error"])
            line["error"] = f"{errors[case]:.1e}"
    for case, of in times.items():
        if set(ARCHS) <= set(of):
            found[case]["sm80 over sm90"] = f"{of[OWN] / of[OTHER]:.2f}x"
    return list(found.values())


def summary(results: dict) -> str:
    lines = rows(results)
    header = [column for column in COLUMNS if any(column in line for line in lines)]
    return report.plain_table(
        header, [[line.get(column, "") for column in header] for line in lines]
    )
