"""`sparse-fmha report`: what one's GPU computes right and how fast, to paste into a report."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from sparse_fmha.cli import info
from sparse_fmha.cli.hold_outs import Outcome, outcomes

Op = Callable[[], object]
TIMES = ["case", "ms", "TFLOP/s", "torch, ms", "of torch's rate"]


def run(*, device: str | None, seed: int, arch: str | None = None) -> None:
    """Prints a block of Markdown.

    Args:
        device: "cpu" or "cuda"; None: a GPU if there is one.
        seed: of the drawn problems.
        arch: whose kernels a GPU takes, as in `sparse_fmha.arch_override`; None: its own.

    Raises:
        RuntimeError: there is no such device, this build has no kernels for it, or a result is
            wrong; the block has been printed then.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device cuda: {info.no_gpu()}")
    if device == "cpu" and arch is not None:
        raise ValueError(f"--arch is for GPUs, got {arch}")
    with contextlib.ExitStack() as stack:
        if device == "cuda":  # also what never ran on such a GPU
            sparse_fmha.allow_untested()
            stack.callback(sparse_fmha.allow_untested, False)
        if arch is not None:
            stack.enter_context(sparse_fmha.arch_override(arch))
        taken = arch_of(device)
        found = list(outcomes(taken, device, seed))
        wrong = sum(not outcome.is_right for outcome in found)
        try:
            times = markdown(TIMES, benchmark(device))
        except RuntimeError as error:  # after a fault a GPU computes nothing more
            times = f"The benchmark raised {' '.join(str(error).split())[:200]}."
    print(f"### sparse_fmha on {name_of(device)}\n")
    print(markdown(["what", "here"], facts(device, taken)) + "\n")
    print(f"Hold-outs, seed {seed}: {len(found) - wrong} of {len(found)} are right.\n")
    print(markdown(["case", "pass", "kernels", "error", "torch's", "result"], rows_of(found)))
    print(f"\nTimes of whole calls, {times_are(device)}.\n\n{times}")
    if wrong:
        raise RuntimeError(f"{wrong} of {len(found)} hold-outs are wrong; the table has them")


def arch_of(device: str) -> str:
    """The architecture whose kernels calls take; raises if this build lacks them."""
    from sparse_fmha._extension import _C

    if device == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    arch = _C.arch_for_call(major, minor)
    if reason := _C.why_no_image(arch, torch.cuda.get_device_name(), major, minor):
        raise RuntimeError(reason)
    return arch


def name_of(device: str) -> str:
    return info.cpu_name() if device == "cpu" else torch.cuda.get_device_name()


def facts(device: str, arch: str) -> Iterable[list[str]]:
    """Versions, the device, and what is known of it."""
    build = sparse_fmha.build_info()
    yield ["sparse_fmha", f"{sparse_fmha.__version__}, {', '.join(info.built_with(build))}"]
    yield ["torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"]
    yield ["Python", f"{platform.python_version()}, {platform.platform()}"]
    if device == "cpu":
        yield ["device", f"{info.cpu_name()}, {torch.get_num_threads()} threads"]
        return
    yield ["device", f"{info.devices()['cuda:0']}, {info.driver()}"]
    yield ["kernels", f"{arch}, status {info.status_on('cuda:0', arch)}"]
    yield ["GPU code", ", ".join(build["images"])]


def rows_of(found: Iterable[Outcome]) -> Iterable[list[str]]:
    for of in found:
        numbers = ("" if x is None else f"{x:.1e}" for x in (of.error, of.torchs))
        yield [of.case, of.passed, of.kernels, *numbers, of.verdict]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(x.replace("|", "/") for x in line) + " |" for line in lines)


def times_are(device: str) -> str:
    what = "float32" if device == "cpu" else "bfloat16"
    return f"batch 1, {heads_of(device)} heads, D128, {what}, medians; torch computes dense"


def heads_of(device: str) -> int:
    return 2 if device == "cpu" else 16


def benchmark(device: str) -> Iterable[list[str]]:
    """Times beside torch's dense attention on the same tensors; small on a CPU."""
    side, heads = (16 if device == "cpu" else 96), heads_of(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    length, window, block = side * side, side // 4, 64 if device == "cpu" else 128
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, 128, device=device, dtype=dtype, generator=generator)
        for _ in range(3)
    )
    gq, gk, gv = (x.view(1, side, side, heads, 128) for x in (q, k, v))
    blocks = length // block
    listed = torch.rand(1, 1, blocks, blocks, generator=generator, device=device) < 0.1
    listed |= torch.eye(blocks, dtype=torch.bool, device=device)
    mask = sparse_fmha.BlockMask.from_blocks(listed, length, length, block, block)
    tq, tk, tv = (x.transpose(1, 2) for x in (q, k, v))
    every = float(length) ** 2
    pairs = {
        "dense": every,
        "causal": (every + length) / 2,
        "neighborhood": every / 16,
        "block lists": listed.float().mean().item() * every,
    }
    ops: dict[str, Op] = {
        "dense": lambda: sparse_fmha.attention(q, k, v),
        "causal": lambda: sparse_fmha.attention(q, k, v, causal=True),
        "neighborhood": lambda: sparse_fmha.neighborhood_attention(gq, gk, gv, window),
        "block lists": lambda: sparse_fmha.block_sparse_attention(q, k, v, mask),
    }
    with torch.no_grad():
        dense = median_ms(device, lambda: scaled_dot_product_attention(tq, tk, tv))
        causal = median_ms(device, lambda: scaled_dot_product_attention(tq, tk, tv, is_causal=True))
        for name, op in ops.items():
            ms = median_ms(device, op)
            beside = causal if name == "causal" else dense
            rate = 4 * heads * 128 * pairs[name] / ms * 1e-9
            yield [name, f"{ms:.3g}", f"{rate:.3g}", f"{beside:.3g}", f"{beside / ms:.2f}"]


def median_ms(device: str, op: Op, calls: int = 10) -> float:
    op()
    if device == "cpu":
        samples = []
        for _ in range(calls):
            begun = time.perf_counter()
            op()
            samples.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(samples)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in events:
        start.record()
        op()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events))
