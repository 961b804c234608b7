"""Backward passes of peers.

Each is a function of a case, q, k and v, which want gradients, and the gradient of out. It returns
the call to time, or raises UnavailableError with the reason where there is no kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._inductor.exc import InductorError, LoweringException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases.gradients import Case, backward
from benchmarks.harness.names import UnavailableError
from benchmarks.peers import flex as flex_peer
from benchmarks.peers import vsa as vsa_peer

Peer = Callable[[Case, Sequence[Tensor], Tensor], Callable[[], object]]
NO_KERNEL = re.compile("No available kernel|cudnn", re.IGNORECASE)


def cudnn(case: Case, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], object]:
    """Through torch, which takes head dims and grouped heads as its version of cuDNN does."""
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in inputs),
                is_causal=bool(case.causal),
                enable_gqa=case.heads_kv is not None,
            )
        call = backward(out, inputs, dout.transpose(1, 2))
        call()  # plans are made here
    except RuntimeError as error:
        if not NO_KERNEL.search(str(error)):
            raise
        raise UnavailableError(str(error).partition("\n")[0]) from error
    return call


def flex_op(case: Case, inputs: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    """FlexAttention's forward call; its lists are drawn anew, as many blocks in each row."""
    if case.columns:
        raise UnavailableError("lone keys are no blocks")
    call = flex_peer.flex_tiled if len(case.grid) > 1 else flex_peer.flex
    return call(case.of_peers("cuda", dtype), *(x.flatten(1, -3) for x in inputs))


def flex(case: Case, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], object]:
    try:
        out = flex_op(case, inputs, dout.dtype)()
    except (InductorError, LoweringException) as error:  # its gradients are compiled with it
        raise UnavailableError(str(error).partition(". ")[0]) from error
    return backward(out, inputs, dout.reshape(out.shape))


def vsa(case: Case, inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], object]:
    """It reads [B, H, L, D] in memory; tensors are put there outside the call."""
    other = case.of_peers("cuda", dout.dtype)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    out = vsa_peer.with_gradients(other, *heads_first)
    return backward(out, heads_first, dout.transpose(1, 2).contiguous())


def peers_of(case: Case, with_flex: bool) -> dict[str, Peer]:
    """Those to try. FlexAttention takes seconds to compile each shape: of dense attention it runs
    head dim 128 at 16k tokens, and grouped heads."""
    found: dict[str, Peer] = {}
    if case.causal is not None:
        found["cuDNN"] = cudnn
    if case.blocks and case.blocks[:2] == (vsa_peer.BLOCK, vsa_peer.BLOCK):
        found["fastvideo-kernel"] = vsa
    dense = case.causal is not None and case.heads_kv is None
    if with_flex and (not dense or (case.head_dim, case.grid) == (128, (16384,))):
        found["FlexAttention"] = flex
    return found
