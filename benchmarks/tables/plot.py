"""A picture of a results file, one panel for each group of cases: rate over length, on grids over
the stride, of block lists over the density."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.names import DENSE, MATMUL, OURS

COLUMNS = 4


def _draw(axis, op: str, points: list[tuple[int, dict]], color: str) -> None:
    places, rates, below, above = [], [], [], []
    for place, run in points:
        rate, ms = run["useful_tflops"], run["ms"]
        places.append(place)
        rates.append(rate)
        # The bar: 10 to 90% of the calls; not below zero by rounding.
        below.append(max(0.0, rate - rate * ms["median"] / ms["p90"]))
        above.append(max(0.0, rate * ms["median"] / ms["p10"] - rate))
    style = {"ls": ":", "alpha": 0.6} if op == MATMUL else {"marker": "o", "ms": 3}
    if op.endswith(DENSE):
        style |= {"ls": "--", "alpha": 0.6}
    axis.errorbar(places, rates, [below, above], color=color, label=op, capsize=2, **style)


def _place(axis, cases: list[dict]) -> dict[str, int]:
    """Where on the horizontal axis each case is, by its name; also sets the ticks."""
    if any(case["shape"]["window"] or case["shape"].get("lists") for case in cases):
        places = {case["name"]: place for place, case in enumerate(cases)}
        axis.set_xticks(range(len(cases)), [name.rsplit("/", 1)[1] for name in places])
        return places
    lengths = sorted({case["shape"]["length"] for case in cases})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    return {case["name"]: case["shape"]["length"] for case in cases}


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
    ops = sorted(found, key=lambda op: (op.removesuffix(DENSE) != OURS, op))
    kernels = list(dict.fromkeys(op.removesuffix(DENSE) for op in ops))
    l2 = results["settings"]["l2"][0]
    legend = {}
    for axis, (group, cases) in zip(axes.flat, groups.items(), strict=False):
        places = _place(axis, cases)
        for op in ops:
            runs = [(places[case["name"]], run) for case in cases for run in case["runs"]]
            points = [(n, r) for n, r in runs if r["op"] == op and r["l2"] == l2]
            if points:
                _draw(axis, op, points, f"C{kernels.index(op.removesuffix(DENSE))}")
        axis.set(title=group, ylim=(0, None))
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    axes[0][0].set_ylabel("useful TFLOP/s")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=min(6, len(legend)))
    figure.suptitle(f"{results['device']['name']}, {results['timestamp'][:10]}, {l2} L2")
    figure.savefig(path, dpi=110)
    plt.close(figure)
