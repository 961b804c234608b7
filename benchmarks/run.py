"""Measures one case: every op's time, rate and error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

import sparse_fmha
from benchmarks.cases import selection, skipping
from benchmarks.cases.case import Case
from benchmarks.cases.errors import Oracle
from benchmarks.harness.names import DENSE, MATMUL, OURS, UnavailableError
from benchmarks.harness.query_tile import query_tile
from benchmarks.harness.timing import measure
from benchmarks.peers.registry import DENSE_TOO, Build

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def tensors(case: Case, seed: int) -> list[torch.Tensor]:
    """q, k, v of a normal distribution: the power that zeros would save is a faster clock."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    return [
        torch.randn(
            case.batch, case.length, heads, dim,
            generator=generator, device=case.device, dtype=dtype,
        )
        for heads, dim in (
            (case.heads_q, case.head_dim), (case.heads_kv, case.head_dim),
            (case.heads_kv, case.dims[1]),
        )
    ]  # fmt: skip


def matmul(case: Case) -> Callable[[], torch.Tensor]:
    size = MATMUL_SIZE[case.device]
    dtype = getattr(torch, case.dtype)
    a, b = (torch.randn(size, size, device=case.device, dtype=dtype) for _ in range(2))
    return lambda: torch.matmul(a, b)


def kernel_of(case: Case, kernels: list[dict]) -> dict | None:
    """The row of the kernel table that serves the case."""
    if not kernels:
        return None
    arch = "cpu"
    if case.device == "cuda":
        from sparse_fmha import _C

        arch = _C.arch_of_capability(*torch.cuda.get_device_capability())
    wanted = (arch, "forward", case.dtype, case.mechanism, bool(case.skip))
    rows = [
        row
        for row in kernels
        if tuple(row[of] for of in ("arch", "pass", "dtype", "mechanism", "skips")) == wanted
        and row["head_dim"] >= case.head_dim
        and row["value_dim"] >= case.dims[1]
        and (arch == "cpu" or not row["key_bias"])
    ]
    smallest = min((_dims(row) for row in rows), default=None)
    rows = [row for row in rows if _dims(row) == smallest]
    if len(rows) > 1:
        instances = case.batch * case.heads_q
        tile = query_tile(bool(case.causal), case.head_dim, instances, case.length)
        rows.sort(key=lambda row: row["tile_q"] != tile)
    return rows[0] if rows else None


def _dims(row: dict) -> tuple[int, int]:
    return row["head_dim"], row["value_dim"]


def simulated(case: Case) -> dict:
    """What the library's tile simulator says of a neighborhood case on the GPU, {} of others.

    UnavailableError where the library, or its extension for this Python, has no simulator.
    """
    if case.device != "cuda" or not case.window:
        return {}
    try:
        result = sparse_fmha.simulate(
            case.grid, case.window, heads=case.heads_q, batch=case.batch, head_dim=case.head_dim,
            **case.options,
        )  # fmt: skip
        names = ("executed_flops", "useful_flops", "predicted_ms", "tile_q", "tile_k")
        return {name: getattr(result, name) for name in names}
    except (ImportError, AttributeError, ValueError) as problem:
        raise UnavailableError(problem) from problem


def variants(case: Case, builders: dict[str, Build]) -> dict[str, tuple[Case, Build]]:
    """By name, the ops of a case and what each computes: a sparse case is compared with dense
    attention over the same tokens, which does other work and has another result. Nobody but us
    makes a mask of ours."""
    found = {}
    for name, build in builders.items():
        if name == OURS or case.mechanism != "selection":
            found[name] = case, build
        # Where tiles are skipped the peers compute the dense result already.
        if case.dense_iterations and name in ({OURS} if case.skip else DENSE_TOO):
            found[name + DENSE] = case.dense, build
    return found


def oracle_of(case: Case, q, k, v) -> Oracle | selection.Oracle:
    """What knows the error of a result of the case."""
    return (selection.Oracle if case.mechanism == "selection" else Oracle)(case, q, k, v)


def run_of(
    name: str, case: Case, of: Case, kernels: list[dict], simulation: dict, ms: float
) -> dict:
    """What one op's time says; it computed `of`, which is `case` or dense attention instead."""
    run = {"useful_tflops": of.useful_flops / ms * 1e-9, "gbps": of.min_bytes / ms * 1e-6}
    if of != case:
        run["useful_flops"] = of.useful_flops
    ours = name.removesuffix(DENSE) == OURS
    kernel = kernel_of(of, kernels) if ours else None
    if kernel:
        run["kernel"] = kernel["name"]
    executed = of.executed_flops(kernel) if ours else None
    if name == OURS and simulation:
        executed = simulation["executed_flops"]
        run |= {key: simulation[key] for key in ("predicted_ms", "tile_q", "tile_k")}
    if executed:
        run["executed_tflops"] = executed / ms * 1e-9
    return run


def run_case(
    case: Case, builders: dict[str, Build], kernels: list[dict], *,
    l2: list[str], iterations: int, warmup: int, seed: int,
) -> dict:  # fmt: skip
    """The case's record in the results file. A peer that cannot run the case is in `skipped` with
    its reason; RuntimeError when ours cannot."""
    q, k, v = tensors(case, seed)
    if case.skip:
        skipping.shape_scores(q, k, case.skip, seed)
    work = variants(case, builders)
    oracles = {of: oracle_of(of, q, k, v) for of in {of for of, _ in work.values()}}
    ops = {MATMUL: matmul(case)}
    errors, skipped = {}, {}
    for name, (of, build) in work.items():
        try:
            op = build(of, q, k, v)
            errors[name] = oracles[of].error(op())
        except RuntimeError as problem:
            if name == OURS:
                raise
            skipped[name] = str(problem).strip().splitlines()[0]
            continue
        ops[name] = op
    simulation = {}
    try:
        simulation = simulated(case)
    except UnavailableError as problem:
        skipped["simulator"] = str(problem)
    slow = {name for name in ops if name.endswith(DENSE)}
    fewer = dict.fromkeys(slow, min(case.dense_iterations, iterations))
    runs = []
    for state in l2:
        times = measure(
            ops, device=case.device, l2=state, iterations=iterations, warmup=warmup, seed=seed,
            fewer=fewer,
        )  # fmt: skip
        matmul_flops = 2 * MATMUL_SIZE[case.device] ** 3
        matmul_tflops = matmul_flops / times[MATMUL].median * 1e-9
        for name, spread in times.items():
            run = {"op": name, "l2": state, "ms": asdict(spread)}
            if name == MATMUL:
                run["useful_tflops"] = matmul_tflops
            else:
                run |= run_of(name, case, work[name][0], kernels, simulation, spread.median)
                run["percent_of_matmul"] = 100 * run["useful_tflops"] / matmul_tflops
                run["error"] = errors[name]
            runs.append(run)
    if case.skip:
        for run in runs:
            if run["op"] == OURS:
                run["skipped_tiles"] = skipping.share(case, q, k, v)
    record = {
        "name": case.name,
        "shape": case.shape(),
        "useful_flops": case.useful_flops,
        "min_bytes": case.min_bytes,
        "runs": runs,
        "skipped": skipped,
    }
    return record | ({"simulated": simulation} if simulation else {})
