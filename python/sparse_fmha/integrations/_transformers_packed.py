"""The attention of transformers' continuous batching: requests packed in one batch entry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_fmha.decode import decode_attention
from sparse_fmha.integrations import _packed

# transformers accepts names with "flash" for continuous batching, and makes no masks for them.
NAME = "sparse_fmha_flash"
# Unsupported options of models, by keyword.
REFUSED = {"position_bias": "position_bias"}


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | Mapping[str, Tensor] | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer.

    A batch in which each request has one token runs on `decode_attention`, another one on
    `varlen_attention`, or with a sliding window on `block_sparse_attention`. With a block table,
    there is one token for each request, which is written into the pages here; else key and value
    are gathered from transformers' cache.

    Args:
        query: `[1, Hq, T, D]`. key, value: `[1, Hkv, tokens, D]`, those in use of each request, or
            with a block table those of the new tokens.
        block_table: int32 `[requests, pages of a request]`. k_cache, v_cache: `[pages, page, Hkv,
            D]`.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: cu_q, cu_k, max_q and max_k of
            `varlen_attention`.
        sliding_window: a query sees itself and so many keys before, less one.
        s_aux: `[Hq]`, the sinks of gpt-oss.
        softcap: the cap of scores of Gemma 2.

    Raises:
        NotImplementedError: a call that is none of continuous batching, dropout, or an option of
            the model that is not supported.
    """
    name = type(module).__name__
    if isinstance(cu_seq_lens_k, Mapping):
        raise NotImplementedError(
            f"{NAME} needs a transformers whose paged cache is updated before the attention, such "
            "as 5.24; update it"
        )
    if not isinstance(cu_seq_lens_q, Tensor) or not isinstance(cu_seq_lens_k, Tensor):
        raise NotImplementedError(
            f"{NAME} is for generate_batch only, inside of continuous_batching(model), got another "
            f"call of {name}"
        )
    for option, what in REFUSED.items():
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"{NAME} does not support {what}, which {name} requests")
    if attention_mask is not None or dropout:
        raise NotImplementedError(
            f"{NAME} supports no attention_mask or dropout, which {name} requests"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scores: Any = {"scale": scaling, "softcap": float(softcap or 0)}
    scores["sink"] = None if s_aux is None else s_aux.float()
    requests = cu_seq_lens_q.shape[0] - 1
    if block_table is not None and k_cache is not None and v_cache is not None:
        lengths = cu_seq_lens_k[1 : len(q) + 1] - cu_seq_lens_k[: len(q)]
        _append(k, v, k_cache, v_cache, lengths, block_table)
        out = decode_attention(
            q[:, None],
            k_cache,
            v_cache,
            lengths,
            page_table=block_table,
            window=sliding_window,
            **scores,
        )
        return out.transpose(0, 1), None
    if max_length_q == 1 and q.shape[0] == requests:
        # One tensor is the cache of all requests, each a span of it.
        starts, stops = cu_seq_lens_k[:-1], cu_seq_lens_k[1:]
        out = decode_attention(
            q[:, None],
            k.expand(requests, -1, -1, -1),
            v.expand(requests, -1, -1, -1),
            stops,
            head_starts=starts[:, None].expand(-1, k.shape[1]),
            head_lengths=(stops - starts)[:, None].expand(-1, k.shape[1]),
            window=sliding_window,
            **scores,
        )
        return out.transpose(0, 1), None
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    sizes = (max_length_q, max_length_k)
    lists = (cu_seq_lens_q, cu_seq_lens_k)
    packed, _ = _packed.attend(q, k, v, *lists, *sizes, window, **scores)
    return packed[None], None


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor
) -> None:
    """Writes the newest key and value of each request into its page.

    Requests without keys are padding behind the others. They write what the first one writes.
    """
    own = torch.arange(len(lengths), device=lengths.device)
    own = torch.where(lengths > 0, own, 0)
    last = (lengths[own] - 1).clamp(min=0).long()
    page = k_cache.shape[1]
    place = table[own, last // page].clamp(min=0).long(), last % page
    is_there = (lengths[own] > 0)[:, None, None]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache[place] = torch.where(is_there, new[own], cache[place])


@contextlib.contextmanager
def _pages_in_place() -> Iterator[None]:
    """Inside, transformers hands a block table to this library's attention.

    It would do so for the packages of flash attention that it knows only.
    """
    try:
        from transformers.generation.continuous_batching import initialization as module
    except ImportError:  # an older version: keys are gathered
        yield
        return
    before = getattr(module, "ensure_decode_fast_path_is_available", None)
    if before is None:
        yield
        return

    def ensure(config: Any, cb_config: Any, user_requested: bool) -> None:
        groups = module.group_layers_by_attn_type(config)
        tables = all(module.ATTN_TYPE_TO_ALLOCATOR[x].supports_block_table for x in groups)
        if config._attn_implementation != NAME or not tables:
            before(config, cb_config, user_requested)

    module.ensure_decode_fast_path_is_available = ensure
    try:
        yield
    finally:
        module.ensure_decode_fast_path_is_available = before


@contextlib.contextmanager
def continuous_batching(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model.generate_batch` runs its attention on this library.

        with continuous_batching(model):
            outputs = model.generate_batch(prompts, generation_config)

    The requests, the cache in pages and the order of work are transformers' own. Steps of one token
    for each request read the pages in place, up to `max_blocks_per_request` pages of a
    `ContinuousBatchingConfig`; for others, and models with sliding windows, transformers gathers
    the keys. Needs `register()`.

    Args:
        model: a causal language model of transformers, with any attention.
    """
    config: Any = model.config
    before = config._attn_implementation
    # set_attn_implementation would look for a flash attention package of this name.
    config._attn_implementation = NAME
    try:
        with _pages_in_place():
            yield
    finally:
        config._attn_implementation = before
