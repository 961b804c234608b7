"""The table of the newest run of benchmarks.studies.small, worst case first."""

from __future__ import annotations

from benchmarks.harness.names import OURS

TITLE = "Small and middle sizes"
DEVICE = "cuda"
COLUMNS = ("case", "us", "query tile", "fastest other", "its us", "speed relative to it")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "Dense and causal attention, bfloat16, batch x tokens, 16 heads unless said, as CUDA "
        "graphs of several calls, warm cache. Worst first; bold: slower than the other kernel. "
        f"{source}. Times are the median of {s['iterations']}."
    )


def best_peer(row: dict) -> tuple[str, float] | None:
    """The fastest other kernel and its ms."""
    # A forced query tile is named "q64"; it is no other kernel.
    peers = {
        name: spread["median"]
        for name, spread in row["ms"].items()
        if name != OURS and not name.removeprefix("q").isdecimal()
    }
    return min(peers.items(), key=lambda x: x[1], default=None)


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for row in sorted(results["rows"], key=lambda row: row["of_best_peer"] or 0):
        name = row["case"].removeprefix("small/").replace("/", " ").replace("d", "D", 1)
        line = dict(
            zip(
                COLUMNS,
                (name, f"{1e3 * row['ms'][OURS]['median']:.1f}", f"{row['tile_q']}"),
                strict=False,
            )
        )
        if peer := best_peer(row):
            best, ms = peer
            ratio = f"{row['of_best_peer']:.2f}x"
            shown = f"**{ratio}**" if row["of_best_peer"] < 1 else ratio
            line |= dict(zip(COLUMNS[3:], (best, f"{1e3 * ms:.1f}", shown), strict=True))
        found.append(line)
    return found
