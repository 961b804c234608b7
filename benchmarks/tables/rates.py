"""What a case's runs say beside each other: rates, shares, targets."""

from __future__ import annotations

from benchmarks.harness.names import DENSE, MATMUL, OURS
from benchmarks.tables import targets

PEER_NAMES = {
    "fa3": "FlashAttention-3",
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "flex": "FlexAttention",
    "flex_tiled": "FlexAttention in tiles",
    "sta": "sliding tile attention",
    "vsa": "fastvideo-kernel",
    "torch": "torch",
}


def unit(results: dict) -> tuple[str, float]:
    """The unit that a device's rates are shown in, and how many of it make a TFLOP/s."""
    return ("TFLOP/s", 1) if results["device"]["type"] == "cuda" else ("GFLOP/s", 1000)


def number(x: float) -> str:
    """Three digits, more where the number is larger."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def by_op(case: dict, l2: str) -> dict[str, dict]:
    """The runs of the ops that compute attention; ours is the first."""
    runs = {r["op"]: r for r in case["runs"] if r["l2"] == l2 and r["op"] != MATMUL}
    return {OURS: runs.pop(OURS)} | runs


def best_peer(runs: dict[str, dict]) -> tuple[str, float] | None:
    """The fastest other kernel that computes what ours does, and its ms; dense attention of a
    sparse case is none."""
    ms = {PEER_NAMES[op]: run["ms"]["median"] for op, run in runs.items() if op in PEER_NAMES}
    return min(ms.items(), key=lambda x: x[1], default=None)


def percent_of_dense(runs: dict[str, dict]) -> float | None:
    """The rate over executed tiles relative to that of our dense kernel on the same tokens."""
    executed, dense = runs[OURS].get("executed_tflops"), runs.get(OURS + DENSE)
    return 100 * executed / dense["useful_tflops"] if executed and dense else None


def share_of_dense(runs: dict[str, dict]) -> float | None:
    """The time in percent of that of our dense kernel on the same tokens."""
    dense = runs.get(OURS + DENSE)
    return 100 * runs[OURS]["ms"]["median"] / dense["ms"]["median"] if dense else None


def target(case: dict, cases: list[dict], l2: str) -> str:
    """What a case with block lists is to reach, as text; empty where nothing is asked. Some targets
    are relative to others of the same run."""
    if case["name"] in targets.SHARES:
        return f"time < {targets.SHARES[case['name']]}%"
    rates = {c["name"]: percent_of_dense(by_op(c, l2)) for c in cases}
    percent = targets.rate(case["name"], {name: rate for name, rate in rates.items() if rate})
    return f"rate >= {percent:.0f}%" if percent else ""


def predicted(ours: dict) -> float | None:
    """The simulated time relative to the measured one."""
    return ours["predicted_ms"] / ours["ms"]["median"] if "predicted_ms" in ours else None
