"""MInference's mix of heads, from its JSON files of patterns for each layer and head."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_int, check_q_and_k, plain_ints
from sparse_fmha.patterns.minference import minference_block_sparse
from sparse_fmha.patterns.per_head import HeadMethod, per_head_attention
from sparse_fmha.patterns.streaming_llm import streaming_llm
from sparse_fmha.patterns.vertical_slash import vertical_slash

HeadPattern = tuple[str, int, int]  # kind, columns (or first keys), diagonals (or recent keys)
KINDS = ("vertical_and_slash", "stream_llm", "block_sparse")
FALLBACK = ("vertical_and_slash", 1000, 6096)


def load_minference(source: str | Path | list[Any]) -> list[dict[int, HeadPattern]]:
    """Reads a file of MInference with the pattern of each layer and head.

    The file is a JSON list with an object for each layer; its keys are query heads, and its values
    `[kind, columns, diagonals, score]`, as in the `minference/configs` of its repository. Kinds are
    "vertical_and_slash", "stream_llm" (a window of `diagonals` recent keys, with `columns` first
    keys) and "block_sparse", whose numbers are not used. Scores of the search are dropped.

    Args:
        source: path of the file, or what `json.load` made of it.

    Returns:
        For each layer, a pattern by query head.

    Raises:
        ValueError, TypeError: the content has another form, or a kind is unknown.
    """
    layers = json.loads(Path(source).read_text()) if isinstance(source, str | Path) else source
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(
            f"source must have a list of objects, one for each layer, got {layers!r:.80}"
        )
    return [
        {
            _head(head, n): _pattern(value, f"layer {n}, head {head}")
            for head, value in layer.items()
        }
        for n, layer in enumerate(layers)
    ]


@plain_ints
def minference_heads(
    patterns: Mapping[int, HeadPattern],
    heads: int,
    q_len: int,
    kv_len: int,
    *,
    top_k: int = 100,
    block_q: int = 64,
    range_size: int = 64,
    device: torch.device | str = "cpu",
) -> list[tuple[list[int], HeadMethod]]:
    """Returns the methods of a layer's heads, for `per_head_attention`.

    Heads with the same pattern are chosen together. Keep the result for a length: masks of
    "stream_llm" heads are made here, which may wait for the device; the others are made in each
    call from q and k, which does not.

    Args:
        patterns: of one layer, from `load_minference`. Heads that are not there are vertical-slash
            with 1000 columns and 6096 diagonals, as in MInference.
        heads: query heads of the layer.
        q_len, kv_len: tokens.
        top_k: blocks of "block_sparse" heads; 100 in MInference, whatever the file says.
        block_q, range_size: of vertical-slash masks.
        device: of the model.

    Raises:
        ValueError, TypeError: a number is not allowed, or a kind or head is unknown.
    """
    check_instance("patterns", patterns, Mapping)
    check_int("heads", heads, 1)
    check_int("top_k", top_k)
    groups: dict[HeadPattern, list[int]] = {}
    for head in patterns:
        if not 0 <= head < heads:
            raise ValueError(f"patterns must have heads 0 to {heads - 1}, got {head}")
    for head in range(heads):
        pattern = _pattern(patterns.get(head, FALLBACK), f"head {head}")
        groups.setdefault(pattern, []).append(head)
    methods: list[tuple[list[int], HeadMethod]] = []
    for (kind, columns, diagonals), own in groups.items():
        method: HeadMethod
        if kind == "stream_llm":
            sizes = (q_len, kv_len)
            method = streaming_llm(
                *sizes, window=diagonals, sink=columns, block_q=64, block_kv=64, device=device
            )
        elif kind == "block_sparse":
            method = partial(minference_block_sparse, top_k=top_k)
        else:
            method = partial(
                vertical_slash,
                vertical=columns,
                slash=diagonals,
                block_q=block_q,
                range_size=range_size,
            )
        methods.append((own, method))
    return methods


@plain_ints
def minference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Mapping[int, HeadPattern],
    *,
    top_k: int = 100,
    scale: float | None = None,
    block_q: int = 64,
    range_size: int = 64,
) -> Tensor:
    """Computes causal attention of one layer with MInference's mix of heads.

    Source: Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", arXiv:2407.02490. At most two launches of attention: one under a
    `StripeMask` for vertical-slash heads, one under a `BlockMask` for the others. Methods of a
    layer that is called often are better made once, by `minference_heads`.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`, Lkv >= Lq, as in `attention`.
        patterns: of this layer, from `load_minference`.
        top_k, block_q, range_size: as in `minference_heads`.
        scale: scale of q.k in attention; selections use the default `D**-0.5`, which MInference
            uses, too.

    Returns:
        `[B, Lq, Hq, D]` in q's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as in `minference_heads` and `per_head_attention`.
    """
    check_q_and_k(q, k)
    options = {"top_k": top_k, "block_q": block_q, "range_size": range_size}
    sizes = q.shape[2], q.shape[1], k.shape[1]
    methods = minference_heads(patterns, *sizes, **options, device=q.device)
    return per_head_attention(q, k, v, methods, scale=scale)


def _head(name: str, layer: int) -> int:
    if not name.isdecimal():
        raise ValueError(f"heads of layer {layer} must be numbers, got {name!r}")
    return int(name)


def _pattern(value: Any, where: str) -> HeadPattern:
    if not isinstance(value, list | tuple) or len(value) < 3 or value[0] not in KINDS:
        raise ValueError(
            f"the pattern of {where} must be one of {', '.join(KINDS)} and two numbers, got "
            f"{value!r}"
        )
    numbers = [check_int(f"a number of {where}", number) for number in value[1:3]]
    return value[0], numbers[0], numbers[1]
