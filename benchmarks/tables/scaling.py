"""The table of the newest run of benchmarks.studies.scaling."""

from __future__ import annotations

TITLE = "Several GPUs"
DEVICE = "cuda"
COLUMNS = ("op", "way", "GPUs", "ms", "speedup", "efficiency", "communication")


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    overlap = "nothing overlaps"
    if "slices" in s:
        overlap = (
            f"it runs under computing only in slices (at most {s['slices']}) and in pass_kv, which "
            "has no such call; windows are those of HunyuanVideo, torch is its context "
            "parallelism with cuDNN, and torch flex that with FlexAttention"
        )
    return (
        f"One sequence over several GPUs (NCCL), {s['length'] // 1024}k tokens, "
        f"{s['heads']}/{s['heads_kv']} heads, D={s['head_dim']}, {s['dtype']}; block_sparse: "
        f"{100 * s['density']:.3g}% of the blocks of 128x128, at random. Communication is the same "
        f"call with a function that computes nothing; {overlap}. {source}. Times are the "
        f"median of {s['iterations']}, those of the slowest rank."
    )


def compared(rows: list[dict]) -> list[tuple[dict, str, str, str]]:
    """Each row of the results with its speedup over one GPU, efficiency, and communication."""
    alone = {row["op"]: row["ms"]["median"] for row in rows if row["ranks"] == 1}
    found = []
    for row in rows:
        ms, moved = row["ms"]["median"], row["communication_ms"]
        speedup = alone[row["op"]] / ms
        share = f"{moved['median'] / ms:.0%}" if moved else ""
        found.append((row, f"{speedup:.2f}x", f"{speedup / row['ranks']:.0%}", share))
    return found


def rows(results: dict) -> list[dict[str, str]]:
    found = []
    for row, *compare in compared(results["rows"]):
        values = (row["op"], row["way"], str(row["ranks"]), f"{row['ms']['median']:.4g}", *compare)
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found
