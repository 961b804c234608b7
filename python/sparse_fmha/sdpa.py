"""Attention with the signature of torch's SDPA, and routing of a model's calls to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._routing import torch_only
from sparse_fmha._routing.call_mode import CallMode, count_compiled
from sparse_fmha._routing.sdpa_call import Refusal, SdpaCall, arrange, check_kernel, refusals

TORCH_SDPA = torch.nn.functional.scaled_dot_product_attention


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on the kernels of this library.

    Tensors are used as views, without copies. A mask is converted to block lists.

    Args:
        query: `[B, H, L, D]`, or `[B, L, D]` for one head. For dtypes, D and strides see
            `attention`.
        key: `[B, Hkv, S, D]`. Hkv is 1 or H; with `enable_gqa` any divisor of H.
        value: `[B, Hkv, S, Dv]`.
        attn_mask: bool, broadcastable to `[B, H, L, S]`, with at least the last two dimensions;
            True: the pair is visible. It is evaluated block by block, and blocks without a visible
            pair cost nothing.
        dropout_p: must be 0.
        is_causal: query i sees key j only if `j <= i`, aligned to the first query and key, as in
            torch; `attention(causal=True)` is aligned to the last.
        scale: factor of q.k; default `D**-0.5`.
        enable_gqa: allow fewer heads of key and value than of query.

    Returns:
        `[B, H, L, Dv]` or `[B, L, Dv]`, with memory layout `[B, L, H, Dv]`. A query that sees no
        key has output 0, as in torch.

    Raises:
        NotImplementedError: dropout, a mask of numbers, forward-mode derivatives, an unsupported
            number of dimensions, or tensors or a scale that `attention` does not allow.
        ValueError: both a mask and `is_causal`, or a mask or heads that do not match.
        TypeError: an argument of the wrong type, or a nested or sparse tensor.
        RuntimeError: see `attention`.
    """
    try:
        call = arrange(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except NotImplementedError as error:
        raise NotImplementedError(f"sparse_fmha.sdpa: {error}") from error
    return call.run()


class route_sdpa(CallMode):  # noqa: N801  (used as a function: with route_sdpa())
    """Context manager that routes a model's calls of torch's SDPA to `sdpa`.

    Use it as `with route_sdpa() as routes:`. A call that `sdpa` refuses goes to torch unchanged and
    is counted by reason. The same holds for calls inside `torch.compile` (counted once, at
    compilation), `torch.jit.trace` and transforms of `torch.func`; for tensor subclasses that
    handle torch's functions themselves; for a scale of 0 or less; and on the CPU for scores that
    overflow or values that are not finite. `torch.nn.attention.sdpa_kernel` affects only those
    calls. Calls that torch makes inside its own functions, as in `nn.MultiheadAttention`, are not
    intercepted.

    Attributes:
        routed: number of calls that went to `sdpa`.
        left: calls that went to torch, counted by reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routed = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not TORCH_SDPA:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            count_compiled("route_sdpa")
            return func(*args, **kwargs)
        try:
            call = _own(*args, **kwargs)
        except Refusal as refusal:
            self.left[str(refusal)] += 1
            return func(*args, **kwargs)
        self.routed += 1
        return call.run()

    def __str__(self) -> str:
        lines = [f"{self.routed} calls routed to sparse_fmha"]
        lines += [f"{count} left to torch: {reason}" for reason, count in self.left.most_common()]
        return "\n".join(lines)


def _own(*args: Any, **kwargs: Any) -> SdpaCall:
    """Translates a call of torch to one of this library, or raises `Refusal` before running it."""
    with refusals():
        torch_only.check_eager([*args, *kwargs.values()])
        call = arrange(*args, **kwargs)
        if call.mask is not None:
            torch_only.check_readable()
        torch_only.check_values(call.q, call.k, call.v, call.scale)
        check_kernel(call)
    return call
