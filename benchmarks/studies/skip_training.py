"""Training with skipped tiles: what a model predicts at a sparsity, with and without it.

    python -m benchmarks.studies.skip_training [--length N] [--tiny] [--out PATH]

A small causal model (benchmarks.cases.small_model) is trained with dense attention. Thresholds are
chosen with which its attention skips a given share of the tiles, on texts of their own. Then the
model goes on training twice for as many steps, with the threshold in each forward pass, as BLASST
(arXiv:2512.12087) trains for sparsity, and with dense attention. Of each: the share of the tokens
of new texts that are predicted, and of the tiles that are skipped, with the threshold. Without a
GPU it takes shorter texts, and some ten minutes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import small_model
from benchmarks.cases.small_model import Model
from benchmarks.harness import environment, report
from benchmarks.tables import skip_training as page
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "skip_training"
SPARSITIES = (0.5, 0.75, 0.9)
SIZES = {  # by device
    "cuda": {"length": 8192, "heads": 4, "heads_kv": 2, "dim": 64, "steps": 1000, "tuned": 200},
    "cpu": {"length": 2048, "heads": 4, "heads_kv": 2, "dim": 64, "steps": 200, "tuned": 40},
    "tiny": {"length": 384, "heads": 2, "heads_kv": 1, "dim": 32, "steps": 4, "tuned": 2},
}
TEXTS = 4  # that a measure is the mean of
LARGEST = 0.999
RATE = small_model.RATE / 3  # of the steps after training
HALVINGS = 14  # of the interval of a threshold's exponent


@dataclass
class Skipping:
    """Causal attention that skips, as `small_model.Attend`; counts what it skipped."""

    threshold: float
    skipped: int = 0
    visited: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"causal": True, "skip_threshold": self.threshold}
        if torch.is_grad_enabled():
            return sparse_fmha.attention(q, k, v, **options)
        out, stats = sparse_fmha.attention(q, k, v, **options, return_stats=True)
        self.skipped += int(stats.skipped.sum())
        self.visited += int(stats.visited.sum())
        return out

    @property
    def sparsity(self) -> float:
        return self.skipped / self.visited


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.skip_training", description=__doc__.partition("\n")[0]
    )
    p.add_argument("--length", type=report.at_least_one, metavar="N", help="tokens of a text")
    p.add_argument("--tiny", action="store_true", help="few short steps, also without a GPU")
    report.add_options(p, RESULTS)
    return p


@torch.no_grad()
def tried(model: Model, texts: Tensor, threshold: float) -> dict[str, float]:
    """Loss, share of the tokens predicted and share of the tiles skipped."""
    attend = Skipping(threshold)
    found = [small_model.loss_of(model, text, attend) for text in texts.split(1)]
    loss, right = (torch.stack(x).mean().item() for x in zip(*found, strict=True))
    return {"loss": loss, "right": right, "skipped": attend.sparsity}


def threshold_for(model: Model, texts: Tensor, wanted: float) -> float:
    """The least one, to a factor of 1.001, with which that share is skipped; else the largest."""
    low, high = -20.0, math.log(LARGEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        skips = tried(model, texts, math.exp(middle))["skipped"] >= wanted
        low, high = (low, middle) if skips else (middle, high)
    return math.exp(high)


def measure(size: dict[str, int], device: str, seed: int) -> dict:
    generator = torch.Generator(device).manual_seed(seed)
    model = small_model.make(size, device, seed)
    length = size["length"]
    losses = small_model.fit(model, small_model.growing(length, size["steps"]), generator)
    calibrated, new = (small_model.texts(TEXTS, length + 1, device, generator) for _ in range(2))
    further = generator.get_state()

    def tuned(attend) -> Model:
        """A copy after more steps, on the same texts whatever the attention."""
        generator.set_state(further)
        other = copy.deepcopy(model)
        small_model.fit(other, [length] * size["tuned"], generator, attend, RATE)
        return other

    dense = tuned(small_model.dense)
    rows = [
        {"wanted": 0.0, "threshold": 0.0, "model": name, **tried(of, new, 0.0)}
        for name, of in ((page.BEFORE, model), (page.DENSE, dense))
    ]
    for wanted in SPARSITIES:
        threshold = threshold_for(model, calibrated, wanted)
        models = {
            page.BEFORE: model, page.DENSE: dense, page.SKIPPING: tuned(Skipping(threshold)),
        }  # fmt: skip
        rows += [
            {"wanted": wanted, "threshold": threshold, "model": name, **tried(of, new, threshold)}
            for name, of in models.items()
        ]
    return {"losses": losses, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device, _ = environment.of_study(args.tiny or not torch.cuda.is_available())
    size = SIZES["tiny" if args.tiny else device]
    size = size | ({"length": args.length} if args.length else {})
    results = environment.results(device, settings={"seed": args.seed, **size})
    results |= measure(size, device, args.seed)
    if not args.tiny:
        small_model.learned(results["losses"])
    print(report.plain_table(list(page.COLUMNS), [[*row.values()] for row in page.rows(results)]))
    report.keep(results, report.out_of(args, RESULTS))
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
