"""Decode attention and packed sequences of others.

A function of the tensors of a call returns the op to time; it raises UnavailableError with the
reason where the peer cannot run the call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases.decode import Call
from benchmarks.cases.packed import Sequences
from benchmarks.harness.names import UnavailableError
from benchmarks.peers.fa3 import INTERFACES

FLASHINFER = "flashinfer"
FLASHINFER_PAGE = 64  # of a contiguous cache
WORKSPACE_BYTES = 128 << 20
Op = Callable[[], torch.Tensor]


def module_of(*names: str) -> ModuleType:
    """The first of these modules that loads."""
    problems = []
    for name in names:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as problem:
            problems.append(f"{name} does not load: {problem}")
    raise UnavailableError("; ".join(problems))


def cudnn(call: Call) -> Op:
    """torch's SDPA; on the CPU, to try it, of another backend."""
    if call.page_table is not None or len(set(call.lengths)) > 1:
        raise UnavailableError("takes no pages and no lengths")
    backend = SDPBackend.CUDNN_ATTENTION if call.q.is_cuda else SDPBackend.MATH
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))

    def op() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2)

    return op


def fa3(call: Call) -> Op:
    attend = module_of(*INTERFACES).flash_attn_with_kvcache
    options = {"cache_seqlens": call.seq_lens, "page_table": call.page_table, "causal": True}
    return lambda: attend(call.q, call.k, call.v, **options)


def flashinfer(call: Call) -> Op:
    """Its plan is made on the host, outside of the op and of the graph."""
    library = module_of(FLASHINFER)
    k, v = call.k, call.v
    device = k.device
    if call.page_table is None:
        batch, rows, heads, dim = k.shape
        if rows % FLASHINFER_PAGE:
            raise UnavailableError(f"requests of {rows} rows are no pages of {FLASHINFER_PAGE}")
        k, v = (x.reshape(-1, FLASHINFER_PAGE, heads, dim) for x in (k, v))
        table = torch.arange(len(k), dtype=torch.int32, device=device).view(batch, -1)
    else:
        table = call.page_table
    page = k.shape[1]
    counts = [-(-n // page) for n in call.lengths]
    starts = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    indices = torch.cat([row[:n] for row, n in zip(table, counts, strict=True)])
    last = [n - (count - 1) * page for n, count in zip(call.lengths, counts, strict=True)]
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "NHD", use_tensor_cores=True, backend="fa2"
    )
    wrapper.plan(
        starts, indices, torch.tensor(last, dtype=torch.int32, device=device),
        call.q.shape[2], k.shape[2], k.shape[3], page,
        q_data_type=call.q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    q = call.q[:, 0]
    return lambda: wrapper.run(q, (k, v))[:, None]


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


DECODE: dict[str, Callable[[Call], Op]] = {"cudnn": cudnn, "fa3": fa3, "flashinfer": flashinfer}


def fa3_packed(given: Sequences) -> Op:
    attend = module_of(*INTERFACES).flash_attn_varlen_func
    lists = (given.cu_q, given.cu_k, *given.bounds)
    return lambda: attend(given.q, given.k, given.v, *lists, causal=True)


def fa3_chunks(given: Sequences) -> Op:
    attend = module_of(*INTERFACES).flash_attn_with_kvcache
    options = {
        "cache_seqlens": given.used, "page_table": given.page_table, "cu_seqlens_q": given.cu_q,
        "max_seqlen_q": given.bounds[0], "causal": True,
    }  # fmt: skip
    return lambda: attend(given.q, *given.paged, **options)
