"""torch's context parallelism, beside which benchmarks.studies.scaling measures.

Both forms are experimental in torch, and most of their names are private there.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sparse_fmha.distributed as sd
from benchmarks.studies.scaling_ops import SDPA, Way, even
from sparse_fmha import BlockMask


def runs_on_cpu(way: str) -> bool:
    """cuDNN does not."""
    return way != SDPA


def made(
    way: str, mask: BlockMask | None, group: dist.ProcessGroup, args: argparse.Namespace
) -> Way:
    """The way on the ranks of a group."""
    causal = bool(args.options.get("causal"))
    mesh = DeviceMesh.from_group(group, "cpu" if args.tiny else "cuda")
    part = even(dist.get_rank(group), mesh.size())
    if causal:
        # Its order of heads and tails is our zig-zag order.
        part = functools.partial(sd.zigzag_shard, group=group)
    if way == SDPA:
        return Way(part, _sdpa(causal), context=functools.partial(_replaced, mesh, causal))
    # FlexAttention on the CPU has no backward pass.
    return Way(part, _flex(mesh, mask, causal, args), backward=not args.tiny)


def _sdpa(causal: bool) -> Callable[..., Tensor]:
    """A call in `_replaced`, with cuDNN.

    It does not take fewer key heads than query heads, so k and v are repeated, which is timed too.
    """

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return call


@contextmanager
def _replaced(mesh: DeviceMesh, causal: bool) -> Iterator[None]:
    """Replaces the function in `functional`, and shards tensors: here one that is not used.

    Only `causal` can be balanced, which it does if 2 * ranks divide the tokens.
    """
    from torch.distributed.tensor.experimental import context_parallel

    buffer = torch.zeros(mesh.size() * (2 if causal else 1), device=mesh.device_type)
    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]),
    ):
        yield


def _flex(
    mesh: DeviceMesh, mask: BlockMask | None, causal: bool, args: argparse.Namespace
) -> Callable[..., Tensor]:
    """FlexAttention of a rank's queries over the keys of all, which are gathered before."""
    from torch.distributed.tensor.experimental import _attention

    lists: FlexMask | None = None
    if mask is not None:
        rows = mask.counts.shape[2] // mesh.size()
        own = slice(mesh.get_local_rank() * rows, (mesh.get_local_rank() + 1) * rows)
        length = args.length // mesh.size()
        of_rank = mask.counts[:, :, own], mask.indices[:, :, own], length, args.length
        lists = BlockMask(*of_rank, mask.block_q, mask.block_kv).to_flex()
    elif causal:
        whole = create_block_mask(
            lambda b, h, i, j: i >= j, 1, 1, args.length, args.length,
            device=mesh.device_type, _compile=not args.tiny,
        )  # fmt: skip
        order = _attention._HeadTailLoadBalancer(args.length, mesh.size(), mesh.device_type)
        # It compiles the making of masks, which the CPU need not wait for.
        with torch.compiler.set_stance("force_eager") if args.tiny else nullcontext():
            (lists,) = _attention._context_parallel_shard(mesh, [whole], [0], order)
    attend = flex_attention if args.tiny else torch.compile(flex_attention, dynamic=False)
    module = _Attend(functools.partial(attend, block_mask=lists, enable_gqa=True))
    kind = _attention._ContextParallel.AttentionType.FLEX
    _attention._ContextParallel(2, kind)._apply(module, mesh)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return call


class _Attend(nn.Module):
    """A module for torch to put its hooks on."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)
