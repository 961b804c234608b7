"""The attention backend "sparse_fmha" of diffusers, and the context that it is called in.

diffusers passes a backend q, k, v and a mask, but not the layer, grid or step. These are in a
context variable, set by hooks around a transformer's forward and its self-attention. If it is not
set, the backend runs torch's attention.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.integrations._diffusion_layout import Layout, Runs, runs_of
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse
from sparse_fmha.masks.block_mask import BlockMask

NAME = "sparse_fmha"


@dataclass(frozen=True)
class Layer:
    """A self-attention module and its original backend."""

    index: int
    original: object


@dataclass
class Call:
    """One forward call of an enabled transformer."""

    module: nn.Module
    key: object  # of the hooks that opened it
    model: str
    layout: Layout
    method: Dense | Sparse
    dense: bool  # this step runs the original attention
    alone: bool = False  # some layers have the tokens of the grid alone
    outer: Call | None = None  # the enclosing forward call
    layer: Layer | None = None  # the self-attention that is running
    seen: dict[int, tuple[Tensor, list[Runs]]] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def key_mask(self, mask: Tensor) -> Tensor:
        """Bool `[B, 1, 1, tokens]` from a mask `[B, text]` of text after the grid; the same
        tensor for all layers of a call."""
        if id(mask) not in self.masks:
            padded = torch.nn.functional.pad(mask.bool(), (self.layout.image, 0), value=True)
            self.masks[id(mask)] = mask, padded[:, None, None]
        return self.masks[id(mask)][1]

    def runs(self, mask: Tensor | None, batch: int) -> list[Runs]:
        """What each batch entry sees of the plain tokens, those that are not padding.

        Most models pass one mask to all layers of a call, so this waits for the device only once.
        """
        if mask is None:
            return [self.layout.all_runs()] * batch
        if id(mask) not in self.seen:  # stored with its tensor, so that the id stays unique
            self.seen[id(mask)] = mask, _runs(mask, self, batch)
        return self.seen[id(mask)][1]


CALL: ContextVar[Call | None] = ContextVar("sparse_fmha_call", default=None)
# Running calls of all threads, by id. torch.compile does not trace context variables: if no call is
# running, the variable is not read, so other models compile to one graph.
UNDER_WAY: dict[int, Call] = {}


def _runs(mask: Tensor, call: Call, batch: int) -> list[Runs]:
    layout = call.layout
    where = f"{mask.dtype} {list(mask.shape)} in {call.model}"
    keys = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    if mask.dtype != torch.bool or not keys or mask.shape[-1] != layout.tokens:
        raise NotImplementedError(
            f"attn_mask must be a mask of padded text keys, bool [B, 1, 1, {layout.tokens}], got "
            f"{where}"
        )
    image, plain = layout.split(mask.reshape(-1, layout.tokens))
    found = []
    for whole, *visible in torch.cat([image.all(1, keepdim=True), plain], 1).tolist():
        if not whole:
            raise NotImplementedError(
                f"attn_mask must hide only padding of the text, got one that hides image tokens: "
                f"{where}"
            )
        found.append(runs_of(visible))
    return found * batch if len(found) == 1 else found


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
    call = CALL.get() if UNDER_WAY else None
    layer = None if call is None else call.layer
    if call is None or layer is None or call.dense:
        if call is not None:
            _refuse(call, {"context parallelism": _parallel_config})
        chosen = AttentionBackendName.NATIVE if call is None else _original(layer)
        if isinstance(attn_mask, FlexBlockMask) and chosen == AttentionBackendName.NATIVE:
            options = {"dropout_p": dropout_p, "is_causal": is_causal}
            _refuse("a call with a BlockMask", options | {"context parallelism": _parallel_config})
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
            backend=chosen,
        )
        return out
    _refuse(call, {"context parallelism": _parallel_config})
    _refuse(call, {"dropout_p": dropout_p, "is_causal": is_causal})
    if isinstance(attn_mask, FlexBlockMask):
        raise NotImplementedError(f"a BlockMask of {call.model} beside a method is not supported")
    layout = call.layout
    if call.alone and query.shape[1] == key.shape[1] == layout.image:
        layout = Layout(layout.grid)
    for name, x in (("queries", query), ("keys", key)):
        if x.shape[1] != layout.tokens:
            raise ValueError(
                f"{name} of layer {layer.index} of {call.model} must match the grid: "
                f"{layout}, got {x.shape[1]}"
            )
    batch = query.shape[0]
    seen = call.runs(attn_mask, batch) if layout is call.layout else [layout.all_runs()] * batch
    return call.method(query, key, value, layout, seen, scale)


def _original(layer: Layer | None) -> object:
    """The backend of everything that stays dense: steps, layers, and attention not on the grid."""
    original = layer and layer.original
    original = original or _AttentionBackendRegistry.get_active_backend()[0]
    # It is ours if chosen by name for the whole model, or as the default.
    return AttentionBackendName.NATIVE if original == NAME else original


def _refuse(call: Call | str, options: dict[str, object]) -> None:
    where = call.model if isinstance(call, Call) else call
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
    except (AttributeError, TypeError) as error:
        raise RuntimeError(
            "this version of diffusers registers attention backends in a way that is not "
            f"supported, got {diffusers.__version__}: {error}"
        ) from error
    return member
