"""Measures one case: every op's time, rate and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.cases import Case
from benchmarks.errors import Oracle
from benchmarks.names import MATMUL, OURS
from benchmarks.peers import Build
from benchmarks.timing import measure

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def tensors(case: Case, seed: int) -> list[torch.Tensor]:
    """q, k, v of a normal distribution: the power that zeros would save is a faster clock."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    return [
        torch.randn(
            case.batch, case.length, heads, case.head_dim,
            generator=generator, device=case.device, dtype=dtype,
        )
        for heads in (case.heads_q, case.heads_kv, case.heads_kv)
    ]  # fmt: skip


def matmul(case: Case) -> Callable[[], torch.Tensor]:
    size = MATMUL_SIZE[case.device]
    dtype = getattr(torch, case.dtype)
    a, b = (torch.randn(size, size, device=case.device, dtype=dtype) for _ in range(2))
    return lambda: torch.matmul(a, b)


def kernel_of(case: Case, kernels: list[dict]) -> dict | None:
    """The row of the kernel table that serves the case."""
    arch = "cpu" if case.device == "cpu" else "sm90"
    wanted = (arch, case.dtype, case.mechanism)
    rows = [
        row
        for row in kernels
        if (row["arch"], row["dtype"], row["mechanism"]) == wanted
        and row["head_dim"] >= case.head_dim
    ]
    return min(rows, key=lambda row: row["head_dim"], default=None)


def run_case(
    case: Case, builders: dict[str, Build], kernels: list[dict], *,
    l2: list[str], iterations: int, warmup: int, seed: int,
) -> dict:  # fmt: skip
    """The case's record in the results file. A peer that cannot run the case is in `skipped` with
    its reason; RuntimeError when ours cannot."""
    q, k, v = tensors(case, seed)
    oracle = Oracle(case, q, k, v)
    ops = {MATMUL: matmul(case)}
    errors, skipped = {}, {}
    for name, build in builders.items():
        try:
            op = build(case, q, k, v)
            errors[name] = oracle.error(op())
        except RuntimeError as problem:
            if name == OURS:
                raise
            skipped[name] = str(problem).strip().splitlines()[0]
            continue
        ops[name] = op
    kernel = kernel_of(case, kernels)
    runs = []
    for state in l2:
        times = measure(
            ops, device=case.device, l2=state, iterations=iterations, warmup=warmup, seed=seed
        )
        matmul_flops = 2 * MATMUL_SIZE[case.device] ** 3
        matmul_tflops = matmul_flops / times[MATMUL].median * 1e-9
        for name, spread in times.items():
            run = {"op": name, "l2": state, "ms": asdict(spread)}
            if name == MATMUL:
                run["useful_tflops"] = matmul_tflops
            else:
                run["useful_tflops"] = case.useful_flops / spread.median * 1e-9
                run["percent_of_matmul"] = 100 * run["useful_tflops"] / matmul_tflops
                run["gbps"] = case.min_bytes / spread.median * 1e-6
                run["error"] = errors[name]
            if name == OURS and kernel:
                run["kernel"] = kernel["name"]
                executed = case.executed_flops(kernel)
                if executed:
                    run["executed_tflops"] = executed / spread.median * 1e-9
            runs.append(run)
    return {
        "name": case.name,
        "shape": case.shape(),
        "useful_flops": case.useful_flops,
        "min_bytes": case.min_bytes,
        "runs": runs,
        "skipped": skipped,
    }
