"""The error of published methods over their sparsity, on inputs whose structure is known.

    python -m benchmarks.studies.frontier [--length N] [--plot PICTURE] [--tiny] [--out PATH]

Of a method: the share of the pairs that it leaves out, the share of the probability that these
pairs have in dense attention (of those with a mask), the error of the output, and the time of the
whole call on a GPU, the choice included if it depends on the inputs. Methods for language models
are beside causal attention, those for images and video beside attention without a mask, Light
Forcing that of its chunk's queries. Inputs are `planted` (benchmarks.cases.stripes): first keys,
stripes at random and near keys count; or, with `--inputs trained`, those of the last layer of a
small causal model that is trained first (benchmarks.cases.small_model), for causal methods. Other
inputs rank methods in another order; the study shows what a choice depends on.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import small_model, stripes
from benchmarks.cases.frontier import FIXED, FRAMES, METHODS, Mask, Method, Whole
from benchmarks.harness import environment, report, timing
from benchmarks.tables import frontier
from sparse_fmha.cli import one_line_errors

RESULTS = {
    "planted": report.RESULTS / "frontier",
    "trained": report.RESULTS / "frontier_trained",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.frontier", description=__doc__.partition("\n")[0]
    )
    p.add_argument("--length", type=report.at_least_one, default=16384, metavar="N")
    p.add_argument("--heads", type=report.at_least_one, default=8, metavar="N")
    p.add_argument("--heads-kv", type=report.at_least_one, default=2, metavar="N")
    p.add_argument("--inputs", choices=("planted", "trained"), default="planted")
    p.add_argument("--steps", type=report.at_least_one, default=1000, help="of training")
    p.add_argument("--plot", type=Path, metavar="PICTURE", help="error over sparsity (matplotlib)")
    report.add_op_options(p, RESULTS["planted"], iterations=5)
    return p


def points(
    name: str, method: Method | Whole, qkv: list[Tensor], args: argparse.Namespace, device: str
) -> list[dict]:
    """One for each budget."""
    q, k, v = qkv
    q = q[:, q.shape[1] - round(method.queries * q.shape[1]) :]
    dense = partial(sparse_fmha.attention, q, k, v, causal=method.causal)
    exact, whole = dense(return_lse=True)
    visible = (q.shape[1] + 1) / (2 * k.shape[1]) if method.causal else 1.0  # of all pairs
    found = []
    for budget in method.budgets:
        lost = None
        if isinstance(method, Whole):
            out, share = method.attend(q, k, v, budget)
            sparsity = 1 - share()
            op = partial(method.attend, q, k, v, budget)
        else:
            mask = method.make(q, k, budget)
            out, lse = stripes.attend(q, k, v, mask, return_lse=True)
            sparsity = 1 - mask.density / visible
            lost = 1 - (lse.double() - whole.double()).exp().mean().item()
            op = partial(_under, method, mask if method.kind == FIXED else None, [q, k, v], budget)
        ops = {"dense": dense, name: op}
        warmup = int(device == "cuda")
        times = timing.measure(
            ops, device=device, l2="cold", iterations=args.iterations, warmup=warmup, seed=args.seed
        )
        found.append({
            "method": name, "chosen_by": method.kind, "budget": budget, "causal": method.causal,
            "sparsity": sparsity, "lost": lost,
            "error": ((out - exact).float().norm() / exact.float().norm()).item(),
            "ms": times[name].median, "dense_ms": times["dense"].median,
        })  # fmt: skip
    return found


def _under(method: Method, mask: Mask | None, qkv: list[Tensor], budget: float) -> object:
    """Attention under a mask that is there, or is made first."""
    mask = method.make(*qkv[:2], budget) if mask is None else mask
    return stripes.attend(*qkv, mask, return_lse=True)


def table(rows: list[dict]) -> str:
    return report.plain_table(list(frontier.COLUMNS), [frontier.line(row) for row in rows])


def plot(rows: list[dict], path: Path) -> None:
    """Error and time, relative to dense, over sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for n, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == name), key=lambda r: r["sparsity"])
        x = [100 * row["sparsity"] for row in own]
        style = {"marker": "osD^v"[n % 5], "markersize": 4, "linewidth": 1.2, "color": f"C{n % 10}"}
        style["linestyle"] = "-" if n < 10 else "--"
        axes[0].plot(x, [max(row["error"], 1e-4) for row in own], label=name, **style)
        axes[1].plot(x, [row["dense_ms"] / row["ms"] for row in own], **style)
    axes[0].set(xlabel="pairs left out, %", ylabel="relative error of the output")
    axes[0].set(yscale="log", title="Error over sparsity")
    axes[1].set(xlabel="pairs left out, %", ylabel="speedup over dense", title="Speedup")
    axes[1].axhline(1, color="0.6", linewidth=0.8)
    figure.legend(loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.heads % args.heads_kv:
        p.error(f"--heads must be a multiple of --heads-kv {args.heads_kv}, got {args.heads}")
    if args.length % FRAMES:
        p.error(f"--length must be a multiple of {FRAMES}, got {args.length}")
    device, dtype = environment.of_study(args.tiny or not torch.cuda.is_available())
    size = {"length": args.length, "heads": args.heads, "heads_kv": args.heads_kv, "dim": 128}
    if args.tiny:
        size |= {"length": 2048, "heads": 2, "heads_kv": 1}
    settings = {"iterations": args.iterations, "seed": args.seed, "l2": "cold", **size}
    settings["inputs"] = args.inputs
    if args.inputs == "trained":
        made = small_model.train(size, device, dtype, args.seed, args.steps)
        (q, k, v), settings["losses"] = made.qkv, [made.losses[0], made.losses[-1]]
        print("loss of the first and the last step: {:.3f}, {:.3f}".format(*settings["losses"]))
        if not args.tiny:
            small_model.learned(made.losses)
    else:
        q, k, v, _ = stripes.planted(size, device, dtype, args.seed)
    results = environment.results(device, settings=settings, rows=[])
    for name, method in METHODS.items():
        if args.inputs == "trained" and not method.causal:
            continue  # the model was not trained so
        results["rows"] += points(name, method, [q, k, v], args, device)
    print(table(results["rows"]))
    if args.plot:
        plot(results["rows"], args.plot)
    report.keep(results, report.out_of(args, RESULTS[args.inputs]))
    return 0


if __name__ == "__main__":
    with one_line_errors(install="sparse-fmha[demo]"):
        sys.exit(main())
