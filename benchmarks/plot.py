"""A picture of a results file: rate over length, one panel for each group of cases."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.names import MATMUL, OURS

COLUMNS = 4


def _draw(axis, op: str, points: list[tuple[int, dict]], color: str) -> None:
    lengths, rates, below, above = [], [], [], []
    for length, run in points:
        rate, ms = run["useful_tflops"], run["ms"]
        lengths.append(length)
        rates.append(rate)
        below.append(rate - rate * ms["median"] / ms["p90"])  # the bar: 10 to 90% of the calls
        above.append(rate * ms["median"] / ms["p10"] - rate)
    style = {"ls": ":", "alpha": 0.6} if op == MATMUL else {"marker": "o", "ms": 3}
    axis.errorbar(lengths, rates, [below, above], color=color, label=op, capsize=2, **style)


def plot(results: dict, path: Path) -> None:
    groups: dict[str, list[dict]] = {}
    for case in results["cases"]:
        groups.setdefault(case["name"].rsplit("/", 1)[0], []).append(case)
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    size = (max(5, 3.6 * columns), 0.8 + 2.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    found = {run["op"] for case in results["cases"] for run in case["runs"]}
    ops = sorted(found, key=lambda op: (op != OURS, op))
    l2 = results["settings"]["l2"][0]
    for axis, (group, cases) in zip(axes.flat, groups.items(), strict=False):
        for op, color in zip(ops, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
            runs = [(c["shape"]["length"], r) for c in cases for r in c["runs"]]
            points = [(n, r) for n, r in runs if r["op"] == op and r["l2"] == l2]
            if points:
                _draw(axis, op, points, color)
        axis.set(title=group, xscale="log", ylim=(0, None))
        lengths = sorted({case["shape"]["length"] for case in cases})
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
    axes[0][0].set_ylabel("useful TFLOP/s")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{results['device']['name']}, {results['timestamp'][:10]}, {l2} L2")
    figure.savefig(path, dpi=110)
    plt.close(figure)
