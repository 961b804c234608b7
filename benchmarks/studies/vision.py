"""A model in the shape of BiFormer-T with attention by this library, and with torch's dense one.

    python -m benchmarks.studies.vision [--tiny] [--out PATH]

Whole calls of the model (benchmarks.cases.biformer_model) with random weights, at 224 and 512
pixels: forward passes, and forward and backward ones ("gradients").
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.cases import biformer_model
from benchmarks.harness import report, study, timing
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "vision"
COLUMNS = ["speedup"]
WAYS = {"routed": biformer_model.routed, "SDPA, dense": biformer_model.dense}
SIZES = {
    "full": {"channels": 64, "depths": (2, 2, 8, 2), "batches": {224: 64, 512: 8}},
    "tiny": {"channels": 32, "depths": (1, 1, 1, 1), "batches": {224: 1}},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.vision", description=__doc__.partition("\n")[0]
    )
    report.add_op_options(p, RESULTS, iterations=10)
    return p


def measure(size: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    found: list[dict] = []
    for pixels, batch in size["batches"].items():
        torch.manual_seed(args.seed)
        model = biformer_model.BiFormer(
            pixels, channels=size["channels"], depths=size["depths"], device=device
        ).to(dtype)
        images = biformer_model.drawn(pixels, batch, device, dtype, args.seed)

        def gradients(attend, model=model, images=images):
            return torch.autograd.grad(model(images, attend).sum(), [*model.parameters()])

        for passes in ("forward", "gradients"):
            call = gradients if passes == "gradients" else partial(model, images)
            with torch.set_grad_enabled(passes == "gradients"):
                times = timing.measure(
                    {name: partial(call, attend) for name, attend in WAYS.items()}, device=device,
                    l2="cold", iterations=args.iterations, warmup=2, seed=args.seed,
                )  # fmt: skip
            base = times["SDPA, dense"].median
            found += [
                {"case": f"{pixels} pixels", "op": f"{name}, {passes}", "ms": asdict(ms),
                 "speedup": base / ms.median}
                for name, ms in times.items()
            ]  # fmt: skip
    return {"rows": found}


def table(rows: list[dict]) -> str:
    return study.table(COLUMNS, rows, lambda row: [f"{row['speedup']:.2f}x"])


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table, SIZES)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
