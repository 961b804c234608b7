"""LTX-2.5's diffusion decoder of video latents, whose attention is neighborhood attention.

Its own processors need FlexAttention with a mask of all blocks, or NATTEN.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_fmha.attention import neighborhood_attention

NAME = "LTX2VideoDiffusionDecoderModel"
PART = "diffusion_decoder"  # of a pipeline
PROCESSORS = ("LTX2VideoVaeNeighborhoodAttnProcessor", "LTX2VideoVaeNeighborhoodNattenProcessor")


class DecoderProcessor:
    """Attention of one block of the decoder, in place of its original processor."""

    def __init__(self, original: object) -> None:
        self.original = original

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        q, k, v = attn.project_qkv(hidden_states)
        # The decoder scales q itself.
        out = neighborhood_attention(q, k, v, attn.kernel_size, scale=1.0)
        projected: Tensor = attn.to_out[0](out.flatten(-2))
        return projected


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
    layers = _layers(pipe_or_decoder)
    for index, layer in enumerate(layers):
        kind = type(layer.processor).__name__
        if kind not in (*PROCESSORS, DecoderProcessor.__name__):
            raise NotImplementedError(
                f"the attention processor of block {index} of {NAME} must be one of "
                f"{list(PROCESSORS)}, got {kind}"
            )
    for layer in layers:
        if not isinstance(layer.processor, DecoderProcessor):
            layer.set_processor(DecoderProcessor(layer.processor))


def disable_decoder(pipe_or_decoder: object) -> None:
    """Puts back the original processors of an enabled decoder.

    Raises:
        TypeError: see `enable_decoder`.
        RuntimeError: the decoder is not enabled, or its processors were replaced since.
    """
    layers = _layers(pipe_or_decoder)
    if not all(isinstance(layer.processor, DecoderProcessor) for layer in layers):
        raise RuntimeError(
            f"{NAME} must be enabled, with its attention processors in place, before "
            "disable_decoder(); call enable_decoder() first"
        )
    for layer in layers:
        layer.set_processor(layer.processor.original)


def _layers(given: object) -> list[Any]:
    """The attention modules in the order of the blocks."""
    model: Any = given if isinstance(given, nn.Module) else getattr(given, PART, None)
    named = [cls for cls in type(model).__mro__ if cls.__name__ == NAME]
    if not any(cls.__module__.partition(".")[0] == "diffusers" for cls in named):
        raise TypeError(
            f"pipe_or_decoder must be a {NAME} of diffusers or a pipeline with one as {PART}, got "
            f"{type(given).__name__}"
        )
    decoder = model.decoder
    blocks = [block for stage in decoder.det_stages for block in stage]
    return [block.attn for block in (*blocks, *decoder.diff_blocks)]
