"""The mask of a forward pass of transformers, as each layer reads it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparse_fmha.integrations._transformers_decode import seen_by_one
from sparse_fmha.integrations._transformers_rows import by_distance, by_lists
from sparse_fmha.masks import tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.tensor_fields import TensorFields

Runs = tuple[tuple[int, int], ...]  # of each batch entry
_ALL = slice(None)
_LAST = "the last queries of a prompt"


@dataclass(frozen=True)
class Plan(TensorFields):
    """The mask of a forward pass, made once and read by each layer.

    `mask` takes precedence over the other fields. `to` moves the plan with its mask: accelerate's
    hooks do so for layers on other devices.

    Attributes:
        causal: the mask is causal, aligned to the last query and key.
        window: size in keys of a causal sliding window, with as many queries as keys.
        mask: block lists, where neither causal nor window describes the mask.
        keys: number of keys, None for all; a cache may have unused room after them.
        runs: for each batch entry the first key that is not padding, and one past the last; None
            without padding.
        special: description of a feature other than causal and padding, or None.
        last: the call has only so many last ones of the queries, or None; `of_last` resolves it.
    """

    TENSORS: ClassVar = ("mask",)
    PLAIN: ClassVar = ("causal", "window", "keys", "runs", "special", "last")

    causal: bool = False
    window: int | None = None
    mask: BlockMask | None = field(default=None, repr=False)
    keys: int | None = None
    runs: Runs | None = None
    special: str | None = None
    last: int | None = None

    # What transformers asks of a mask that is made before the call of the model inside: for static
    # caches, and in PaliGemma; of its shape the last number.
    ndim: ClassVar = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, 1, self.keys or 0

    @property
    def dtype(self) -> torch.dtype:
        """Raises: models ask for it that compute with a mask's numbers before attention."""
        raise AttributeError(
            "the model computes with the numbers of its mask, as Doge and DeepSeek-V3.2 do; "
            "sparse_fmha makes none, so use attn_implementation='sdpa'"
        )

    def contiguous(self) -> Plan:
        return self

    def __getitem__(self, at: tuple[slice, slice, slice, slice]) -> Plan:
        """`plan[:, :, -n:, :]`, which Gemma 4 asks for where layers share keys of others."""
        rows = at[2] if isinstance(at, tuple) and len(at) == 4 else None
        if not isinstance(rows, slice) or at != (_ALL, _ALL, slice(rows.start, None), _ALL):
            raise TypeError(f"a plan has the parts [:, :, -n:, :] alone, got {at}")
        count = -(rows.start or 0)
        by_place = self.mask is not None or self.window is not None
        return replace(self, last=count) if count and by_place else self

    @functools.cached_property
    def of_lists(self) -> tuple[Tensor | None, Plan]:
        """Of the last queries of a mask: what one sees, if it is one; and their plan."""
        assert self.mask is not None, "the other forms need no lists"
        rows = by_lists(self.mask, min(self.last or self.mask.q_len, self.mask.q_len))
        made = Plan(mask=BlockMask.from_dense(rows), keys=self.keys, special=_LAST)
        if rows.shape[2] > 1 or torch.compiler.is_compiling():
            return None, made
        return seen_by_one(len(rows), rows.shape[3], 0, rows[:, 0, 0], rows.device), made


tensor_fields.register(Plan, "sparse_fmha.integrations.transformers.Plan")


def of_last(plan: Plan, query: Tensor) -> Plan | Tensor:
    """The plan of a call with some last queries, `[B, Hq, n, D]`; the keys of one."""
    if plan.last is None:
        return plan
    if plan.mask is not None:
        seen, lists = plan.of_lists
        return lists if seen is None else seen.expand(len(query), -1, -1, -1)
    keys, window, count = plan.keys, plan.window, query.shape[2]
    assert keys is not None, "windows are made with a number of keys"
    assert window is not None, "nothing else needs to know"
    if count == 1:
        return seen_by_one(len(query), keys, max(keys - window, 0), None, query.device)
    rows = by_distance(count, keys, window, query.device)
    return Plan(mask=BlockMask.from_dense(rows), keys=keys, special=_LAST)
