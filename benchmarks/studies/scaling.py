"""Sequence parallel attention on 2 to all GPUs of one host, beside one GPU.

    torchrun --nproc-per-node 8 -m benchmarks.studies.scaling
    torchrun --nproc-per-node 2 -m benchmarks.studies.scaling --tiny    # CPU, gloo: to try it

The sequence has the same length on any number of ranks, and times are those of the slowest rank,
from a barrier on. Communication is the same call with a function that computes nothing; it runs
under computing only "in slices" and in pass_kv, which has no such call. "torch" is its context
parallelism with cuDNN, "torch flex" that with FlexAttention. GB are those of a rank at the highest
point, of which each has the whole sequence too, to compare. The difference is that to one GPU, root
mean square, relative. NCCL uses no multicast of NVLink unless NCCL_NVLS_ENABLE is set.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import environment, report, timing
from benchmarks.studies import scaling_ways
from benchmarks.studies.scaling_ops import (
    BLOCK,
    FLEX,
    OPS,
    SDPA,
    TINY,
    Op,
    of_op,
    random_mask,
    tensors,
    useful_flops,
)
from benchmarks.tables import scaling as scaling_table
from sparse_fmha import BlockMask
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "scaling"
WITH_BACKWARD = " with backward"
HEADER = [
    "op", "way", "ranks", "ms", "p10", "p90", "speedup", "efficiency", "TFLOP/s per rank",
    "communication", "MB sent per rank", "GB", "difference",
]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m benchmarks.studies.scaling",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--op", choices=OPS, action="append", help="default: all")
    p.add_argument("--length", type=int, default=131072, metavar="N", help="of the whole sequence")
    p.add_argument("--heads", type=int, default=32, metavar="N")
    p.add_argument("--heads-kv", type=int, default=8, metavar="N")
    p.add_argument("--head-dim", type=int, default=128, metavar="N")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    p.add_argument("--density", type=float, default=0.1, help="of random blocks of 128x128")
    p.add_argument("--slices", type=int, default=4, metavar="N", help="at most, of heads")
    p.add_argument(
        "--backward", action="store_true", help="also both passes, but for ops that choose"
    )
    p.add_argument(
        "--iterations", type=report.at_least_one, default=20, metavar="N", help="timed calls"
    )
    p.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed calls before them")
    p.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try it")
    report.add_options(p, RESULTS)
    return p


def sizes(world: int) -> list[int]:
    """Numbers of ranks to measure: powers of two, and all."""
    return sorted({2**i for i in range(1, world.bit_length()) if 2**i < world} | {world})


def sent_bytes(args: argparse.Namespace, way: str, ranks: int) -> float:
    """What a rank sends to the others forward, as docs/distributed.md has it; for pass_kv at most.

    That of torch with cuDNN is for as many key heads as query heads.
    """
    per_head = args.length / ranks * args.head_dim * getattr(torch, args.dtype).itemsize
    if way.startswith("ulysses"):
        moved = 2 * args.heads + 2 * max(args.heads_kv, ranks)
        return per_head * moved * (ranks - 1) / ranks
    heads = args.heads if way == SDPA else args.heads_kv
    return per_head * 2 * heads * (ranks - 1)


def measure(
    call: Callable[[], object], group: dist.ProcessGroup | None, args: argparse.Namespace
) -> timing.Spread:
    """Milliseconds of the slowest rank."""
    clock = timing.CpuClock() if args.tiny else timing.CudaClock()
    for _ in range(args.warmup + args.iterations):
        dist.barrier(group)
        clock.time("", call)
    device = "cpu" if args.tiny else "cuda"
    times = torch.tensor([ms for _, ms in clock.read()][args.warmup :], device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    return timing.spread(times.tolist())


def passes(
    op: Op, call: Callable[..., Tensor], parts: list[Tensor], args: argparse.Namespace
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The forward pass, and with --backward both, by the end of the op's name.

    They return out, or the gradients of q, k and v for that of out being q.
    """
    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {"": lambda: (call(*parts),)}
    if args.backward and not op.chooses:
        leaves = [x.detach().requires_grad_() for x in parts]

        def both() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                out = call(*leaves)
            return torch.autograd.grad(out, leaves, parts[0])

        found[WITH_BACKWARD] = both
    return found


def peak(op: Callable[[], object], args: argparse.Namespace) -> float:
    """Bytes that a rank holds at the highest point of a call, with what it held before."""
    if args.tiny:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    op()
    return float(torch.cuda.max_memory_allocated())


def relative(x: Tensor, right: Tensor) -> Tensor:
    return (x.float() - right.float()).norm() / right.float().norm()


