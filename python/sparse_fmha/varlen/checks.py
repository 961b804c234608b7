"""Checks of the arguments of functions over packed sequences."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._ops import derivatives
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha._tables import check_table


def check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
) -> None:
    q, k, v = cast_where_enabled(q, k, v)
    check_packed(q, k, v, paged=page_table is not None)
    check_table("cu_q", cu_q, q.device, ("sequences + 1",))
    if not cu_q.shape[0]:
        raise ValueError("cu_q must have shape [sequences + 1], got [0]")
    batch = cu_q.shape[0] - 1
    if cu_k is not None:
        check_table("cu_k", cu_k, q.device, (batch + 1,))
    elif page_table is None or seqused_k is None:
        raise ValueError("cu_k must be given unless seqused_k and page_table are, got None")
    if seqused_k is not None:
        check_table("seqused_k", seqused_k, q.device, (batch,))
    if page_table is not None:
        check_table("page_table", page_table, q.device, (batch, "any"))
    _checks.check_int("max_q", max_q)
    _checks.check_int("max_k", max_k)
    _checks.check_flag("causal", causal)


def check_packed(q: Tensor, k: Tensor, v: Tensor, paged: bool = False) -> None:
    """Checks q `[Tq, Hq, D]`, k and v `[Tk, Hkv, D]` or `[pages, page, Hkv, D]`."""
    _checks.check_tensor("q", q)
    if q.dim() != 3:
        raise ValueError(f"q must have shape [tokens, heads, head dim], got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        _checks.check_strided(name, tensor)
        if tensor.dim() != (4 if paged else 3):
            wanted = "[pages, page, heads, head dim]" if paged else "[tokens, heads, head dim]"
            raise ValueError(f"{name} must have shape {wanted}, got {list(tensor.shape)}")
    if k.shape[-1] == q.shape[-1]:
        _checks.check_one_dim(q, v)
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape, {list(k.shape)}, got {list(v.shape)}")
    # The other rules are those of a batch; pages are like its entries.
    batch = k.shape[0] if paged else 1
    _checks.check_qkv(
        q[None].expand(batch, -1, -1, -1),
        *((k, v) if paged else (k[None], v[None])),
        axes=(1,),
    )


def check_out(out: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> None:
    if out is None:
        return
    (q,) = cast_where_enabled(q, k, v)[:1]
    _checks.check_strided("out", out)
    if out.dtype != q.dtype:
        raise TypeError(f"out must have the result's dtype, {q.dtype}, got {out.dtype}")
    if out.shape != q.shape or out.device != q.device:
        raise ValueError(
            f"out must have shape {list(q.shape)} on {q.device}, got {list(out.shape)} on "
            f"{out.device}"
        )
    _checks.check_written("out", out)
    if derivatives.wanted(q, k, v, sink, out):
        raise ValueError("out must be None where a gradient is wanted, got a tensor")
