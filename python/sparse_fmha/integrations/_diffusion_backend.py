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

from sparse_fmha.integrations._diffusion_methods import Dense, Layout, Sparse

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
    outer: Call | None = None  # the enclosing forward call
    layer: Layer | None = None  # the self-attention that is running
    lengths: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)

    def text_lengths(self, mask: Tensor | None, batch: int) -> list[int]:
        """The number of text tokens of each batch entry, without padding.

        Most models pass one mask to all layers of a call, so this waits for the device only once.
        """
        if mask is None:
            return [self.layout.text] * batch
        if id(mask) not in self.lengths:  # stored with its tensor, so that the id stays unique
            self.lengths[id(mask)] = mask, _text_lengths(mask, self, batch)
        return self.lengths[id(mask)][1]


CALL: ContextVar[Call | None] = ContextVar("sparse_fmha_call", default=None)
# Running calls of all threads, by id. torch.compile does not trace context variables: if no call is
# running, the variable is not read, so other models compile to one graph.
UNDER_WAY: dict[int, Call] = {}


def _text_lengths(mask: Tensor, call: Call, batch: int) -> list[int]:
    layout = call.layout
    where = f"{mask.dtype} {list(mask.shape)} in {call.model}"
    keys = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    if mask.dtype != torch.bool or not keys or mask.shape[-1] != layout.tokens:
        raise NotImplementedError(
            f"attn_mask must be a mask of padded text keys, bool [B, 1, 1, {layout.tokens}], got "
            f"{where}"
        )
    image, text = layout.split(mask.reshape(-1, layout.tokens))
    counts = text.sum(1)
    prefix = text == (torch.arange(layout.text, device=text.device) < counts[:, None])
    fits = image.all() & prefix.all()
    lengths: list[int]
    *lengths, right = torch.cat([counts, fits[None]]).tolist()
    if not right:
        raise NotImplementedError(
            "attn_mask must hide only padding at the end of the text, got one that hides image "
            f"tokens or earlier text tokens: {where}"
        )
    return lengths * batch if len(lengths) == 1 else lengths


def backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: object = None,
) -> Tensor:
    """Called by diffusers: q `[B, S, H, D]`, k and v `[B, S_kv, H_kv, D]` to out like q.

    Outside of enabled models it runs torch's attention, because `set_attention_backend` of one
    model makes a backend the default of all others.
    """
    call = CALL.get() if UNDER_WAY else None
    layer = None if call is None else call.layer
    if call is None or layer is None or call.dense:
        if call is not None:
            _refuse(call, {"context parallelism": _parallel_config})
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
            backend=AttentionBackendName.NATIVE if call is None else _original(layer),
        )
        return out
    _refuse(call, {"context parallelism": _parallel_config})
    _refuse(call, {"dropout_p": dropout_p, "is_causal": is_causal})
    for name, x in (("queries", query), ("keys", key)):
        if x.shape[1] != call.layout.tokens:
            raise ValueError(
                f"{name} of layer {layer.index} of {call.model} must match the grid: "
                f"{call.layout}, got {x.shape[1]}"
            )
    lengths = call.text_lengths(attn_mask, query.shape[0])
    return call.method(query, key, value, call.layout, lengths, scale)


def _original(layer: Layer | None) -> object:
    """The backend of everything that stays dense: steps, layers, and attention not on the grid."""
    original = layer and layer.original
    original = original or _AttentionBackendRegistry.get_active_backend()[0]
    # It is ours if chosen by name for the whole model, or as the default.
    return AttentionBackendName.NATIVE if original == NAME else original


def _refuse(call: Call, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise NotImplementedError(f"{name} of {call.model} is not supported by {NAME!r}")


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
