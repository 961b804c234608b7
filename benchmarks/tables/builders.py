"""The table of the newest run of benchmarks.studies.builders."""

from __future__ import annotations

TITLE = "Making masks"
DEVICE = "cpu"
LENGTHS = ("16k", "128k", "1M")
COLUMNS = ("builder", *LENGTHS)


def caption(results: dict, source: str) -> str:
    return (
        "Time, bytes of the mask, and the peak of what torch's allocator handed out relative to "
        "them; one head, D=64. Small masks are made in one piece, which is why their ratio is "
        f"larger. {source}."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for case in results["cases"]:
        size, peak = case["mask_bytes"], case["peak_bytes"]
        cell = f"{case['seconds']:.3f} s, {size / 1e6:.1f} MB, {peak / size:.1f}x"
        found.setdefault(case["name"], {"builder": case["name"]})[case["tokens"]] = cell
    return list(found.values())
