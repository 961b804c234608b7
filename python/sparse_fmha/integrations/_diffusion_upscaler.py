"""Kandinsky 6 SR, whose attention is NABLA: blocks of 64 tokens, chosen in each call.

Its own processor hands their lists to FlexAttention, which uses them only where it is compiled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.integrations._diffusion_exact import Exact, Replaced
from sparse_fmha.masks.block_mask import BlockMask


class UpscalerProcessor(Replaced):
    """Attention of one block, in place of its original processor."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, rotary_emb: Tensor, sparse_params: dict[str, Any]
    ) -> Tensor:
        # Only here, as older versions of diffusers lack it.
        from diffusers.models.transformers import transformer_kandinsky6_sr as own

        if getattr(self.original, "_parallel_config", None) is not None:
            raise NotImplementedError(
                f"context parallelism of {UPSCALER.name} is not supported by 'sparse_fmha'"
            )
        projections = (attn.to_query, attn.to_key, attn.to_value)
        q, k, v = (to(hidden_states).unflatten(-1, (attn.num_heads, -1)) for to in projections)
        q = own.apply_rotary(attn.query_norm(q.float()).type_as(q), rotary_emb)
        k = own.apply_rotary(attn.key_norm(k.float()).type_as(k), rotary_emb)
        chosen = own.nabla_block_mask(
            q.transpose(1, 2),
            k.transpose(1, 2),
            sparse_params["sta_mask"],
            thr=sparse_params["threshold"],
        )
        out = block_sparse_attention(q, k, v, BlockMask.from_flex(chosen))
        projected: Tensor = attn.out_layer(out.flatten(2))
        return projected


UPSCALER = Exact(
    "Kandinsky6SRTransformer3DModel",
    "transformer",
    "upscaler",
    ("Kandinsky6SRAttnProcessor",),
    UpscalerProcessor,
    lambda model: [block.self_attention for block in model.visual_transformer_blocks],
)


def enable_upscaler(pipe_or_upscaler: object) -> None:
    """Replaces the attention of Kandinsky 6 SR; `disable_upscaler` undoes it.

    The model (`Kandinsky6SRTransformer3DModel`) was trained with NABLA; its blocks are chosen as
    before, by diffusers, and attention to them is the same up to rounding. It need not be compiled.
    A copy of an enabled model is enabled. A model that is enabled stays so.

    Args:
        pipe_or_upscaler: the transformer, or a pipeline with it as `transformer`.

    Raises:
        TypeError: neither of these.
        NotImplementedError: a block has a processor that is not of diffusers. Nothing has changed;
            or, in a call, context parallelism.
    """
    UPSCALER.enable(pipe_or_upscaler)


def disable_upscaler(pipe_or_upscaler: object) -> None:
    """Puts back the original processors of an enabled Kandinsky 6 SR.

    Raises:
        TypeError: see `enable_upscaler`.
        RuntimeError: the model is not enabled, or its processors were replaced since.
    """
    UPSCALER.disable(pipe_or_upscaler)
