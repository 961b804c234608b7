"""`sparse-fmha explain`."""

from __future__ import annotations

import torch
from torch import Tensor

import sparse_fmha
from sparse_fmha._sizes import ceil_div
from sparse_fmha.cli.options import flags_of, numbers_of, sequence_of
from sparse_fmha.cost.explanation import Explanation

OPTIONS_OF = {
    "dense": ("causal",),
    "neighborhood": ("window", "stride", "dilation", "causal", "extra"),
    "block-sparse": ("density", "block_q", "block_kv", "causal"),
}


def run(
    *,
    mechanism: str,
    tokens: str,
    why_not: bool,
    arch: str,
    dtype: str,
    batch: int,
    heads: int,
    head_dim: int,
    heads_kv: int | None = None,
    **options: str | int | float,
) -> None:
    """Prints the output of `sparse_fmha.explain` for a call with such tensors; computes nothing.

    Raises:
        ValueError, TypeError: bad input.
        ImportError: the extension `_C` is missing for this Python.
    """
    for name in options:
        if name not in OPTIONS_OF[mechanism]:
            allowed = ", ".join(map(_option, OPTIONS_OF[mechanism]))
            raise ValueError(f"options of {mechanism} must be among {allowed}, got {_option(name)}")
    grid = sequence_of("TOKENS", tokens)
    for name, count in (("--batch", batch), ("--heads", heads), ("TOKENS", min(grid))):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    keys = heads if heads_kv is None else heads_kv
    if arch == "auto":
        arch = _arch_here()
    q, k = (
        torch.empty(batch, *grid, n, head_dim, dtype=getattr(torch, dtype), device="meta")
        for n in (heads, keys)
    )
    found = _explained(mechanism, q, k, arch, options)
    print(found)
    if why_not:
        print(found.why_not())


def _explained(
    mechanism: str, q: Tensor, k: Tensor, arch: str, options: dict[str, str | int | float]
) -> Explanation:
    given = {name: value for name, value in options.items() if isinstance(value, str)}
    causal = flags_of("--causal", given.get("causal", "0"))
    if mechanism == "neighborhood":
        if "window" not in given:
            raise ValueError("--window must be given for neighborhood")
        numbers = {
            name: numbers_of(_option(name), given[name])
            for name in ("window", "stride", "dilation")
            if name in given
        }
        extra = int(options.get("extra", 0))
        if extra < 0:
            raise ValueError(f"--extra must be at least 0, got {extra}")
        tensors = {}
        if extra:
            shape = (q.shape[0], extra, *k.shape[-2:])
            tensors = {name: k.new_empty(shape) for name in ("extra_k", "extra_v")}
        return sparse_fmha.explain(
            sparse_fmha.neighborhood_attention,
            *(q, k, k),
            **numbers,
            **tensors,
            causal=causal,
            arch=arch,
        )
    if q.dim() != 4:
        raise ValueError(f"TOKENS must be one number for {mechanism}, got {q.dim() - 3} axes")
    if mechanism == "dense":
        return sparse_fmha.explain(sparse_fmha.attention, q, k, k, causal=causal, arch=arch)
    if "density" not in options:
        raise ValueError("--density must be given for block-sparse")
    sizes = q.shape[1], q.shape[1]
    blocks = int(options.get("block_q", 128)), int(options.get("block_kv", 128))
    mask = _drawn(sizes, blocks, causal, float(options["density"]))
    return sparse_fmha.explain(sparse_fmha.block_sparse_attention, q, k, k, mask, arch=arch)


def _drawn(
    sizes: tuple[int, int], blocks: tuple[int, int], causal: object, density: float
) -> sparse_fmha.BlockMask:
    """Draws random blocks: in each row a fraction `density` of those that causality leaves."""
    if not isinstance(causal, bool):
        raise ValueError("--causal must have one entry for block-sparse, got several")
    grid = sparse_fmha.BlockGrid(*sizes, *blocks, causal=causal)
    shape = tuple(ceil_div(length, block) for length, block in zip(sizes, blocks, strict=True))
    generator = torch.Generator("cpu").manual_seed(0)
    scores = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    scores = scores.masked_fill(~grid.reachable(), -torch.inf)
    return grid.mask(sparse_fmha.selection.top_k_blocks(scores, density=density))


def _arch_here() -> str:
    """The architecture of the GPU that torch finds, or the CPU."""
    from sparse_fmha._extension import _C

    if not torch.cuda.is_available():
        return "cpu"
    found: str = _C.arch_of_capability(*torch.cuda.get_device_capability())
    return found


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
