"""Backward passes: dense beside cuDNN through torch, neighborhoods and block lists.

    python -m benchmarks.studies.backward [--case NAME] [--flex] [--tiny] [--out PATH]

With --flex, FlexAttention runs beside ours, compiled for each case: on grids of more axes than one
with its tokens in tiles, copies into and out of them included. Where it has no kernel, as for
gradients of lists of 64x64 blocks, its row is missing and the reason is printed.

A call is the backward op alone: row terms, dQ, dK and dV. The lse has no gradient of its own.
Operations are 2.5 times those of the forward pass over the pairs that are visible. Windows do not
shrink at borders, so they have as many pairs everywhere. The error is that of the gradient of q
against fp64, at the size that --tiny runs, relative to its largest element.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch._inductor.exc import InductorError, LoweringException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from benchmarks.cases import case as cases
from benchmarks.cases.block_lists import Lists
from benchmarks.harness import report, study, timing
from benchmarks.harness.names import UnavailableError
from sparse_fmha import BlockMask, reference, selection
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "backward"
HEADER = ["case", "op", "ms", "p10", "p90", "TFLOP/s", "error of dq"]
TOKENS, WIDTH = 32768, 2048  # batch * length, heads * head dim


@dataclass(frozen=True)
class Case:
    """One problem; exactly one of the last three says which keys a query sees."""

    name: str
    grid: tuple[int, ...]
    heads: int
    head_dim: int = 128
    heads_kv: int | None = None
    batch: int = 1
    causal: bool | None = None
    window: tuple[int, ...] | None = None
    blocks: tuple[int, int, float] | None = None  # block_q, block_kv, share of the blocks
    stride: tuple[int, ...] | int = 1

    def tiny(self) -> Case:
        """The same with few tokens."""
        sides = tuple(min(side, {1: 256, 2: 16, 3: 8}[len(self.grid)]) for side in self.grid)
        window = self.window and tuple(map(min, self.window, (side // 2 for side in sides)))
        stride = min(self.stride, 4) if isinstance(self.stride, int) else 1
        size = {"grid": sides, "window": window, "stride": stride, "batch": 1}
        heads = 2 if self.heads_kv is None else 4
        return Case(**{**asdict(self), **size, "heads": heads, "heads_kv": self.heads_kv and 2})

    def of_peers(self, device: str, dtype: torch.dtype) -> cases.Case:
        """The same problem as peers know it."""
        axes, tokens = len(self.grid), math.prod(self.grid)
        lists = None
        grid: dict[str, object]
        if self.window:
            stride = (self.stride,) * axes if isinstance(self.stride, int) else self.stride
            grid = {"grid": self.grid, "window": self.window, "stride": stride}
            grid |= {"dilation": (1,) * axes, "causal": (False,) * axes}
        else:
            grid = {"causal": bool(self.causal)}
        if self.blocks:
            block_q, block_kv, share = self.blocks
            columns = tokens // block_kv
            lists = Lists(block_q, block_kv, max(int(columns * share), 1) / columns, "uniform")
        return cases.Case(
            self.name, device, str(dtype).removeprefix("torch."), self.batch, tokens, self.heads,
            self.heads_kv or self.heads, self.head_dim, lists=lists, **grid,
        )  # fmt: skip

    def pairs(self) -> float:
        """Visible pairs of one head."""
        tokens = math.prod(self.grid)
        if self.window:
            return tokens * math.prod(self.window)
        if self.blocks:
            _, block_kv, share = self.blocks
            return tokens * block_kv * max(int(tokens // block_kv * share), 1)
        return tokens * (tokens + 1) / 2 if self.causal else tokens * tokens


def dense(head_dim: int, length: int, causal: bool, heads: int | None = None) -> Case:
    name = f"D{head_dim} {'causal' if causal else 'full'} {length // 1024}k"
    own = WIDTH // head_dim
    grouped = {} if heads is None else {"heads_kv": heads}
    return Case(
        name + (f" {2 * own}/{heads} heads" if heads else ""), (length,),
        2 * own if heads else own, head_dim, batch=TOKENS // length, causal=causal, **grouped,
    )  # fmt: skip


CASES = (
    *(dense(d, n, c) for d in (64, 128, 256) for c in (False, True) for n in (4096, 16384)),
    *(dense(128, 8192, c, heads=8) for c in (False, True)),
    Case("FLUX", (256, 256), 24, window=(80, 80)),
    Case("FLUX, stride 16", (256, 256), 24, window=(80, 80), stride=16),
    Case("HunyuanVideo", (30, 48, 80), 24, window=(18, 24, 24)),
    Case("HunyuanVideo, stride 16x8x8", (30, 48, 80), 24, window=(18, 24, 24), stride=(16, 8, 8)),
    Case("Cosmos", (16, 44, 80), 32, window=(16, 24, 16)),
    Case("1-D", (32768,), 16, window=(2048,)),
    Case("1-D, stride 256", (32768,), 16, window=(2048,), stride=256),
    Case("lists 128x128", (32768,), 24, blocks=(128, 128, 0.1)),
    Case("lists 64x64", (32768,), 24, blocks=(64, 64, 0.1)),
    Case("lists 128x16", (32768,), 24, blocks=(128, 16, 0.1)),
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.studies.backward", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [case.name for case in CASES]
    p.add_argument("--case", choices=names, metavar="NAME", action="append", help="default: all")
    p.add_argument("--flex", action="store_true", help="measure FlexAttention, too: minutes more")
    report.add_op_options(p, RESULTS)
    return p


def attention_of(case: Case, device: str, seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """The call, and which query sees which key, of at most 2048 tokens."""
    tokens = math.prod(case.grid)
    small = tokens <= 2048
    everything = torch.ones(1 if not small else tokens, tokens, dtype=torch.bool, device=device)
    if case.window:
        axes = len(case.grid)
        stride = (case.stride,) * axes if isinstance(case.stride, int) else case.stride
        options = {"window": case.window, "stride": stride}
        visible = (
            reference.neighborhood_mask(case.grid, case.window, stride, device=device)
            if small
            else everything
        )
        return lambda q, k, v: sparse_fmha.neighborhood_attention(q, k, v, **options), visible
    if case.blocks:
        block_q, block_kv, share = case.blocks
        generator = torch.Generator(device).manual_seed(seed)
        sizes = 1, case.heads, -(-tokens // block_q), -(-tokens // block_kv)
        scores = torch.rand(sizes, generator=generator, device=device)
        lists = selection.top_k_indices(scores, max(int(tokens // block_kv * share), 1))
        mask = BlockMask(*lists, tokens, tokens, block_q, block_kv)
        visible = mask.to_dense() if small else everything
        return lambda q, k, v: sparse_fmha.block_sparse_attention(q, k, v, mask), visible
    visible = reference.causal_mask(tokens, tokens, device) if case.causal and small else everything
    return lambda q, k, v: sparse_fmha.attention(q, k, v, causal=case.causal), visible


def problem(case: Case, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k and v, which want gradients, and the gradient of out."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = case.heads, case.heads_kv or case.heads, case.heads_kv or case.heads, case.heads
    found = []
    for h in heads:
        shape = case.batch, *case.grid, h, case.head_dim
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        found.append(x)
    return [*(x.requires_grad_() for x in found[:3]), found[3]]


def backward(out: Tensor, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def error(case: Case, device: str, dtype: torch.dtype, seed: int) -> float:
    """Of the gradient of q of the small problem, relative to its largest element."""
    small = case.tiny()
    attend, visible = attention_of(small, device, seed)
    q, k, v, dout = problem(small, device, dtype, seed)
    (found,) = torch.autograd.grad(attend(q, k, v), [q], dout)
    wide = q.detach().double().requires_grad_()
    out, _ = reference.attention(wide, k.detach().double(), v.detach().double(), visible)
    (expected,) = torch.autograd.grad(out, [wide], dout.double().reshape(out.shape))
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def flex_op(case: Case, inputs: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """FlexAttention's call; its lists are drawn anew, as many blocks in each row."""
    from benchmarks.peers import flex as peer

    call = peer.flex_tiled if len(case.grid) > 1 else peer.flex
    return call(case.of_peers("cuda", dtype), *(x.flatten(1, -3) for x in inputs))


