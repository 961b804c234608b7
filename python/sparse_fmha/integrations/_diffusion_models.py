"""For each supported transformer, its self-attention modules and how to read the tokens of a call.

Based on the `forward` of each class in diffusers 0.42; a new model is a new row of MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from sparse_fmha.integrations import _diffusion_chroma as chroma
from sparse_fmha.integrations import _diffusion_tokens as tokens
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_parallel import SEQUENCE, STREAMS
from sparse_fmha.integrations._diffusion_state import Masked
from sparse_fmha.integrations._diffusion_tokens import Given, Grid, Transformer


class Processor(Protocol):
    """Computes attention for a module with the processor's backend."""

    _attention_backend: Any


def _step(given: Given) -> tuple[Any, Any]:
    text = given.get("encoder_hidden_states")
    return given.get("timestep"), text[0] if isinstance(text, Sequence) and text else text


def _z_image_step(given: Given) -> tuple[Any, Any]:
    """Its time goes from 0 to 1."""
    captions = given["cap_feats"]
    return -given["t"], captions[0] if captions else None


def _minimax_h3_step(given: Given) -> tuple[Any, Any]:
    """Its time goes from 0 to 1, and rows have different ones; the last is of the video."""
    return -given["timestep"][given["timestep_indices"][-1]], given["encoder_hidden_states"]


def _cosmos3_step(given: Given) -> tuple[Any, Any]:
    return given["vision_timesteps"], given["input_ids"]


# Of a pipeline; the second is Wan 2.2's for late steps, the third MiniMax-H3's for references.
PARTS = ("transformer", "transformer_2", "transformer_ref")


@dataclass(frozen=True)
class Model:
    """A transformer class.

    Attributes:
        axes: axes of the grid.
        layers: returns the self-attention modules in the order of the blocks.
        grid: returns tokens per axis of a call, from the module and `forward`'s arguments by name.
        others: returns the numbers of plain tokens before and after the grid in the
            self-attention, and of those before it the keys without queries, if any; from the same
            and the grid, or None where `enable` was told the grid.
        processors: names of processor classes whose self-attention can be replaced.
        step: returns a call's timestep, which falls during a run, and its text embeddings.
        alone: whether some of the modules have the tokens of the grid alone.
        cut: how the model's plan of context parallelism cuts the tokens, if it has one.
        masked: attention under the model's masks, if they are not of padded keys that are hidden.
    """

    axes: int
    layers: Callable[[Transformer], list[Any]]
    grid: Callable[[Transformer, Given], Grid]
    others: Callable[[Transformer, Given, Grid | None], tuple[int, ...]]
    processors: tuple[str, ...]
    step: Callable[[Given], tuple[Any, Any]] = _step
    alone: bool = False
    cut: str | None = None
    masked: Masked | None = None

    def layout(self, model: Transformer, given: Given, grid: Grid | None = None) -> Layout:
        """The tokens of a call; `grid` overrides the grid read from the call."""
        read = self.grid(model, given) if grid is None else None
        return Layout(read or grid or (), *self.others(model, given, read))


