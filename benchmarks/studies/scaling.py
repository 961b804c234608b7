"""Sequence parallel attention on 2 to all GPUs of one host, beside one GPU.

    torchrun --nproc-per-node 8 -m benchmarks.studies.scaling
    torchrun --nproc-per-node 2 -m benchmarks.studies.scaling --tiny    # CPU, gloo: to try it

The sequence has the same length on any number of ranks, and times are those of the slowest rank,
from a barrier on. Communication is the same call with a function that computes nothing; nothing
overlaps, so the rest is computing. The difference is that to one GPU, root mean square, relative.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

import sparse_fmha
import sparse_fmha.distributed as sd
from benchmarks.harness import environment, report, timing
from benchmarks.tables import scaling as scaling_table
from sparse_fmha import BlockMask
from sparse_fmha.cli import one_line_errors

RESULTS = report.RESULTS / "scaling"
BLOCK = 128
TINY = {"length": 1024, "heads": 8, "heads_kv": 4, "head_dim": 16, "dtype": "float32"}
HEADER = [
    "op", "way", "ranks", "ms", "p10", "p90", "speedup", "efficiency", "TFLOP/s per rank",
    "communication", "MB sent per rank", "difference",
]  # fmt: skip


@dataclass(frozen=True)
class Op:
    """A function of whole tensors, and the ways to run it on several ranks."""

    function: Callable[..., Tensor]
    ways: tuple[str, ...]
    options: dict = field(default_factory=dict)
    masked: bool = False


OPS = {
    "full": Op(sparse_fmha.attention, ("ulysses", "all_gather_kv")),
    "causal": Op(
        sparse_fmha.attention, ("ulysses", "all_gather_kv", "zigzag"), {"causal": True}
    ),
    "block_sparse": Op(
        sparse_fmha.block_sparse_attention, ("ulysses", "all_gather_kv"), masked=True
    ),
}  # fmt: skip


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
    p.add_argument("--iterations", type=int, default=20, metavar="N", help="timed calls")
    p.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed calls before them")
    p.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try it")
    report.add_options(p, RESULTS)
    return p


def sizes(world: int) -> list[int]:
    """Numbers of ranks to measure: powers of two, and all."""
    return sorted({2**i for i in range(1, world.bit_length()) if 2**i < world} | {world})


def divides(ranks: int, args: argparse.Namespace) -> bool:
    """Whether ulysses takes the numbers of heads."""
    return args.heads % ranks == 0 and (args.heads_kv % ranks == 0 or ranks % args.heads_kv == 0)


def ways(op: Op, ranks: int, args: argparse.Namespace) -> list[str]:
    """Those that take the numbers of heads."""
    return [way for way in op.ways if divides(ranks, args) or way != "ulysses"]


def tensors(args: argparse.Namespace, device: str) -> list[Tensor]:
    """The same q, k and v on every rank."""
    generator = torch.Generator(device).manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    return [
        torch.randn(
            1, args.length, heads, args.head_dim, generator=generator, device=device, dtype=dtype
        )
        for heads in (args.heads, args.heads_kv, args.heads_kv)
    ]


def random_mask(args: argparse.Namespace, device: str) -> BlockMask:
    """As many blocks in each row of each head, and the same ones on every rank."""
    generator = torch.Generator(device).manual_seed(args.seed)
    rows = args.length // BLOCK
    listed = max(1, round(args.density * rows))
    indices = torch.empty(1, args.heads, rows, listed, dtype=torch.int32, device=device)
    for head in range(args.heads):
        scores = torch.rand(rows, rows, generator=generator, device=device)
        indices[0, head] = scores.topk(listed).indices.sort().values
    counts = torch.full(indices.shape[:3], listed, dtype=torch.int32, device=device)
    return BlockMask(counts, indices, args.length, args.length, BLOCK, BLOCK)


def useful_flops(args: argparse.Namespace, name: str, mask: BlockMask | None) -> float:
    pairs = args.length * args.length
    if name == "causal":
        pairs = args.length * (args.length + 1) // 2
    elif mask is not None:
        pairs = pairs * mask.indices.shape[-1] / mask.blocks_kv
    return 4.0 * args.heads * args.head_dim * pairs


def sent_bytes(args: argparse.Namespace, way: str, ranks: int) -> float:
    """What a rank sends to the others, as docs/distributed.md has it."""
    per_head = args.length / ranks * args.head_dim * getattr(torch, args.dtype).itemsize
    if way == "ulysses":
        moved = 2 * args.heads + 2 * max(args.heads_kv, ranks)
        return per_head * moved * (ranks - 1) / ranks
    return per_head * 2 * args.heads_kv * (ranks - 1)


def computes_nothing(q: Tensor, *args: object, **options: object) -> Tensor:
    """In the place of attention: what is left of a call is communication."""
    return q


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


def run_way(
    op: Op, way: str, whole: list[Tensor], mask: BlockMask | None, expected: Tensor,
    group: dist.ProcessGroup, args: argparse.Namespace,
) -> dict:  # fmt: skip
    """Times and difference of one way on one number of ranks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    zigzag = way == "zigzag"

    def part(x: Tensor) -> Tensor:
        return sd.zigzag_shard(x, group=group) if zigzag else x.chunk(ranks, 1)[rank]

    parts = [part(x).contiguous() for x in whole]
    options = {"mask": mask, "group": group, "validate": False} | op.options
    if zigzag:
        options["zigzag"] = True
    function = sd.ulysses if way == "ulysses" else sd.all_gather_kv
    out = function(*parts, **options)
    right = part(expected).float()
    difference = (out.float() - right).norm() / right.norm()
    dist.all_reduce(difference, dist.ReduceOp.MAX, group=group)
    total = measure(lambda: function(*parts, **options), group, args)
    moved = measure(lambda: function(*parts, computes_nothing, **options), group, args)
    return {
        "way": way, "ranks": ranks, "ms": asdict(total), "communication_ms": asdict(moved),
        "sent_bytes": sent_bytes(args, way, ranks), "difference": difference.item(),
    }  # fmt: skip


