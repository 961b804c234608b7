"""A processor for HunyuanVideo-1.5: the one of diffusers makes a mask of all pairs of tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from sparse_fmha.integrations._diffusion_state import CURRENT


class HunyuanVideo15Processor:
    """Joint attention over video and text tokens, through the selected attention backend.

    Computes the same as `HunyuanVideo15AttnProcessor2_0`, except the rows of padding, which no
    token sees, and with a mask of the text's keys alone. The original runs dense steps.
    """

    _attention_backend: object = None
    _parallel_config: object = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = CURRENT.call
        assert call is not None, "the processor runs in calls of an enabled transformer alone"
        text = encoder_hidden_states.shape[1]
        video = [to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v)]
        words = [
            to(encoder_hidden_states) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        ]
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in video)
        text_q, text_k, text_v = (x.unflatten(2, (attn.heads, -1)) for x in words)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        text_q = text_q if attn.norm_added_q is None else attn.norm_added_q(text_q)
        text_k = text_k if attn.norm_added_k is None else attn.norm_added_k(text_k)
        out = dispatch_attention_fn(
            torch.cat([q, text_q], 1),
            torch.cat([k, text_k], 1),
            torch.cat([v, text_v], 1),
            attn_mask=call.key_mask(attention_mask),
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(q.dtype)
        video_out, text_out = out[:, :-text], out[:, -text:]
        return attn.to_out[1](attn.to_out[0](video_out)), attn.to_add_out(text_out)
