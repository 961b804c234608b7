"""Attention with the signature of torch's, and the routing of a model's calls to it."""

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
    """`torch.nn.functional.scaled_dot_product_attention`, by the kernels of this library.

    Tensors are taken as views: nothing is copied but a mask into lists of blocks.

    Args:
        query: `[B, H, L, D]`, or `[B, L, D]` as with one head. Dtypes, D and strides as
            `attention`.
        key, value: `[B, Hkv, S, D]`; as many heads as query or one, or with `enable_gqa` a divisor.
        attn_mask: bool, broadcastable to `[B, H, L, S]`, with the last two dimensions at least;
            True takes part. It is evaluated block by block, and blocks without a pair cost nothing.
        dropout_p: 0.
        is_causal: query i sees key j only if `j <= i`, counted from the first of each, as torch
            has it; `attention(causal=True)` counts from the last.
        scale: of q.k; default `D**-0.5`.
        enable_gqa: heads of key and value may be fewer.

    Returns:
        Like query, in memory as `[B, L, H, D]`. A query that sees no key has 0, as in torch.

    Raises:
        NotImplementedError: dropout, a mask of numbers, forward-mode derivatives, another number
            of dimensions, and tensors and a scale that `attention` does not allow.
        ValueError: both a mask and `is_causal`, a mask or heads that do not fit.
        TypeError: an argument of the wrong type, nested and sparse tensors.
        RuntimeError: as `attention`.
    """
    try:
        call = arrange(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except NotImplementedError as error:
        raise NotImplementedError(f"sparse_fmha.sdpa: {error}") from error
    return call.run()


class route_sdpa(CallMode):  # noqa: N801  (used as a function: with route_sdpa())
    """Inside `with route_sdpa() as routes:` a model's calls of torch's SDPA go to `sdpa`.

    A call that `sdpa` refuses goes to torch as it is and is counted by the reason, and so are calls
    inside `torch.compile` (each once, when it is compiled), `torch.jit.trace` and transforms of
    `torch.func`, those on subclasses of tensors that handle torch's functions themselves, those
    with a scale of 0 or less, and on the CPU those whose scores overflow or whose values are not
    finite. `torch.nn.attention.sdpa_kernel` chooses for those calls only. Not seen are calls that
    torch makes within its own functions, as in `nn.MultiheadAttention`.

    Attributes:
        routed: calls that went to `sdpa`.
        left: calls that went to torch, by their reason.
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
    """The call of this library for a call of torch, or a `Refusal` before anything ran."""
    with refusals():
        torch_only.check_eager([*args, *kwargs.values()])
        call = arrange(*args, **kwargs)
        if call.mask is not None:
            torch_only.check_readable()
        torch_only.check_values(call.q, call.k, call.v, call.scale)
        check_kernel(call)
    return call
