"""The table of the newest run of benchmarks.studies.stripes."""

from __future__ import annotations

TITLE = "Stripes and AnchorAttention"
DEVICE = "cuda"
COLUMNS = ("case", "op", "ms", "TFLOP/s", "of contiguous blocks", "over dense")


def caption(results: dict, source: str) -> str:
    s, a = results["settings"], results["anchor"]
    return (
        f"Stripe attention, {s['length'] // 1024}k tokens, {s['heads']}/{s['heads_kv']} heads, "
        f"D={s['dim']}, groups of {s['rows']} queries. Each group sees as many keys as the case "
        "says: single columns at random, runs of 128 keys at any offset, or lists of blocks. "
        f"AnchorAttention, causal, on synthetic inputs: recall {a['recall']:.3f} with "
        f"{a['kept']:.0f} distant keys kept on average. Block lists that hold the same keys list "
        f"{100 * a['density_of_blocks']:.0f}% of all blocks, with recall "
        f"{a['recall_of_blocks']:.3f}. {source}. Times are the median of {s['iterations']}, "
        f"{s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for one in results["rows"]:
        ms = one["ms"]["median"]
        others = {r["op"]: r["ms"]["median"] for r in results["rows"] if r["case"] == one["case"]}
        line = {"case": one["case"], "op": one["op"], "ms": f"{ms:.4g}"}
        if one["case"] == "anchor":
            line["over dense"] = f"{others['dense'] / ms:.2f}x"
        else:
            line["TFLOP/s"] = f"{one['useful_flops'] / ms * 1e-9:.0f}"
            line["of contiguous blocks"] = f"{100 * others['contiguous blocks'] / ms:.0f}%"
        found.append(line)
    return found
