"""LTX-2.5's diffusion decoder of video latents, whose attention is neighborhood attention.

Its own processors need FlexAttention with a mask of all blocks, or NATTEN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_fmha.attention import neighborhood_attention
from sparse_fmha.integrations._diffusion_exact import Exact, Replaced


class DecoderProcessor(Replaced):
    """Attention of one block of the decoder, in place of its original processor."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        q, k, v = attn.project_qkv(hidden_states)
        # The decoder scales q itself.
        out = neighborhood_attention(q, k, v, attn.kernel_size, scale=1.0)
        projected: Tensor = attn.to_out[0](out.flatten(-2))
        return projected


def _blocks(model: Any) -> list[Any]:
    blocks = [block for stage in model.decoder.det_stages for block in stage]
    return [block.attn for block in (*blocks, *model.decoder.diff_blocks)]


DECODER = Exact(
    "LTX2VideoDiffusionDecoderModel",
    "diffusion_decoder",
    "decoder",
    ("LTX2VideoVaeNeighborhoodAttnProcessor", "LTX2VideoVaeNeighborhoodNattenProcessor"),
    DecoderProcessor,
    _blocks,
)


def enable_decoder(pipe_or_decoder: object) -> None:
    """Replaces the attention of LTX-2.5's diffusion decoder; `disable_decoder` undoes it.

    The decoder (`LTX2VideoDiffusionDecoderModel`) was trained with 3-D neighborhood attention, so
    the result is the same up to rounding. No mask is built, and neither NATTEN nor the package
    `kernels` is needed. Tiled decoding, several steps and gradients work as before. A copy of an
    enabled decoder is enabled. A decoder that is enabled stays so.

    Args:
        pipe_or_decoder: the decoder, or a pipeline with it as `diffusion_decoder`.

    Raises:
        TypeError: neither of these.
        NotImplementedError: a block has a processor that is not of diffusers. Nothing has changed.
    """
    DECODER.enable(pipe_or_decoder)


def disable_decoder(pipe_or_decoder: object) -> None:
    """Puts back the original processors of an enabled decoder.

    Raises:
        TypeError: see `enable_decoder`.
        RuntimeError: the decoder is not enabled, or its processors were replaced since.
    """
    DECODER.disable(pipe_or_decoder)
