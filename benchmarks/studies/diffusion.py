"""Whole calls of diffusion transformers with random weights: dense beside sparse attention.

    python -m benchmarks.studies.diffusion --list
    python -m benchmarks.studies.diffusion --case wan-1.3b-480p --layers 30
    python -m benchmarks.studies.diffusion --tiny               # shapes for a CPU, in seconds

`torch` is the model as diffusers has it; the others are `sparse_fmha.integrations.diffusers`. A
call is one forward of a stack of blocks in the real shapes, cut to `--layers` blocks of each kind.
Attention is the self-attention of one block alone, on random q, k and v in which nothing is masked;
times the blocks it is the share of the call. Random weights say nothing about the error of a
trained model: the difference shows whether what sees all keys agrees with torch.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from benchmarks.cases.diffusion import CASES, Case, tiny
from benchmarks.harness import environment, model_options, report, timing
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "diffusion"


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As loading does it: some small modules stay in fp32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def attention_ops(case: Case, variants: dict, device: str, dtype: torch.dtype) -> dict:
    """The self-attention of one block, by variant."""
    from sparse_fmha.integrations._diffusion_layout import Layout
    from sparse_fmha.integrations._diffusion_table import make

    text = (case.text, 0) if case.text_first else (0, case.text)
    layout = Layout(case.grid, *text)
    shape = 1, layout.tokens, case.heads, case.dim
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))

    def op(name):
        if name == "torch":
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            return lambda: nn.functional.scaled_dot_product_attention(*heads_first)
        method = make(*variants[name])
        return lambda: method(q, k, v, layout, [layout.all_runs()], None)

    return {name: op(name) for name in variants}


def run(case: Case, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a call and of the attention of one block, and the error to torch."""
    from sparse_fmha.integrations import diffusers as sparse

    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = cast(case.make(case, args.layers), dtype)
    inputs = {name: x.to(args.device) for name, x in case.inputs(case).items()}
    positions = ("img_ids", "txt_ids", "timestep")  # these stay exact
    inputs = {
        name: x.to(dtype) if x.is_floating_point() and name not in positions else x
        for name, x in inputs.items()
    }
    window, stride = {"window": case.window}, {"stride": case.stride}
    variants = {
        "torch": None,
        "dense": ("dense", {}),
        "window": ("neighborhood", window),
        "window, stride": ("neighborhood", {**window, **stride}),
    }
    counts = {"device": args.device, "l2": "cold", "iterations": args.repeats, "warmup": 1}

    with torch.inference_mode():
        ops = attention_ops(case, variants, args.device, dtype)
        attention = timing.measure(ops, **counts)
        del ops
        rows, expected = {}, None
        for name, variant in variants.items():  # in turn: a switch in each round would cost more
            if variant:
                method, options = variant
                sparse.enable(model, method, min_tokens=0, **options)
            out = model(**inputs, return_dict=False)[0].float()
            call = timing.measure({name: lambda: model(**inputs, return_dict=False)}, **counts)
            if variant:
                sparse.disable(model)
            expected = out if expected is None else expected
            rows[name] = {
                "call": call[name].median,
                "attention": attention[name].median,
                "error": ((out - expected).norm() / expected.norm()).item(),
            }
    return rows


def table(case: Case, rows: dict[str, dict[str, float]], layers: int) -> str:
    blocks = sum(case.cut(layers))
    grid, window, stride = ("x".join(map(str, x)) for x in (case.grid, case.window, case.stride))
    lines = [
        f"{case.what}: grid {grid}, {case.text} text tokens, {case.heads} heads, D={case.dim}, "
        f"{blocks} of {sum(case.layers)} blocks; window {window}, stride {stride}",
        f"{'':16}{'call, ms':>11}{'speedup':>9}{'attention, ms':>15}{'speedup':>9}{'share':>7}"
        f"{'difference':>12}",
    ]
    base = rows["torch"]
    for name, row in rows.items():
        share = blocks * row["attention"] / row["call"]
        lines.append(
            f"{name:16}{row['call']:11.4g}{base['call'] / row['call']:8.2f}x"
            f"{row['attention']:15.4g}{base['attention'] / row['attention']:8.2f}x{share:7.0%}"
            f"{row['error']:12.2g}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.diffusion",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--layers", type=report.at_least_one, default=4, metavar="N", help="blocks of each kind"
    )
    p.add_argument("--repeats", type=report.at_least_one, default=5, metavar="N")
    model_options.add(p, CASES, RESULTS)
    return p


def main(argv: list[str] | None = None) -> int:
    args = model_options.parse(parser(), argv, CASES)
    import diffusers

    out = report.out_of(args, RESULTS)
    results = environment.results(
        args.device,
        settings={
            "iterations": args.repeats,
            "seed": args.seed,
            "l2": "cold",
            "dtype": args.dtype,
        },
        models=[],
    )
    results["versions"]["diffusers"] = diffusers.__version__
    print(
        f"{results['device']['name']}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}, {args.dtype}, commit {results['commit']}"
    )
    for name in args.case:
        case = tiny(CASES[name]) if args.tiny else CASES[name]
        rows = run(case, args)
        print(f"\n{table(case, rows, args.layers)}", flush=True)
        facts = ("what", "grid", "window", "stride", "text", "heads", "dim")
        results["models"].append(
            {
                "case": name,
                **{fact: getattr(case, fact) for fact in facts},
                "blocks": sum(case.cut(args.layers)),
                "all_blocks": sum(case.layers),
                "rows": rows,
            }
        )
        report.keep_so_far(results, out)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    report.keep(results, out)
    return 0


if __name__ == "__main__":
    with one_line_errors(install="sparse-fmha[diffusers]"):
        sys.exit(main())