def run_way(
    way: str, op: Op, whole: list[Tensor], mask: BlockMask | None,
    expected: dict[str, tuple[Tensor, ...]], group: dist.ProcessGroup, args: argparse.Namespace,
) -> dict[str, dict]:  # fmt: skip
    """Times and difference of one way on one number of ranks, for each pass."""
    ranks = dist.get_world_size(group)
    how = scaling_ways.made(way, op, mask, group, args)
    parts = [how.part(x) for x in whole]
    found = {}
    with how.context():
        for name, run in passes(op, how.call, parts, args).items():
            if name and not how.backward:
                continue
            pairs = zip(run(), map(how.part, expected[name]), strict=True)
            difference = torch.stack([relative(x, right) for x, right in pairs]).max()
            dist.all_reduce(difference, dist.ReduceOp.MAX, group=group)
            moved = None
            if how.moving is not None and not name:
                moved = asdict(measure(lambda: how.moving(*parts), group, args))
            found[name] = {
                "way": way, "ranks": ranks, "ms": asdict(measure(run, group, args)),
                "communication_ms": moved, "sent_bytes": sent_bytes(args, way, ranks),
                "peak_bytes": peak(run, args), "difference": difference.item(),
            }  # fmt: skip
    return found


def run_op(name: str, groups: dict[int, dist.ProcessGroup], args: argparse.Namespace) -> list[dict]:
    """One GPU, then every way on every number of ranks."""
    op, device = OPS[name], "cpu" if args.tiny else "cuda"
    args = of_op(op, args)
    whole = tensors(args, device)
    mask = random_mask(args, device) if op.masked else None
    given = () if mask is None else (mask,)

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op.function(q, k, v, *given, **args.options)

    found, expected = [], {}
    for end, run in passes(op, alone, whole, args).items():
        expected[end] = run()
        row = {
            "way": "one rank", "ranks": 1, "ms": asdict(measure(run, None, args)),
            "communication_ms": None, "sent_bytes": 0.0, "peak_bytes": peak(run, args),
            "difference": 0.0,
        }  # fmt: skip
        found.append((end, row))
    for ranks, group in groups.items():
        for way in scaling_ways.possible(op, ranks, args):
            if dist.get_rank() < ranks:
                try:
                    found += run_way(way, op, whole, mask, expected, group, args).items()
                except Exception as error:
                    if way not in (SDPA, FLEX):
                        raise
                    # An experimental API, which fails on all ranks alike.
                    reason = f"{type(error).__name__}: {error}"
                    print(f"{name}: {way}'s context parallelism: {reason}", file=sys.stderr)
            dist.barrier()
    flops = useful_flops(op, args, mask)
    # The backward pass has five products of matrices where the forward pass has two.
    return [
        {"op": name + end, "useful_flops": flops * (3.5 if end else 1.0)} | row
        for end, row in found
    ]


def table(rows: list[dict]) -> str:
    lines = []
    for row, speedup, efficiency, share in scaling_table.compared(rows):
        ms = row["ms"]
        rate = row["useful_flops"] / row["ranks"] / ms["median"] * 1e-9
        lines.append([
            row["op"], row["way"], str(row["ranks"]),
            *(f"{ms[x]:.3g}" for x in ("median", "p10", "p90")), speedup, efficiency,
            f"{rate:.3g}" if rate else "", share, f"{row['sent_bytes'] * 1e-6:.3g}",
            f"{row['peak_bytes'] * 1e-9:.3g}", f"{row['difference']:.1e}",
        ])  # fmt: skip
    return report.plain_table(HEADER, lines)


def start(args: argparse.Namespace) -> None:
    """Joins the ranks that torchrun started; exits with what is missing."""
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device, and this measures NCCL; --tiny runs on the CPU")
    if "RANK" not in os.environ:
        sys.exit(
            "error: no ranks; start it with "
            "torchrun --nproc-per-node N -m benchmarks.studies.scaling"
        )
    if int(os.environ["WORLD_SIZE"]) < 2:
        sys.exit(
            "error: there must be at least 2 ranks, got 1; run with torchrun --nproc-per-node 2"
        )
    if not args.tiny:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            sys.exit(f"error: rank {local} of this host has no GPU of its own; "
                     f"there are {torch.cuda.device_count()}")  # fmt: skip
        torch.cuda.set_device(local)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    changed = {name for name, value in vars(args).items() if value != p.get_default(name)}
    if args.tiny:
        for name in sorted(changed & TINY.keys()):
            p.error(f"--{name.replace('_', '-')} is of --tiny's own choice")
        vars(args).update(TINY)
    if "density" in changed and not any(OPS[name].masked for name in args.op or OPS):
        p.error(f"--density changes nothing for --op {' '.join(args.op)}")
    start(args)
    world, first = dist.get_world_size(), dist.get_rank() == 0
    unit = 2 * BLOCK * math.lcm(*sizes(world))
    if args.length % unit or not 0 < args.density <= 1:
        sys.exit(f"error: --length is a multiple of {unit}, --density in (0, 1]")
    results = environment.results(
        "cpu" if args.tiny else "cuda",
        settings={k: v for k, v in vars(args).items() if k not in ("out", "op")},
        rows=[],
    )
    uneven = [n for n in sizes(world) if not scaling_ways.divides(n, args)]
    if uneven and first:
        ranks = ", ".join(map(str, uneven))
        heads = f"--heads {args.heads} --heads-kv {args.heads_kv}"
        print(f"{heads}: ulysses does not take them on {ranks} ranks", file=sys.stderr)
    groups = {n: dist.new_group(list(range(n))) for n in sizes(world)}
    with torch.no_grad():
        for name in args.op or OPS:
            results["rows"] += run_op(name, groups, args)
    if first:
        print(table(results["rows"]), flush=True)
        report.keep(results, report.out_of(args, RESULTS))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
