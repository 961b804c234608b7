"""Whole calls of models in real shapes: time, peak memory and attention's share, dense and sparse.

    python -m benchmarks.studies.models --list
    python -m benchmarks.studies.models --precompile          # all of them, in the least time
    python -m benchmarks.studies.models --case wan-14b-720p
    python -m benchmarks.studies.models --tiny                # shapes for a CPU, in seconds

`torch` is the model as diffusers has it, `dense` the same by `sparse_fmha.attention`; the others
are presets or windows of `sparse_fmha.integrations.diffusers`, in a step in which they are sparse.
Models have random weights and are cut to `--blocks` blocks of each kind. `torch` and the first of
the others also run with regional compilation (`compile_repeated_blocks(fullgraph=True)`), which
takes most of the time: `--precompile` compiles all models at once in processes of their own, whose
results are then in inductor's cache. The peak is what a call allocates beside weights and inputs. A
call whose self-attention returns its queries says what is left without attention; the rest is
attention's share. Of LTX-2.5's decoder, which has no other way that fits, `natten` runs if it is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.models import CASES, Case
from benchmarks.harness import environment, model_options, report, timing
from benchmarks.harness.memory import peak_bytes
from benchmarks.studies.diffusion import cast
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "models"
EXACT = ("img_ids", "txt_ids", "timestep", "position_ids")  # these inputs stay as they are
NOTHING = "without attention"


class Nothing:
    """A method whose output is q."""

    in_graph = True

    def check(self, layout: object) -> None:
        pass

    def without_effect(self, layout: object) -> Iterator[tuple[str, str]]:
        yield from ()

    def prepared(self, layout: object, device: object) -> Nothing:
        return self

    def __call__(self, q: Tensor, *rest: object) -> Tensor:
        return q.clone()


class NothingInDecoder:
    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        return attn.to_out[0](attn.project_qkv(hidden_states)[0].flatten(-2))


class Natten:
    """LTX-2.5's decoder on NATTEN itself, which is wrong on strided tensors."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        import natten

        q, k, v = (x.contiguous() for x in attn.project_qkv(hidden_states))
        out = natten.na3d(q, k, v, kernel_size=attn.kernel_size, scale=1.0)
        return attn.to_out[0](out.flatten(-2))


def variants(case: Case, tiny: bool) -> dict[str, Callable[[nn.Module], Any]]:
    """Context managers by name, in which the model is changed."""
    from sparse_fmha.integrations import diffusers as sparse
    from sparse_fmha.integrations._diffusion_hooks import Settings
    from sparse_fmha.integrations._diffusion_models import find
    from sparse_fmha.integrations._diffusion_plan import Plan
    from sparse_fmha.integrations._diffusion_steps import Steps
    from sparse_fmha.integrations._diffusion_watch import watching

    @contextlib.contextmanager
    def enabled(model: nn.Module, **given: Any) -> Iterator[None]:
        sparse.enable(
            model, min_tokens=0, first_dense_steps=0, last_dense_steps=0, dense_layers=(), **given
        )
        try:
            yield
        finally:
            sparse.disable(model)

    @contextlib.contextmanager
    def nothing(model: nn.Module) -> Iterator[None]:
        name, row = find(model)
        methods = [Nothing() for _ in row.layers(model)][:1]
        methods *= len(row.layers(model))
        with watching(model, name, methods, Settings(Plan((), ()), (), None, 0, False), Steps(0)):
            yield

    @contextlib.contextmanager
    def decoding(model: nn.Module, processor: object) -> Iterator[None]:
        own = next(m.processor for m in model.modules() if hasattr(m, "project_qkv"))
        model.set_attn_processor(processor)
        try:
            yield
        finally:
            model.set_attn_processor(own)

    @contextlib.contextmanager
    def decoder(model: nn.Module) -> Iterator[None]:
        sparse.enable_decoder(model)
        try:
            yield
        finally:
            sparse.disable_decoder(model)

    if case.variants is None:
        found = {"sparse_fmha": decoder, NOTHING: lambda m: decoding(m, NothingInDecoder())}
        with contextlib.suppress(ImportError):
            import natten  # noqa: F401

            found = {"natten": lambda m: decoding(m, Natten()), **found}
        return found
    made: dict[str, Callable[[nn.Module], Any]] = {
        "torch": lambda model: contextlib.nullcontext(),
        "dense": lambda model: enabled(model, method="dense"),
    }
    for name, given in case.variants.items():
        own = {**given, **(case.tiny.get(name, {}) if tiny else {})}
        made[name] = lambda model, own=own: enabled(model, **own)
    return {**made, NOTHING: nothing}


