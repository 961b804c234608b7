"""The attention backend "sparse_fmha" of diffusers.

diffusers passes a backend q, k, v and a mask, but not the grid or step. Processors of enabled
transformers set the call that they belong to; without one the backend runs torch's attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.integrations import _diffusion_parallel as parallel
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse
from sparse_fmha.integrations._diffusion_state import CURRENT, Call
from sparse_fmha.masks.block_mask import BlockMask

NAME = "sparse_fmha"


def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | FlexBlockMask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: object = None,
) -> Tensor:
    """Called by diffusers: q `[B, S, H, D]`, k and v `[B, S_kv, H_kv, D]` to out like q.

    Outside of enabled models it runs torch's attention, because `set_attention_backend` of one
    model makes a backend the default of all others; and block-sparse attention for models that
    make masks of FlexAttention themselves.
    """
    call, method = CURRENT.call, CURRENT.method
    options: dict[str, object] = {"dropout_p": dropout_p, "is_causal": is_causal}
    if call is None or method is None:
        if isinstance(attn_mask, FlexBlockMask):
            options["context parallelism"] = _parallel_config is not None
            _refuse("a call with a BlockMask", options)
            mask = BlockMask.from_flex(attn_mask)
            return block_sparse_attention(query, key, value, mask, scale=scale)
        out: Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            parallel_config=_parallel_config,
            backend=AttentionBackendName.NATIVE,
        )
        return out
    alone = query.shape[1] == key.shape[1] == call.layout.cached  # keys without queries there
    _refuse(call.model, {**options, "is_causal": is_causal and not alone})
    if isinstance(attn_mask, FlexBlockMask):
        raise NotImplementedError(f"a BlockMask of {call.model} beside a method is not supported")
    if _parallel_config is not None:
        parallel.check(_parallel_config, call.model, call.layout, call.cut)

        def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return _attend(call, method, q, k, v, mask, scale)

        given = (attn_mask, call.layout, call.cut, _parallel_config)
        return parallel.attend(whole, query, key, value, *given)
    if alone:
        return attention(query, key, value, causal=is_causal, scale=scale)
    return _attend(call, method, query, key, value, attn_mask, scale)


def _attend(
    call: Call,
    method: Dense | Sparse,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """All tokens of some heads."""
    layout = call.layout
    if call.alone and query.shape[1] == key.shape[1] == layout.image:
        layout = Layout(layout.grid)
    for name, x, tokens in (
        ("queries", query, layout.queries.tokens),
        ("keys", key, layout.tokens),
    ):
        if x.shape[1] != tokens:
            raise ValueError(
                f"{name} of the self-attention of {call.model} must match the grid: {layout}, got "
                f"{x.shape[1]}"
            )
    if call.masked is not None and attn_mask is not None:
        return call.masked(method, query, key, value, layout, attn_mask, scale)
    batch = query.shape[0]
    seen: Seen
    if layout is not call.layout or attn_mask is None:
        seen = [layout.all_runs()] * batch
    elif torch.compiler.is_compiling() and method.in_graph:
        seen = call.visible(attn_mask, batch)
    else:
        seen = call.runs(attn_mask, batch)
    return method(query, key, value, layout, seen, scale)


def _refuse(where: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise NotImplementedError(f"{name} of {where} is not supported by {NAME!r}")


def register() -> object:
    """Adds the backend to the registry of diffusers once; returns its name there.

    diffusers has a closed enum of names and no function to extend it.

    Raises:
        RuntimeError: this version of diffusers has another kind of registry.
    """
    if NAME in AttentionBackendName._value2member_map_:
        return AttentionBackendName(NAME)
    try:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        member.__objclass__ = AttentionBackendName
        member._sort_order_ = len(AttentionBackendName)
        # Processors hold the name. Unpickling one imports this module, so that the name exists.
        member.__reduce_ex__ = lambda protocol: (register, ())
        setattr(AttentionBackendName, NAME.upper(), member)  # the map makes it read-only
        AttentionBackendName._member_map_[NAME.upper()] = member
        AttentionBackendName._value2member_map_[NAME] = member
        AttentionBackendName._member_names_.append(NAME.upper())
        _AttentionBackendRegistry.register(member)(backend)
        if hasattr(_AttentionBackendRegistry, "_supports_context_parallel"):
            _AttentionBackendRegistry._supports_context_parallel.add(NAME)
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            "this version of diffusers registers attention backends in a way that is not "
            f"supported, got {diffusers.__version__}: {error}"
        ) from error
    return member


BACKEND = register()
