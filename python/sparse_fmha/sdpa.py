"""Attention with the signature of torch's, and the routing of a model's calls to it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_fmha import _derivatives
from sparse_fmha._checks import DTYPES, MAX_HEAD_DIM
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.block_mask import BlockMask

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
        key, value: `[B, Hkv, S, D]`; as many heads as query, or with `enable_gqa` a divisor.
        attn_mask: bool, broadcastable to `[B, H, L, S]`; True takes part. It is evaluated block by
            block, and blocks without a pair cost nothing.
        dropout_p: 0.
        is_causal: query i sees key j only if `j <= i`, counted from the first of each, as torch
            has it; `attention(causal=True)` counts from the last.
        scale: of q.k; default `D**-0.5`.
        enable_gqa: heads of key and value may be fewer.

    Returns:
        Like query. A query that sees no key has 0, as in torch.

    Raises:
        NotImplementedError: dropout, a mask of numbers, derivatives, what no kernel takes.
        ValueError: both a mask and `is_causal`, heads that do not fit, shapes; as `attention`.
    """
    reason = unsupported(query, key, value, attn_mask, dropout_p)
    if reason is not None:
        raise NotImplementedError(f"sparse_fmha.sdpa: {reason}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask is given and is_causal is True; one of them is allowed")
    if not enable_gqa and query.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads, key has {key.shape[1]}; the same number is needed "
            "unless enable_gqa is True"
        )
    flat = query.dim() == 3
    q, k, v = (x.unsqueeze(2) if flat else x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None:
        mask = attn_mask.unsqueeze(-3) if flat and attn_mask.dim() == 3 else attn_mask
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, q.shape[1], k.shape[1])
        out = block_sparse_attention(q, k, v, BlockMask.from_dense(mask), scale=scale)
    elif not is_causal:
        out = attention(q, k, v, scale=scale)
    else:
        # Ours is aligned to the last query: the first queries have a square, the others see all.
        square = min(q.shape[1], k.shape[1])
        head = q[:, :square], k[:, :square], v[:, :square]
        out = attention(*head, causal=True, scale=scale)
        if square < q.shape[1]:
            out = torch.cat([out, attention(q[:, square:], k, v, scale=scale)], 1)
    return out.squeeze(2) if flat else out.transpose(1, 2)


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """Why `sdpa` does not compute what torch does, or None."""
    tensors = query, key, value
    allowed = DTYPES.get(query.device.type)
    if allowed is None:
        return f"query is on {query.device.type}"
    if query.dtype not in allowed:
        return f"query has dtype {query.dtype} on {query.device.type}"
    if query.dim() not in (3, 4) or any(x.dim() != query.dim() for x in tensors):
        return f"query has {query.dim()} dimensions; 3 or 4 are taken"
    if query.shape[-1] % 8 or query.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {query.shape[-1]}; multiples of 8 up to {MAX_HEAD_DIM} are taken"
    if value.shape[-1] != query.shape[-1]:
        return f"value has head dim {value.shape[-1]}, query has {query.shape[-1]}"
    if any(x.shape[0] != query.shape[0] for x in tensors):
        return "batches that are broadcast"
    if any(x.numel() and x.stride(-1) != 1 for x in tensors):
        return "a last dimension with a stride other than 1"
    if dropout_p:
        return f"dropout_p is {dropout_p}; only 0 is there"
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return f"attn_mask has dtype {attn_mask.dtype}; only torch.bool is there"
    if any(map(_derivatives.requires_grad, tensors)):
        return "gradients are asked for; there is no backward pass yet"
    if any(map(_derivatives.has_tangent, tensors)):
        return "forward-mode derivatives are asked for; there are none"
    return None


class route_sdpa(TorchFunctionMode):  # noqa: N801  (used as a function: with route_sdpa())
    """Inside `with route_sdpa() as routes:` a model's calls of torch's SDPA go to `sdpa`.

    Calls that `sdpa` does not compute go to torch, and are counted: nothing is routed in silence.
    Not seen are compiled graphs (compile inside), and calls that torch makes within its own
    functions, as in `nn.MultiheadAttention`.

    Attributes:
        routed: calls that went to `sdpa`.
        left: calls that went to torch, by their reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routed = 0
        self.left: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not TORCH_SDPA:
            return func(*args, **kwargs)
        reason = self._reason(*args, **kwargs)
        if reason is not None:
            self.left[reason] += 1
            return func(*args, **kwargs)
        self.routed += 1
        return sdpa(*args, **kwargs)

    @staticmethod
    def _reason(query, key, value, attn_mask=None, dropout_p=0.0, *_args, **_kwargs) -> str | None:
        return unsupported(query, key, value, attn_mask, dropout_p)

    def __str__(self) -> str:
        lines = [f"{self.routed} calls routed to sparse_fmha"]
        lines += [f"{count} left to torch: {reason}" for reason, count in self.left.most_common()]
        return "\n".join(lines)
