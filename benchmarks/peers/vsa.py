"""FastVideo's block-sparse attention as a peer: the Hopper kernel in the package fastvideo-kernel.

It takes lists of full blocks of 64x64 tokens, one for each head and query block.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

from benchmarks.cases import block_lists
from benchmarks.cases.case import Case
from benchmarks.harness import environment
from benchmarks.harness.names import UnavailableError

BLOCK = 64
HEAD_DIMS = (64, 128)


def vsa(case: Case, q, k, v):
    """The kernel reads [B, H, L, D] in memory; tensors are put there outside the op."""
    check(case)
    forward = load()
    lists = lists_of(case)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: forward(q, k, v, *lists)[0].transpose(1, 2)


def with_gradients(case: Case, q, k, v) -> torch.Tensor:
    """out [B, H, L, D] by the package's autograd function, of q, k, v [B, H, L, D] in memory.

    Its backward pass lists the blocks by keys in each call, as ours does, and rounds gradients that
    its kernel leaves in fp32.
    """
    check(case)
    load()
    from fastvideo_kernel import block_sparse_attn_from_indices

    indices, counts, sizes = lists_of(case)
    indices = indices[..., : int(counts.max())].contiguous()  # as wide as its callers pass them
    return block_sparse_attn_from_indices(q, k, v, indices, counts, sizes)[0]


def lists_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices and counts of each row's blocks, and how many tokens a block has."""
    blocks = block_lists.draw(case.lists, case.heads_q, case.length, case.device).blocks
    counts, indices = (x[None].contiguous() for x in block_lists.compact(blocks))
    sizes = torch.full((blocks.shape[-1],), BLOCK, dtype=torch.int32, device=blocks.device)
    return indices, counts, sizes


def check(case: Case) -> None:
    """UnavailableError where the kernel does not compute the case."""
    lists = case.lists
    if lists is None or lists.kind in ("partial", "selected"):
        raise UnavailableError("takes lists of full blocks")
    if (lists.block_q, lists.block_kv) != (BLOCK, BLOCK):
        raise UnavailableError("takes blocks of 64x64")
    if case.dtype != "bfloat16" or case.head_dim not in HEAD_DIMS:
        raise UnavailableError("takes bfloat16 and head dim 64 or 128")
    if case.heads_q != case.heads_kv or case.batch != 1:
        raise UnavailableError("takes one batch entry, and as many key heads as query heads")


def load():
    """The kernel; UnavailableError says why there is none."""
    package = importlib.util.find_spec("fastvideo_kernel")
    if package is None:
        raise UnavailableError("the package fastvideo-kernel is not installed")
    libraries = Path(package.submodule_search_locations[0]).parent / "fastvideo_kernel.libs"
    for library in libraries.glob("libcuda-*"):
        check_driver(library.resolve(), environment.nvidia_smi("driver_version"))
    try:
        from fastvideo_kernel._C.fastvideo_kernel_ops import block_sparse_fwd
    except (ImportError, OSError) as problem:
        raise UnavailableError(f"fastvideo-kernel does not load: {problem}") from problem
    return block_sparse_fwd


def check_driver(library: Path, driver: list[str] | None) -> None:
    """The package brings a libcuda of its own. Where that is newer than the driver its kernels end
    the process's CUDA context, and every case behind this one fails. A link to the driver's own
    library in the place of the file is as good as no file."""
    bundled = re.search(r"\.so\.(\d+(?:\.\d+)+)$", library.name)
    if not bundled:
        return
    if driver is None:
        raise UnavailableError("fastvideo-kernel brings a libcuda, and the driver is not known")
    theirs, ours = ([int(n) for n in x.split(".")] for x in (bundled[1], driver[0]))
    if theirs > ours:
        raise UnavailableError(
            f"fastvideo-kernel brings libcuda {bundled[1]}, newer than the driver {driver[0]}; "
            "put a link to the driver's libcuda.so.1 in its place"
        )
