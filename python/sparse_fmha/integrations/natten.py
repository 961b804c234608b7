"""Neighborhood attention with the names, arguments and layouts of NATTEN.

    from sparse_fmha.integrations import natten
    out = natten.na2d(query, key, value, kernel_size=7)

For code that calls NATTEN 0.20 or newer. What such a call computes is the same as there: Hassani et
al. 2025, "Generalized Neighborhood Attention", arXiv:2504.16922. `write_local_kernel` writes the
folder that lets programs load this module in place of the kernel `shi-labs/natten` of the Hub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from sparse_fmha.attention import neighborhood_attention
from sparse_fmha.integrations._natten_kernel import write_local_kernel
from sparse_fmha.merge import merge

__all__ = ["install", "merge_attentions", "na1d", "na2d", "na3d", "write_local_kernel"]

# Arguments that choose and tune NATTEN's kernels, with their defaults there.
TUNING: dict[str, object] = {
    "attention_kwargs": None,
    "backend": None,
    "q_tile_shape": None,
    "kv_tile_shape": None,
    "backward_q_tile_shape": None,
    "backward_kv_tile_shape": None,
    "backward_kv_splits": None,
    "backward_use_pt_reduction": False,
    "run_persistent_kernel": True,
    "kernel_schedule": None,
    "torch_compile": False,
}


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a sequence, by `sparse_fmha.neighborhood_attention`.

    Args:
        query: `[B, L, H, D]`. For dtypes, strides, D and devices see `sparse_fmha.attention`.
        key: `[B, L, H_kv, D]`; H is a multiple of H_kv.
        value: like key.
        kernel_size: keys that a query sees on each axis, at least 1.
        stride, dilation, is_causal: of each axis; one value is for all axes.
        scale: factor of query.key; None and, as in NATTEN, 0.0 are `D**-0.5`.
        additional_keys: `[B, N, H_kv, D]`, keys that every query sees too.
        additional_values: like additional_keys.
        return_lse: also return the log-sum-exp.
        **tuning: NATTEN's other arguments (backend, tile shapes, schedules). Only their defaults
            are allowed: the device, dtype and head dim choose the kernel here.

    Returns:
        `[B, L, H, D]` in the dtype of query; with `return_lse` also `[B, L, H]` in fp32, natural
        log. Both have gradients.

    Raises:
        ValueError: query has another rank, or an argument that tunes NATTEN's kernels is not its
            default; see also `sparse_fmha.neighborhood_attention`, whose q, k, v, window, causal,
            extra_k and extra_v are query, key, value, kernel_size, is_causal and the additional
            keys and values.
        TypeError: an argument that NATTEN does not have.
    """
    given = kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
    return _attend(1, query, key, value, *given, return_lse, tuning)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a grid `[B, Y, X, H, D]`; see `na1d`."""
    given = kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
    return _attend(2, query, key, value, *given, return_lse, tuning)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on a grid `[B, T, Y, X, H, D]`; see `na1d`."""
    given = kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values
    return _attend(3, query, key, value, *given, return_lse, tuning)


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merges attention over parts of the keys, by `sparse_fmha.merge`.

    Args:
        outputs: tensors `[B, *L, H, D]`.
        lse_tensors: as many tensors `[B, *L, H]`, natural logs.
        torch_compile, use_autograd_fix: of NATTEN. The result and its gradients are the same with
            either value of both.

    Returns:
        out and lse as `sparse_fmha.merge`, which also says what raises.
    """
    return merge(outputs, lse_tensors)


def install() -> None:
    """Makes `import natten` give this module, for programs that import it by that name.

    Call it before them. `natten.functional` then has the same functions. NATTEN's modules are not
    there, nor are its functions before 0.20 that make attention maps: those that transformers
    imports raise when they are called (`sparse_fmha.integrations.dinat` runs these models).

    Raises:
        RuntimeError: NATTEN itself has been imported.
    """
    here = sys.modules[__name__]
    if sys.modules.get("natten", here) is not here:
        raise RuntimeError("natten must not be imported before install(), got another natten")
    functional = ModuleType("natten.functional", "The functions of `sparse_fmha`'s natten.")
    for function in (merge_attentions, na1d, na2d, na3d, natten2dav, natten2dqkrpb):
        setattr(functional, function.__name__, function)
    sys.modules["natten"] = here
    sys.modules["natten.functional"] = functional
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is not None:  # it remembers what there was
        utils.is_natten_available.cache_clear()


def natten2dqkrpb(*_args: object, **_options: object) -> NoReturn:
    """Scores with relative positional biases, of NATTEN before 0.20.

    Raises:
        NotImplementedError: always.
    """
    _refuse_maps("natten2dqkrpb")


def natten2dav(*_args: object, **_options: object) -> NoReturn:
    """Products of attention maps and values, of NATTEN before 0.20.

    Raises:
        NotImplementedError: always.
    """
    _refuse_maps("natten2dav")


def _refuse_maps(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} is for attention maps, which this library does not make; for DiNAT in "
        "transformers call sparse_fmha.integrations.dinat.enable(model)"
    )


def _attend(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool] | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
    tuning: dict[str, object],
) -> Tensor | tuple[Tensor, Tensor]:
    for name, chosen in tuning.items():
        if name not in TUNING:
            raise TypeError(f"options of na{axes}d must be among {', '.join(TUNING)}, got {name!r}")
        if chosen != TUNING[name]:
            raise ValueError(
                f"{name} must be {TUNING[name]!r}, as it is for NATTEN's kernels, got {chosen!r}"
            )
    if query.dim() != axes + 3:
        raise ValueError(
            f"query must have {axes + 3} dimensions for na{axes}d (batch, {axes} of tokens, heads, "
            f"head dim), got shape {list(query.shape)}"
        )
    # mypy takes no overload for a bool that is not a literal beside optional statistics.
    result: Any = neighborhood_attention(
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        causal=False if is_causal is None else is_causal,
        scale=scale or None,
        extra_k=additional_keys,
        extra_v=additional_values,
        return_lse=return_lse,
    )
    checked: Tensor | tuple[Tensor, Tensor] = result
    return checked
