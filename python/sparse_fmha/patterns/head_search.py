"""Search of the method of each head, on one sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_qkv_of_one_dim
from sparse_fmha.attention import attention
from sparse_fmha.patterns.per_head import HeadMethod, per_head_attention


class HeadSearch(NamedTuple):
    """Result of `search_heads`."""

    best: list[str]  # the candidate of each query head
    errors: Tensor  # fp32 [candidates, Hq], in the order of the candidates

    def methods(self, candidates: Mapping[str, HeadMethod]) -> list[tuple[list[int], HeadMethod]]:
        """Returns the chosen methods with their heads, for `per_head_attention`.

        Args:
            candidates: by the same names, e.g. for another length.
        """
        groups: dict[str, list[int]] = {}
        for head, name in enumerate(self.best):
            groups.setdefault(name, []).append(head)
        return [(heads, candidates[name]) for name, heads in groups.items()]


@torch.no_grad()
def search_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    candidates: Mapping[str, HeadMethod],
    *,
    causal: bool = True,
    scale: float | None = None,
) -> HeadSearch:
    """Chooses for each head the candidate whose output is nearest to dense attention.

        error(c, h) = |out of c - dense out| / |dense out|, of all that head h puts out

    Source: the offline searches of MInference (Jiang et al. 2024, arXiv:2407.02490) and MMInference
    (Li et al. 2025, arXiv:2504.16083), which compare candidates of the same measured time by the
    error of the output on one sample; MMInference's has up to 25k tokens. They leave the norm open:
    MInference's code counts entries that differ by more than 5e-3. It is the caller who gives
    candidates of one cost. Among equal errors, the first wins.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`, as in `attention`.
        candidates: methods by name, each for all heads, as in `per_head_attention`.
        causal, scale: of dense attention and of attention under masks.

    Returns:
        The name for each head, and all errors. Waits for the device.

    Raises:
        ValueError, TypeError, RuntimeError: no candidates, or as in `per_head_attention`.
    """
    check_instance("candidates", candidates, Mapping)
    check_qkv_of_one_dim(q, k, v, axes=(1,))
    if not candidates:
        raise ValueError("candidates must have at least one method, got none")
    dense = attention(q, k, v, causal=causal, scale=scale).float()
    size = dense.square().sum((0, 1, 3)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    errors = []
    for method in candidates.values():
        out = per_head_attention(q, k, v, [(range(q.shape[2]), method)], scale=scale)
        errors.append((out.float() - dense).square().sum((0, 1, 3)).sqrt() / size)
    table = torch.stack(errors)
    names = list(candidates)
    return HeadSearch([names[n] for n in table.argmin(0).tolist()], table)
