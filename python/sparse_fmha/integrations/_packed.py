"""What the interfaces of other libraries to packed sequences share."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.attention._scores import checked_softcap
from sparse_fmha.masks.packed import Window
from sparse_fmha.varlen.checks import check_varlen
from sparse_fmha.varlen.lists import over_lists
from sparse_fmha.varlen.pages import over_pages
from sparse_fmha.varlen.sequences import varlen_attention, with_sink


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    scale: float | None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns out and lse `[Tq, Hq]`; a window other than (-1, -1) and (-1, 0) runs over lists."""
    if len(window) != 2:
        raise ValueError(f"window_size must be (left, right), got {window!r}")
    left, right = (_checks.check_int("window_size", bound, -1) for bound in window)
    if left < 0 and right <= 0:
        return varlen_attention(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            causal=right == 0,
            seqused_k=seqused_k,
            page_table=page_table,
            scale=scale,
            softcap=softcap,
            sink=sink,
            return_lse=True,
        )
    check_varlen(q, k, v, cu_q, cu_k, max_q, max_k, False, seqused_k, page_table)
    lists = (q, k, v, cu_q, cu_k, max_q, max_k, False, seqused_k)
    scale, bounds = _checks.finite("scale", scale), Window(left, right)
    cap = checked_softcap(softcap)
    if page_table is not None:
        out, lse = over_pages(*lists, page_table, scale, window=bounds, softcap=cap)
    else:
        assert cu_k is not None  # checked
        out, lse = over_lists(q, k, v, cu_q, cu_k, *lists[5:], scale, window=bounds, softcap=cap)
    return (out, lse) if sink is None else with_sink(out, lse, sink, cu_q)