def flex_backward(
    case: Case, inputs: Sequence[Tensor], dout: Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    try:
        out = flex_op(case, inputs, dtype)()
    except (InductorError, LoweringException) as error:  # its gradients are compiled with it
        raise UnavailableError(str(error).partition(". ")[0]) from error
    return backward(out, inputs, dout.reshape(out.shape))


def rows_of(case: Case, args: argparse.Namespace, device: str, dtype: torch.dtype) -> list[dict]:
    of_error = error(case, device, dtype, args.seed)
    case = case.tiny() if args.tiny else case
    attend, _ = attention_of(case, device, args.seed)
    q, k, v, dout = problem(case, device, dtype, args.seed)
    ops = {"sparse_fmha": backward(attend(q, k, v), (q, k, v), dout)}
    beside = case.causal is not None and case.heads_kv is None and case.head_dim <= 128
    if beside and device == "cuda":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            heads_first = [x.transpose(1, 2) for x in (q, k, v)]
            out = scaled_dot_product_attention(*heads_first, is_causal=case.causal)
        ops["cuDNN"] = backward(out, (q, k, v), dout.transpose(1, 2))
    if args.flex and device == "cuda":
        try:
            ops["FlexAttention"] = flex_backward(case, (q, k, v), dout, dtype)
        except UnavailableError as reason:
            print(f"{case.name}: FlexAttention has no kernel: {reason}", file=sys.stderr)
    times = timing.measure(
        ops, device=device, l2="cold", iterations=args.iterations, warmup=1, seed=args.seed
    )
    flops = 2.5 * 4 * case.batch * case.heads * case.head_dim * case.pairs()
    return [
        {"case": case.name, "op": name, "ms": asdict(ms), "useful_flops": flops,
         "error": of_error if name == "sparse_fmha" else None}
        for name, ms in times.items()
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        ms = row["ms"]
        lines.append([
            row["case"], row["op"], *(f"{ms[x]:.4g}" for x in ("median", "p10", "p90")),
            f"{row['useful_flops'] / ms['median'] * 1e-9:.3g}",
            f"{row['error']:.1e}" if row["error"] is not None else "",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def measure(_: dict, args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    chosen = [case for case in CASES if not args.case or case.name in args.case]
    return {"rows": [row for case in chosen for row in rows_of(case, args, device, dtype)]}


def main(argv: list[str] | None = None) -> int:
    return study.run(parser().parse_args(argv), RESULTS, measure, table)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
