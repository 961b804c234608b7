"""Where the supported transformers keep self-attention, and how their calls show the grid.

Written against diffusers 0.42 from the `forward` of each class; a new model is a new row of MODELS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_fmha.integrations._diffusion_methods import Layout


@dataclass(frozen=True)
class Model:
    """A transformer class.

    Attributes:
        axes: of the grid.
        layers: its self-attention modules in the order of the blocks.
        layout: of a call, from the module and the arguments of `forward` by name.
        processors: names of the processor classes whose self-attention can be replaced.
    """

    axes: int
    layers: Callable[[nn.Module], list[nn.Module]]
    layout: Callable[[nn.Module, dict[str, object]], Layout]
    processors: tuple[str, ...]


def find(model: nn.Module) -> tuple[str, Model] | None:
    """The name and the row of the supported class that a module is of, by name and not by import:
    older versions of diffusers lack some."""
    for cls in type(model).__mro__:
        if cls.__name__ in MODELS and cls.__module__.partition(".")[0] == "diffusers":
            return cls.__name__, MODELS[cls.__name__]
    return None


def _two_streams(model: nn.Module) -> list[nn.Module]:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return [block.attn for block in blocks]


def _flux(model: nn.Module, given: dict[str, object]) -> Layout:
    """Latents come packed, so the grid is read from the position ids."""
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    text = given["encoder_hidden_states"].shape[1]
    return Layout(_grid_of_ids(ids), text, text_first=True)


def _grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """(height, width) of ids `[height * width, 3]` that count rows and columns of one image."""
    places = ids[:, 1:].long().cpu()
    height, width = (places.amax(0) - places.amin(0) + 1).tolist()
    expected = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    one_image = bool((ids[:, 0] == ids[0, 0]).all())
    if not one_image or not expected.equal(places - places.amin(0)):
        raise ValueError(
            f"img_ids of {ids.shape[0]} tokens are not those of one image, row by row (they span "
            f"{height}x{width}); reference images beside it are not supported"
        )
    return height, width


def _wan(model: nn.Module, given: dict[str, object]) -> Layout:
    """Text is in cross-attention only. Latents are `[B, C, T, Y, X]`."""
    sizes = given["hidden_states"].shape[2:]
    return Layout(_patches(sizes, model.config.patch_size))


def _hunyuan_video(model: nn.Module, given: dict[str, object]) -> Layout:
    """Text behind the video's tokens. Latents are `[B, C, T, Y, X]`."""
    patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    text = given["encoder_hidden_states"].shape[1]
    return Layout(_patches(given["hidden_states"].shape[2:], patch), text)


def _cogvideox(model: nn.Module, given: dict[str, object]) -> Layout:
    """Text before the video's tokens. Latents are `[B, T, C, Y, X]`."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch = (model.config.patch_size_t or 1, model.config.patch_size, model.config.patch_size)
    text = given["encoder_hidden_states"].shape[1]
    return Layout(_patches((frames, height, width), patch), text, text_first=True)


def _patches(sizes: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // p for size, p in zip(sizes, patch, strict=True))


MODELS = {
    "FluxTransformer2DModel": Model(2, _two_streams, _flux, ("FluxAttnProcessor",)),
    "HunyuanVideoTransformer3DModel": Model(
        3, _two_streams, _hunyuan_video, ("HunyuanVideoAttnProcessor2_0",)
    ),
    "WanTransformer3DModel": Model(
        3, lambda model: [block.attn1 for block in model.blocks], _wan, ("WanAttnProcessor",)
    ),
    "CogVideoXTransformer3DModel": Model(
        3,
        lambda model: [block.attn1 for block in model.transformer_blocks],
        _cogvideox,
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    ),
}
