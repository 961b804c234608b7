"""Gradients of calls that skip key tiles, beside those of the same calls that skip none.

    python -m benchmarks.studies.skipping_gradients [--tiny] [--out PATH]

A call is one op: backward as autograd runs it, by the kernel of all gradients where there is one;
the same by two kernels, as under `torch.use_deterministic_algorithms(True)`; the backward pass
without skipping; and the forward pass, without and with what it saves for gradients. `x all` is the
time of the backward pass without skipping by that of the call; of forward passes, the time of the
one that saves nothing by that of the call. `skipped` is counted by the kernels. The error is that
of the gradient of q against fp64 by the same rule of skipping, at the size that --tiny runs,
relative to its largest element. Block lists, stripes and windows have no row of two kernels and no
error: the tests compare them with fp64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases.skipping import THRESHOLD, TILE_K, shape_scores
from benchmarks.harness import report, study, timing
from benchmarks.tables.skipping_gradients import ALL, FORWARD, TWO
from benchmarks.tables.skipping_gradients import BACKWARD as OURS
from benchmarks.tables.skipping_gradients import SAVES as SAVING
from sparse_fmha import BlockMask, StripeMask, reference, selection
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "skipping_gradients"
HEADER = ["case", "op", "ms", "p10", "p90", "x all", "skipped", "error of dq"]
TOKENS, WIDTH = 32768, 2048  # heads * head dim


@dataclass(frozen=True)
class Case:
    causal: bool
    percent: int  # of the key tiles that the inputs let a threshold skip
    together: int = 1  # tiles next to each other, all of which are skipped or none
    head_dim: int = 128
    tokens: int = TOKENS
    heads: int = 0  # 0: as many as make WIDTH
    mechanism: str = "attention"  # a key of MECHANISMS

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        kind = kind if self.mechanism == "attention" else self.mechanism
        runs = f", runs of {self.together}" if self.together > 1 else ""
        return f"D{self.head_dim} {kind} {self.percent}%{runs}"

    def tiny(self) -> Case:
        return replace(self, tokens=400, heads=2, together=1)


CASES = (
    *(Case(c, p) for c in (False, True) for p in (0, 50, 75, 90)),
    *(Case(c, 75, together=6) for c in (False, True)),
    *(Case(c, 75, head_dim=dim) for dim in (64, 256) for c in (False, True)),
    # Tiles of these are not those of TILE_K keys; long runs are low in whole tiles.
    *(Case(False, 75, together=8, mechanism=name) for name in ("block lists", "stripes", "window")),
)


def attention(case: Case, device: str, seed: int) -> Callable[..., Tensor]:
    return partial(sparse_fmha.attention, causal=case.causal)


def block_lists(case: Case, device: str, seed: int) -> Callable[..., Tensor]:
    """Half of the blocks of 128 queries and keys, at random."""
    blocks = -(-case.tokens // 128)
    generator = torch.Generator(device).manual_seed(seed)
    sizes = 1, case.heads or WIDTH // case.head_dim, blocks, blocks
    scores = torch.rand(sizes, generator=generator, device=device, dtype=torch.float32)
    lists = selection.top_k_indices(scores, -(-blocks // 2))
    mask = BlockMask(*lists, case.tokens, case.tokens, 128, 128)
    return partial(sparse_fmha.block_sparse_attention, mask=mask)


def stripes(case: Case, device: str, seed: int) -> Callable[..., Tensor]:
    """Every second key for each 512 queries."""
    columns = torch.arange(0, case.tokens, 2, device=device, dtype=torch.int32)
    groups = -(-case.tokens // 512)
    counts = torch.full((1, 1, groups), len(columns), device=device, dtype=torch.int32)
    columns = columns.expand(1, 1, groups, -1).contiguous()
    mask = StripeMask(columns, counts, case.tokens, case.tokens, 512)
    return partial(sparse_fmha.stripe_attention, mask=mask)


def window(case: Case, device: str, seed: int) -> Callable[..., Tensor]:
    """A quarter of the keys around a query of a sequence."""
    return partial(sparse_fmha.neighborhood_attention, window=case.tokens // 4)


MECHANISMS = {
    "attention": attention, "block lists": block_lists, "stripes": stripes, "window": window,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.skipping_gradients", description=__doc__
    )
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    report.add_op_options(p, RESULTS)
    return p


def problem(case: Case, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k and v, which want gradients, and the gradient of out."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = 1, case.tokens, case.heads or WIDTH // case.head_dim, case.head_dim
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)
    )
    shape_scores(q, k, case.percent, seed, case.together)
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def error(case: Case, device: str, dtype: torch.dtype, seed: int) -> float:
    case = case.tiny()
    q, k, v, dout = problem(case, device, dtype, seed)
    out = sparse_fmha.attention(q, k, v, causal=case.causal, skip_threshold=THRESHOLD)
    (found,) = torch.autograd.grad(out, [q], dout)
    wide = q.detach().double().requires_grad_()
    visible = torch.ones(case.tokens, case.tokens, dtype=torch.bool, device=device)
    visible = visible.tril() if case.causal else visible
    groups = torch.arange(case.tokens, device=device) // 64
    ranks = reference.tile_ranks(case.tokens, TILE_K, descending=True).to(device)
    exact, _, _ = reference.skip_attention(
        wide, k.detach().double(), v.detach().double(), visible, THRESHOLD, groups, ranks
    )
    (expected,) = torch.autograd.grad(exact, [wide], dout.double())
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def ops_of(
    case: Case, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, Callable]:
    def backward(**options: float) -> Callable[[], object]:
        out = attend(q, k, v, **options)
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    ops = {ALL: backward(), OURS: backward(skip_threshold=THRESHOLD)}
    given = q.detach(), k.detach(), v.detach()
    if case.mechanism != "attention":
        ops[FORWARD] = partial(attend, *given, skip_threshold=THRESHOLD)
        ops[SAVING] = partial(attend, q, k, v, skip_threshold=THRESHOLD)
        return ops
    torch.use_deterministic_algorithms(True)
    ops[TWO] = backward(skip_threshold=THRESHOLD)
    torch.use_deterministic_algorithms(False)
    threshold = torch.full((1,), THRESHOLD, device=q.device)
    for name, saves in ((FORWARD, False), (SAVING, True)):
        ops[name] = partial(
            torch.ops.sparse_fmha.fmha_fwd, *given, case.causal, None, threshold, save_skipped=saves
        )
    return ops


def rows_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    of_error = None
    if case.mechanism == "attention":
        of_error = error(case, device, dtype, args.seed)
    name = case.name
    case = case.tiny() if args.tiny else case
    tensors = problem(case, device, dtype, args.seed)
    attend = MECHANISMS[case.mechanism](case, device, args.seed)
    _, stats = attend(
        *(x.detach() for x in tensors[:3]), skip_threshold=THRESHOLD, return_stats=True
    )
    skipped = (stats.skipped.sum() / stats.visited.sum()).item()
    times = timing.measure(
        ops_of(case, attend, *tensors), device=device, l2="cold", iterations=args.iterations,
        warmup=1, seed=args.seed,
    )  # fmt: skip
    return [
        {"case": name, "op": op, "ms": asdict(ms), "skipped": skipped,
         "ratio": times[FORWARD if op in (FORWARD, SAVING) else ALL].median / ms.median,
         "error": of_error if op == OURS else None}
        for op, ms in times.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        ms = row["ms"]
        lines.append([
            row["case"], row["op"], *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
            f"{row['ratio']:.3f}", f"{row['skipped']:.1%}",
            f"{row['error']:.1e}" if row["error"] is not None else "",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def measure(_: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    return {"rows": [row for case in CASES for row in rows_of(case, args, device, dtype)]}


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
