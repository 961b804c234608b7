"""The table of the newest run of benchmarks.studies.key_bias."""

from __future__ import annotations

TITLE = "Forward with a bias of keys"
DEVICE = "cuda"
WITHOUT = "without"
COLUMNS = ("case", "ms without", "bias", "padding")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        f"{s['batch']} x {s['length']} tokens, bfloat16. The rate of a call with key_bias, and of "
        "one whose bias hides padding, relative to that of the call without. "
        f"{source}. Times are the median of {s['iterations']}, {s['l2']} cache."
    )


def rows(results: dict) -> list[dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        name = row["case"].replace("d", "D", 1).replace("/", " ")
        line = found.setdefault(row["case"], {"case": name})
        if row["op"] == WITHOUT:
            line["ms without"] = f"{row['ms']['median']:.3g}"
        else:
            line[row["op"]] = f"{row['rate']:.2f}"
    return list(found.values())