def run(case: Case, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By variant, and by "eager" or "compiled": the seconds of the first call, which compiles,
    milliseconds of others, and peak bytes; or an error."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model, inputs = case.make(args.blocks, args.tiny)
    model = cast(model, dtype).to(args.device)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            wide = not x.is_floating_point() or name in EXACT
            inputs[name] = x.to(args.device, None if wide else dtype)
    counts = {"device": args.device, "l2": "cold", "iterations": args.repeats, "warmup": 0}
    rows: dict[str, dict[str, Any]] = {}
    changes = variants(case, args.tiny)
    modes = {"eager": list(changes)}
    if args.compile != "none" and getattr(model, "_repeated_blocks", None):
        modes["compiled"] = ["torch", next(iter(case.variants))]
    if args.only_compile:
        del modes["eager"]

    def call() -> object:
        return model(**inputs, return_dict=False)[0]

    for mode, names in modes.items():
        if mode == "compiled":
            model.compile_repeated_blocks(fullgraph=True, backend=args.compile)
        for name in names:
            torch.compiler.reset()
            row = rows.setdefault(name, {})
            try:
                with changes[name](model), torch.inference_mode():
                    row[mode] = {"first_s": first(call, args.device)}
                    if args.only_compile:
                        continue
                    row[mode]["peak_bytes"] = peak_bytes(call, args.device)
                    row[mode]["call"] = timing.measure({name: call}, **counts)[name].median
            except Exception as error:  # one variant does not stop the others
                row[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    return rows


def first(call: Callable[[], object], device: str) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - began, 2)


def precompile(args: argparse.Namespace) -> None:
    """Compiles the blocks of all cases at the same time, each in a process."""
    cases = [name for name in args.case if CASES[name].variants is not None]
    given = {"blocks": args.blocks, "seed": args.seed, "dtype": args.dtype, "device": args.device}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    options += ["--compile", args.compile, "--only-compile", *["--tiny"] * args.tiny]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(cases)))
    surroundings = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    began = time.perf_counter()
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.studies.models", "--case", name, *options],
            env=surroundings,
        )
        for name in cases
    }
    for name, process in running.items():
        if process.wait():
            print(f"{name}: compiling it alone ended with {process.returncode}", file=sys.stderr)
    print(f"compiled {len(cases)} models in {time.perf_counter() - began:.0f} s", flush=True)


def shares(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Attention's share of each eager call."""
    left = rows[NOTHING]["eager"].get("call")
    calls = {name: row["eager"].get("call") for name, row in rows.items() if name != NOTHING}
    return {name: 1 - left / call for name, call in calls.items() if left and call}


def more_memory(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Variants and modes whose peak is above that of dense attention, in the same mode."""
    found = []
    for mode in ("eager", "compiled"):
        peaks = {name: row.get(mode, {}).get("peak_bytes") for name, row in rows.items()}
        dense = peaks.get("dense") or peaks.get("torch")
        if dense:
            above = (name for name, peak in peaks.items() if peak and peak > 1.005 * dense)
            found += [f"{name} ({mode})" for name in above if name != "torch"]
    return found


def table(name: str, case: Case, rows: dict[str, dict[str, Any]], blocks: int) -> str:
    cut = "all blocks" if case.variants is None else (
        f"{sum(min(blocks, n) for n in case.blocks)} of {sum(case.blocks)} blocks"
    )  # fmt: skip
    grid = "x".join(map(str, case.grid))
    lines = [f"{name}: {case.what}, grid {grid}, {case.tokens} tokens, {cut}"]
    for mode in ("eager", "compiled"):
        found = {n: row[mode] for n, row in rows.items() if mode in row}
        if not found:
            continue
        base = next((row["call"] for row in found.values() if "call" in row), 0.0)
        lines.append(f"{mode:22}{'call, ms':>11}{'speedup':>9}{'attention':>11}{'peak, MiB':>11}")
        part = shares(rows) if mode == "eager" else {}
        for variant, row in found.items():
            if "error" in row:
                lines.append(f"{variant:22}{row['error']}")
                continue
            share = f"{part[variant]:.0%}" if variant in part else ""
            size = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            speedup = base / row["call"]
            lines.append(f"{variant:22}{row['call']:11.4g}{speedup:8.2f}x{share:>11}{size:>11}")
    if above := more_memory(rows):
        lines.append(f"more memory than dense attention: {', '.join(above)}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.models",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--blocks", type=report.at_least_one, default=2, metavar="N", help="of each kind"
    )
    p.add_argument("--repeats", type=report.at_least_one, default=2, metavar="N")
    p.add_argument(
        "--compile", choices=("inductor", "eager", "none"), default="inductor",
        help="backend of the second run of each variant; none: without it",
    )  # fmt: skip
    p.add_argument("--precompile", action="store_true", help="compile all models at once, first")
    p.add_argument("--only-compile", action="store_true", help="measure nothing, write nothing")
    model_options.add(p, CASES, RESULTS)
    return p


def main(argv: list[str] | None = None) -> int:
    args = model_options.parse(parser(), argv, CASES)
    if args.only_compile:
        found = [run(CASES[name], args) for name in args.case]
        errors = [
            m["error"]
            for rows in found
            for row in rows.values()
            for m in row.values()
            if "error" in m
        ]
        print(*errors, sep="\n", file=sys.stderr)
        return len(errors)
    import diffusers

    if args.precompile and args.compile != "none":
        precompile(args)

    out = report.out_of(args, RESULTS)
    results = environment.results(
        args.device,
        settings={
            "iterations": args.repeats,
            "seed": args.seed,
            "dtype": args.dtype,
            "blocks": args.blocks,
            "compile": args.compile,
        },
        models=[],
    )
    results["versions"]["diffusers"] = diffusers.__version__
    for name in args.case:
        case, began = CASES[name], time.perf_counter()
        rows = run(case, args)
        print(f"\n{table(name, case, rows, args.blocks)}")
        print(f"took {time.perf_counter() - began:.0f} s", flush=True)
        facts = {fact: getattr(case, fact) for fact in ("what", "grid", "tokens", "blocks")}
        results["models"].append({"case": name, **facts, "rows": rows, "shares": shares(rows)})
        report.keep_so_far(results, out)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    report.keep(results, out)
    return 0


if __name__ == "__main__":
    with one_line_errors(install="sparse-fmha[diffusers]"):
        sys.exit(main())
