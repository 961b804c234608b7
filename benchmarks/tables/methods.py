"""The table of the newest run of benchmarks.studies.methods."""

from __future__ import annotations

TITLE = "Published methods"
DEVICE = "cuda"
COLUMNS = (
    "method", "tokens, heads, D", "op", "ms", "over dense", "over FlashAttention-3", "headline",
    "measured", "memory, MiB", "difference",
)  # fmt: skip
COMPARED = ("dense", "FlashAttention-3")
SDPA = "SDPA"
GRADIENTS = ", with gradients"


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "Whole calls of one layer, selection included, on planted inputs. The headline is the "
        "published speedup, of another GPU and other inputs; measured is ours relative to the same "
        "kind of baseline. Memory is what a call takes beside its inputs, the result included. "
        "Difference is the relative RMS difference from dense attention; it says nothing of a "
        f"model's accuracy. {source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for one in results["methods"]:
        times = {row["op"]: row["ms"]["median"] for row in one["rows"] if "ms" in row}
        if one["against"] == SDPA:  # of many images, which dense attention to one sequence is not
            times.pop("dense", None)
        for row in one["rows"]:
            if row["op"] in COMPARED or row["op"].startswith(one["against"]):
                continue
            if "error" in row:
                shown = one["method"], row["op"], row["error"]
                names = "method", "op", "headline"
                found.append(dict.fromkeys(COLUMNS, "") | dict(zip(names, shown, strict=True)))
                continue
            ms = row["ms"]["median"]
            over = {op: f"{times[op] / ms:.2f}x" if op in times else "" for op in COMPARED}
            headline = "" if one["headline"] is None else f"{one['headline']:g}x {one['against']}"
            with_gradients = row["op"].endswith(GRADIENTS)
            against = one["against"] + (GRADIENTS if with_gradients else "")
            base = times.get(against) if one["headline"] is not None else None
            heads = f"{one['heads']}/{one['heads_kv']}"
            values = (
                one["method"], f"{one['length']}, {heads}, {one['dim']}", row["op"], f"{ms:.4g}",
                *over.values(), ", ".join(x for x in (headline, one["published"]) if x),
                f"{base / ms:.2f}x" if base else "",
                "" if not row["peak_bytes"] else f"{row['peak_bytes'] / 2**20:.0f}",
                "" if row["difference"] is None else f"{row['difference']:.3f}",
            )  # fmt: skip
            found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
