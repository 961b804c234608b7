"""Tables of decode attention: what the study prints, and that of its newest run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.harness import report
from benchmarks.harness.names import OURS

OWN = "own, "  # begins the names of our other calls
FLOOR = "floor"
SPARSE = ("blocks", "select", "skip")  # groups in which peers read all keys
HEADER = [
    "case", "us", "p10", "p90", "rate", "of R", "own base", "x", "best peer", "us", "x", "error",
]  # fmt: skip

TITLE = "Decode"
DEVICE = "cuda"
COLUMNS = (
    "case", "us", "10th to 90th percentile", "rate", "of R", "our own", "over it", "best peer",
    "over the peer", "error",
)  # fmt: skip


def caption(results: dict, source: str) -> str:
    s = results["settings"]
    return (
        "One new token of each request, 32/8 heads unless said, D=128, bfloat16, requests x "
        "tokens; and what a server runs beside it. Whole calls as CUDA graphs, of a cache without "
        "the call's data. Rates are of the bytes that must be read, or of operations over visible "
        f"pairs. R, {best_read(results['rows']):.0f} GB/s, is the fastest of torch's reductions. "
        "With lists and skipping the peers read all keys. Errors are against fp64. "
        f"{source}. Times are the median of {s['iterations']}."
    )


def rows(results: dict) -> list[dict[str, str]]:
    read = best_read(results["rows"])
    found = []
    for case, ops in by_case(results["rows"]).items():
        cells = line_of(case, ops, read)
        case, us, low, high, rate, share, base, over_base, peer, peer_us, over_peer, error = cells
        line = {"case": case, "us": us, "rate": rate, "of R": share, "error": error}
        if low:
            line["10th to 90th percentile"] = f"{low} to {high}"
        if over_base:
            line |= {"our own": base, "over it": f"{over_base}x"}
        if peer:
            line |= {
                "best peer": f"{peer}, {peer_us} us",
                "over the peer": over_peer and f"{over_peer}x",
            }
        found.append(line)
    return found


def by_case(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["group"] != FLOOR:
            found.setdefault(row["case"], []).append(row)
    return found


def reasons(skipped: dict[str, dict[str, str]]) -> Iterator[str]:
    """Why calls are missing; each reason once, with its cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case, ops in skipped.items():
        for op, reason in ops.items():
            cases.setdefault((op, reason), []).append(case)
    for (op, reason), names in cases.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"not measured: {op} in {'; '.join(names[:3])}{more}: {reason}"


def summary(results: dict) -> str:
    rows = results["rows"]
    read = best_read(rows)
    (empty,) = (row for row in rows if row["op"] == "empty")
    cases = by_case(rows)
    lines = [line_of(case, ops, read) for case, ops in cases.items()]
    first = [f"R: {read:.0f} GB/s; empty call: {microseconds(empty['ms']['median'])} us"]
    ratios = [
        speed(ours_of(ops)) / speed(peer)
        for ops in cases.values()
        if ops[0]["group"] == "dense" and ours_of(ops) and (peer := best_peer(ops))
    ]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        first.append(
            f"dense over the best peer: geometric mean {mean:.3f}x, least {min(ratios):.3f}x"
        )
    return "\n".join([report.plain_table(HEADER, lines), *first])


def best_read(rows: list[dict]) -> float:
    """GB/s of the fastest way to read one buffer."""
    return max(1e-6 * speed(row) for row in rows if row["op"].startswith("read, "))


def speed(row: dict) -> float:
    """Bytes or operations in a millisecond."""
    return (row["bytes"] if "bytes" in row else row["flops"]) / row["ms"]["median"]


def ours_of(ops: list[dict]) -> dict | None:
    return next((row for row in ops if row["op"] == OURS), None)


def best_peer(ops: list[dict]) -> dict | None:
    peers = (row for row in ops if row["op"] != OURS and not row["op"].startswith(OWN))
    return min(peers, key=lambda row: row["ms"]["median"], default=None)


def microseconds(ms: float) -> str:
    return f"{1e3 * ms:.0f}" if ms >= 1 else f"{1e3 * ms:.1f}"


def line_of(case: str, ops: list[dict], read: float) -> list[str]:
    ours, peer = ours_of(ops), best_peer(ops)
    base = next((row for row in ops if row["op"].startswith(OWN)), None)
    cells = [case, "not supported", "", "", "", ""]
    if ours and "skipped" in ours:
        case += f" ({ours['skipped']:.0%} of the tiles)"
    if ours:
        rate = 1e-6 * speed(ours)
        is_bytes = "bytes" in ours
        text = f"{rate:.0f} GB/s" if is_bytes else f"{1e-3 * rate:.0f} TFLOP/s"
        times = (microseconds(ours["ms"][x]) for x in ("median", "p10", "p90"))
        cells = [case, *times, text, f"{rate / read:.1%}" if is_bytes else ""]

    def beside(other: dict | None, by_work: bool) -> str:
        if not (ours and other):
            return ""
        times = other["ms"]["median"] / ours["ms"]["median"]
        return f"{speed(ours) / speed(other) if by_work else times:.3f}"

    # Lists and skipping leave bytes out: there, and beside peers, times are compared.
    by_work = ops[0]["group"] in ("ragged", "prefill")
    cells += [base["op"].removeprefix(OWN), beside(base, by_work)] if base else ["", ""]
    cells += (
        [peer["op"], microseconds(peer["ms"]["median"]), beside(peer, False)] if peer else [""] * 3
    )
    return [*cells, f"{ours['error']:.1e}" if ours and "error" in ours else ""]
