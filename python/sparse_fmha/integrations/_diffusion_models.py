"""For each supported transformer, its self-attention modules and how to read the grid of a call.

Based on the `forward` of each class in diffusers 0.42; a new model is a new row of MODELS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from sparse_fmha.integrations._diffusion_methods import Layout

Transformer = Any  # a module of one of MODELS, which torch's types do not describe
Given = Mapping[str, Any]  # arguments of its `forward` by name


class Processor(Protocol):
    """Computes attention for a module with the processor's backend."""

    _attention_backend: Any


@dataclass(frozen=True)
class Model:
    """A transformer class.

    Attributes:
        axes: axes of the grid.
        layers: returns the self-attention modules in the order of the blocks.
        grid: returns tokens per axis of a call, from the module and `forward`'s arguments by name.
        text: position of text tokens in the self-attention: "first", "last" or nowhere.
        processors: names of processor classes whose self-attention can be replaced.
    """

    axes: int
    layers: Callable[[Transformer], list[Any]]
    grid: Callable[[Transformer, Given], tuple[int, ...]]
    text: str | None
    processors: tuple[str, ...]

    def layout(
        self, model: Transformer, given: Given, grid: tuple[int, ...] | None = None
    ) -> Layout:
        """The tokens of a call; `grid` overrides the grid read from the call."""
        grid = self.grid(model, given) if grid is None else grid
        text = given["encoder_hidden_states"].shape[1] if self.text else 0
        return Layout(grid, text, text_first=self.text == "first")


def find(model: nn.Module) -> tuple[str, Model] | None:
    """The name and row of a module's supported class. It is found by name, not by import, because
    older versions of diffusers lack some classes."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS and cls.__module__.partition(".")[0] == "diffusers":
            return cls.__name__, MODELS[cls.__name__]
    return None


def _two_streams(model: Transformer) -> list[Any]:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [block.attn for block in blocks]


def _flux(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are packed, `[B, Y * X, C]`, so the grid is read from the position ids."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    places = ids[:, 1:].long().cpu()
    places = places - places.amin(0)
    height, width = (places.amax(0) + 1).tolist()
    expected = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in (height, width)))
    one_image = bool((ids[:, 0] == ids[0, 0]).all())
    if not one_image or not expected.equal(places):
        raise ValueError(
            "img_ids must be those of one image, row by row, without reference images, got "
            f"{ids.shape[0]} tokens that span {height}x{width}"
        )
    return height, width


def _wan(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are `[B, C, T, Y, X]`."""
    return _patches(given["hidden_states"].shape[2:], model.config.patch_size)


def _hunyuan_video(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are `[B, C, T, Y, X]`."""
    patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    return _patches(given["hidden_states"].shape[2:], patch)


def _cogvideox(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are `[B, T, C, Y, X]`; CogVideoX 1.0 has no patches in time."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
    return _patches((frames, height, width), patch)


def _ltx(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are packed, `[B, T * Y * X, C]`; their sizes are separate arguments."""
    names = ("num_frames", "height", "width")
    sizes = tuple(given[name] for name in names if given.get(name) is not None)
    if len(sizes) < len(names):
        raise ValueError(
            "num_frames, height and width must be given, got video_coords, which do not tell the "
            "grid; call enable(..., grid=(frames, height, width))"
        )
    return sizes


def _qwen_image(model: Transformer, given: Given) -> tuple[int, ...]:
    """Latents are packed, `[B, Y * X, C]`; their sizes are `[[(1, Y, X)]] * B`."""
    shapes = given["img_shapes"]
    images = {tuple(s) if isinstance(s, list) else (s,) for s in shapes}
    if len(images) != 1 or len(image := images.pop()) != 1 or image[0][0] != 1:
        raise ValueError(
            "img_shapes must be those of one image of one size, without reference images, layers "
            f"or batches of different sizes, got {shapes}"
        )
    return tuple(image[0][1:])


def _patches(sizes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // p for size, p in zip(sizes, patch, strict=True))


def _first_attentions(model: Transformer) -> list[Any]:
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    return [block.attn1 for block in blocks]


def _vace(model: Transformer) -> list[Any]:
    """The blocks of the control branch run before the others."""
    return [block.attn1 for block in (*model.vace_blocks, *model.blocks)]


def _joint(model: Transformer) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


_COGVIDEOX = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
MODELS = {
    "FluxTransformer2DModel": Model(2, _two_streams, _flux, "first", ("FluxAttnProcessor",)),
    "QwenImageTransformer2DModel": Model(
        2, _joint, _qwen_image, "first", ("QwenDoubleStreamAttnProcessor2_0",)
    ),
    "HunyuanVideoTransformer3DModel": Model(
        3, _two_streams, _hunyuan_video, "last", ("HunyuanVideoAttnProcessor2_0",)
    ),
    "WanTransformer3DModel": Model(3, _first_attentions, _wan, None, ("WanAttnProcessor",)),
    "WanVACETransformer3DModel": Model(3, _vace, _wan, None, ("WanAttnProcessor",)),
    "CogVideoXTransformer3DModel": Model(3, _first_attentions, _cogvideox, "first", _COGVIDEOX),
    "LTXVideoTransformer3DModel": Model(
        3, _first_attentions, _ltx, None, ("LTXVideoAttnProcessor",)
    ),
}