def run_op(name: str, groups: dict[int, dist.ProcessGroup], args: argparse.Namespace) -> list[dict]:
    """One GPU, then every way on every number of ranks."""
    op, device = OPS[name], "cpu" if args.tiny else "cuda"
    whole = tensors(args, device)
    mask = random_mask(args, device) if op.masked else None
    arguments = whole if mask is None else [*whole, mask]
    expected = op.function(*arguments, **op.options)
    alone = measure(lambda: op.function(*arguments, **op.options), None, args)
    rows = [
        {"way": "one rank", "ranks": 1, "ms": asdict(alone), "communication_ms": None,
         "sent_bytes": 0.0, "difference": 0.0}
    ]  # fmt: skip
    for ranks, group in groups.items():
        for way in ways(op, ranks, args):
            if dist.get_rank() < ranks:
                rows.append(run_way(op, way, whole, mask, expected, group, args))
            dist.barrier()
    flops = useful_flops(args, name, mask)
    return [{"op": name, "useful_flops": flops} | row for row in rows]


def table(rows: list[dict]) -> str:
    lines = []
    for row, speedup, efficiency, share in scaling_table.compared(rows):
        ms = row["ms"]
        rate = row["useful_flops"] / row["ranks"] / ms["median"] * 1e-9
        lines.append([
            row["op"], row["way"], str(row["ranks"]),
            *(f"{ms[x]:.3g}" for x in ("median", "p10", "p90")), speedup, efficiency,
            f"{rate:.3g}", share, f"{row['sent_bytes'] * 1e-6:.3g}", f"{row['difference']:.1e}",
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
    if args.iterations < 1 or args.length % unit or not 0 < args.density <= 1:
        sys.exit(f"error: --iterations is at least 1, --length a multiple of {unit}, "
                 "--density in (0, 1]")  # fmt: skip
    results = {
        **report.stamp(),
        **environment.describe("cpu" if args.tiny else "cuda"),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "op")},
        "rows": [],
    }
    uneven = [n for n in sizes(world) if not divides(n, args)]
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
        report.keep(results, args.out or (None if args.tiny else RESULTS))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
