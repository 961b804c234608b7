"""A processor for Cosmos: the one of diffusers takes the default backend, not one of its own."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class CosmosProcessor:
    """Self-attention over video tokens, through the selected attention backend.

    Computes the same as `CosmosAttnProcessor2_0`, which runs dense steps.
    """

    _attention_backend: object = None
    _parallel_config: object = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (
                apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
                for x in (q, k)
            )
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        projected: Tensor = attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))
        return projected
