"""The table of the newest run of benchmarks.studies.vision."""

from __future__ import annotations

TITLE = "A vision transformer"
DEVICE = "cuda"
COLUMNS = ("images", "attention, passes", "ms", "over dense")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    depths = ", ".join(map(str, s["depths"]))
    return (
        f"Whole calls of a model in the shape of BiFormer ({depths} blocks, {s['channels']} "
        "channels in the first stage) with random weights: routed attention by this library beside "
        "torch's dense one in the same model, forward, and forward and backward (`gradients`). "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    batches = results["settings"]["batches"]
    found = []
    for row in results["rows"]:
        batch = batches[row["case"].removesuffix(" pixels")]
        values = (
            f"{batch} of {row['case']}", row["op"], f"{row['ms']['median']:.4g}",
            f"{row['speedup']:.2f}x",
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
