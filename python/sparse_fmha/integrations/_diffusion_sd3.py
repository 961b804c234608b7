"""A processor for Stable Diffusion 3: the one of diffusers calls torch's attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor


class StableDiffusion3Processor:
    """Attention over image tokens, and text tokens if there are, through the selected backend.

    Computes the same as `JointAttnProcessor2_0`, which runs dense steps.
    """

    _attention_backend: object = None
    _parallel_config: object = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        own = _heads(attn, hidden_states, ("to_q", "to_k", "to_v"))
        q, k, v = _normed(own, attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text = _heads(attn, encoder_hidden_states, names)
            text = _normed(text, attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True))
        out = dispatch_attention_fn(
            q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = out.flatten(2).to(q.dtype)
        image = out[:, : hidden_states.shape[1]]
        projected: Tensor = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return projected
        words = out[:, hidden_states.shape[1] :]
        return projected, words if attn.context_pre_only else attn.to_add_out(words)


def _heads(attn: Any, x: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    return [getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in names]


def _normed(qkv: list[Tensor], norm_q: Any, norm_k: Any) -> list[Tensor]:
    q, k, v = qkv
    return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]