def find(model: nn.Module) -> tuple[str, Model] | None:
    """The name and row of a module's supported class. It is found by name, not by import, because
    older versions of diffusers lack some classes."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS and cls.__module__.partition(".")[0] == "diffusers":
            return cls.__name__, MODELS[cls.__name__]
    return None


def transformers_of(given: object) -> list[tuple[nn.Module, str, Model]]:
    """The transformers of a pipeline, or the one given.

    Raises:
        TypeError: there is none, or one of an unsupported class.
    """
    models = [given] if isinstance(given, nn.Module) else [getattr(given, p, None) for p in PARTS]
    models = [getattr(model, "_orig_mod", model) for model in models]  # compiled as a whole
    distinct = {id(model): model for model in models if model is not None}
    if not distinct:
        raise TypeError(
            "model must be a transformer or a pipeline with one, one of "
            f"{list(MODELS)}, got {type(given).__name__}"
        )
    found = []
    for model in distinct.values():
        row = find(model)
        if row is None:
            raise TypeError(f"model must be one of {list(MODELS)}, got {type(model).__name__}")
        found.append((model, *row))
    return found


def _two_streams(model: Transformer) -> list[Any]:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [block.attn for block in blocks]


def _first_attentions(model: Transformer) -> list[Any]:
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    return [block.attn1 for block in blocks]


def _vace(model: Transformer) -> list[Any]:
    """The blocks of the control branch run before the others."""
    return [block.attn1 for block in (*model.vace_blocks, *model.blocks)]


def _joint(model: Transformer) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def _joint_and_own(model: Transformer) -> list[Any]:
    """Some blocks of Stable Diffusion 3.5 have a second self-attention, of the image alone."""
    both = [(block.attn, block.attn2) for block in model.transformer_blocks]
    return [layer for pair in both for layer in pair if layer is not None]


def _visual(model: Transformer) -> list[Any]:
    return [block.self_attention for block in model.visual_transformer_blocks]


def _video_of_fused(model: Transformer) -> list[Any]:
    return [block.video_dec_block.self_attention for block in model.visual_transformer_blocks]


def _layers(model: Transformer) -> list[Any]:
    return [layer.self_attn for layer in model.layers]


def _z_image(model: Transformer) -> list[Any]:
    """Refiners, of the image or the caption alone, are not among them."""
    return [layer.attention for layer in model.layers]


_COGVIDEOX = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
_LTX2 = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
_FLUX2 = (
    "Flux2AttnProcessor",
    "Flux2ParallelSelfAttnProcessor",
    "Flux2KVAttnProcessor",
    "Flux2KVParallelSelfAttnProcessor",
)
_HUNYUAN15 = ("HunyuanVideo15AttnProcessor2_0",)
_WAN = Model(3, _first_attentions, tokens.patched_video, tokens.none, ("WanAttnProcessor",))
MODELS = {
    "FluxTransformer2DModel": Model(
        2,
        _two_streams,
        tokens.flux,
        tokens.text_and_references,
        ("FluxAttnProcessor",),
        cut=STREAMS,
    ),
    "QwenImageTransformer2DModel": Model(
        2,
        _joint,
        tokens.qwen_image,
        tokens.text_and_references,
        ("QwenDoubleStreamAttnProcessor2_0",),
        cut=STREAMS,
    ),
    "HunyuanVideoTransformer3DModel": Model(
        3,
        _two_streams,
        tokens.hunyuan_video,
        tokens.text_behind,
        ("HunyuanVideoAttnProcessor2_0",),
    ),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": Model(3, _vace, _WAN.grid, _WAN.others, _WAN.processors),
    "CogVideoXTransformer3DModel": Model(
        3, _first_attentions, tokens.cogvideox, tokens.text_before, _COGVIDEOX
    ),
    "LTXVideoTransformer3DModel": Model(
        3, _first_attentions, tokens.ltx, tokens.none, ("LTXVideoAttnProcessor",)
    ),
    "LTX2VideoTransformer3DModel": Model(3, _first_attentions, tokens.ltx, tokens.none, _LTX2),
    "MiniMaxH3Transformer3DModel": Model(
        3,
        _joint,
        tokens.minimax_h3,
        tokens.minimax_h3_others,
        ("MiniMaxH3AttnProcessor",),
        _minimax_h3_step,
        cut=SEQUENCE,
    ),
    "Flux2Transformer2DModel": Model(
        2, _two_streams, tokens.flux2, tokens.flux2_others, _FLUX2, cut=STREAMS
    ),
    "Krea2Transformer2DModel": Model(
        2, _joint, tokens.krea2, tokens.text_and_references, ("Krea2AttnProcessor",)
    ),
    "ZImageTransformer2DModel": Model(
        2,
        _z_image,
        tokens.z_image,
        tokens.z_image_others,
        ("ZSingleStreamAttnProcessor",),
        _z_image_step,
    ),
    "CosmosTransformer3DModel": Model(
        3, _first_attentions, tokens.patched_video, tokens.none, ("CosmosAttnProcessor2_0",)
    ),
    "Cosmos3OmniTransformer": Model(
        3, _layers, tokens.cosmos3, tokens.cosmos3_others, ("Cosmos3AttnProcessor",), _cosmos3_step
    ),
    "HunyuanVideo15Transformer3DModel": Model(
        3, _joint, tokens.hunyuan_video, tokens.hunyuan_video_15_text, _HUNYUAN15
    ),
    "HunyuanImageTransformer2DModel": Model(
        2,
        _two_streams,
        tokens.hunyuan_image,
        tokens.two_texts_behind,
        ("HunyuanImageAttnProcessor",),
    ),
    "Kandinsky5Transformer3DModel": Model(
        3, _visual, tokens.kandinsky5, tokens.none, ("Kandinsky5AttnProcessor",)
    ),
    "Kandinsky6Transformer3DModel": Model(
        3, _video_of_fused, tokens.kandinsky6, tokens.none, ("Kandinsky6AttnProcessor",)
    ),
    "HunyuanVideoFramepackTransformer3DModel": Model(
        3,
        _two_streams,
        tokens.hunyuan_video,
        tokens.framepack_others,
        ("HunyuanVideoAttnProcessor2_0",),
    ),
    "HeliosTransformer3DModel": Model(
        3,
        _first_attentions,
        tokens.patched_video,
        tokens.helios_others,
        ("HeliosAttnProcessor",),
        cut=SEQUENCE,
    ),
    "SkyReelsV2Transformer3DModel": Model(
        3, _first_attentions, tokens.patched_video, tokens.none, ("SkyReelsV2AttnProcessor",)
    ),
    "SD3Transformer2DModel": Model(
        2,
        _joint_and_own,
        tokens.patched_image,
        tokens.text_behind,
        ("JointAttnProcessor2_0",),
        alone=True,
    ),
    "ChromaTransformer2DModel": Model(
        2, _two_streams, tokens.flux, chroma.others, ("FluxAttnProcessor",), masked=chroma.attend
    ),
    "ChronoEditTransformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
}
