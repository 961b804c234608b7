"""A processor for CogVideoX: the one of diffusers calls torch's attention, not a backend."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class CogVideoXProcessor:
    """Joint attention over text and video tokens, through the selected attention backend.

    Computes the same as `CogVideoXAttnProcessor2_0` and its fused variant; they run dense steps.
    """

    _attention_backend: object = None
    _parallel_config: object = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        if attn.fused_projections:
            q, k, v = attn.to_qkv(x).chunk(3, -1)
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (_rotate(y, text, image_rotary_emb) for y in (q, k))
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = attn.to_out[1](attn.to_out[0](out.flatten(2).to(q.dtype)))
        return out[:, text:], out[:, :text]


def _rotate(x: Tensor, text: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    turned = apply_rotary_emb(x[:, text:], rotary, sequence_dim=1)
    return torch.cat([x[:, :text], turned], 1)
