"""Sparse self-attention in the transformers of diffusers (Hugging Face).

    from sparse_fmha.integrations import diffusers as sparse
    sparse.enable(pipe, "neighborhood", window=(6, 16, 16), first_dense_steps=5)

Importing this module adds the attention backend "sparse_fmha" to the registry of diffusers.
`enable` chooses it for the self-attention of a model and sets hooks that tell it the token grid.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sparse_fmha._versions import require

require("diffusers", by=__name__, extra="diffusers")

from sparse_fmha.block_mask import BlockMask
from sparse_fmha.integrations import _diffusion_methods as methods
from sparse_fmha.integrations._diffusion_backend import register
from sparse_fmha.integrations._diffusion_cogvideox import CogVideoXProcessor
from sparse_fmha.integrations._diffusion_hooks import Hooks, Steps
from sparse_fmha.integrations._diffusion_models import MODELS, Model, find

__all__ = ["disable", "enable", "is_enabled", "supported_models"]

BACKEND = register()
PARTS = ("transformer", "transformer_2")  # of a pipeline; Wan 2.2 has a second one for late steps
_enabled: WeakKeyDictionary[nn.Module, Hooks] = WeakKeyDictionary()


def supported_models() -> list[str]:
    """Names of the transformer classes that `enable` takes."""
    return list(MODELS)


def is_enabled(pipe_or_transformer: object) -> bool:
    """Whether `enable` was called for all its transformers and `disable` was not."""
    return all(model in _enabled for model, _, _ in _transformers(pipe_or_transformer))


def enable(
    pipe_or_transformer: object,
    method: str,
    *,
    first_dense_steps: int = 0,
    dense_layers: Sequence[int] = (),
    grid: Sequence[int] | None = None,
    **options: int | Sequence[int] | BlockMask | Callable[[Tensor, Tensor], BlockMask],
) -> None:
    """Replaces the self-attention over image or video tokens; `disable` takes it back.

    Tokens of the image see each other as the method says. Text tokens that are in the same
    attention (not in Wan and LTX) are seen by every query, and see everything themselves; those
    that are padding are seen by none. Cross-attention stays as it is.

    Args:
        pipe_or_transformer: a pipeline, or a transformer of `supported_models()`. Both transformers
            of a Wan 2.2 pipeline are enabled, and count steps together.
        method:
            "neighborhood": `sparse_fmha.neighborhood_attention` with the options window, stride and
            dilation, tokens per axis: (height, width) for Flux and Qwen-Image, (frames, height,
            width) for the others, or one int for all axes. On an axis with one token a window of 1
            is needed.
            "block_sparse": `sparse_fmha.block_sparse_attention` with the option mask: a BlockMask
            of the tokens of the grid, row by row and without text, or a function that makes one
            from q and k, `[B, tokens of the grid, H, D]`, in every layer and step.
            "dense": `sparse_fmha.attention`.
        first_dense_steps: so many denoising steps of each run stay the original. A step is a new
            value of `timestep`, a run begins where it grows; reading it waits for the device.
        dense_layers: indices of blocks that stay the original. Blocks of Flux and HunyuanVideo are
            counted through both streams: `transformer_blocks`, then `single_transformer_blocks`;
            those of VACE from `vace_blocks` on.
        grid: tokens per axis, for calls that do not show them; by default read from each call.

    Calls then raise ValueError for a grid that is not as many tokens as the attention has or a
    window larger than the grid, NotImplementedError for masks other than of padded text, dropout
    and context parallelism, and what the functions named above raise.

    Raises:
        TypeError: an argument of the wrong type, an option that the method does not have, a model
            that is not supported.
        ValueError: an unknown method, a layer that there is not, values for another number of axes.
        NotImplementedError: an attention processor that is not the model's own.
        RuntimeError: it is enabled already.
    """
    chosen = methods.make(method, options)
    _check_count("first_dense_steps", first_dense_steps)
    found = _transformers(pipe_or_transformer)
    grid = None if grid is None else _check_grid(grid)
    for model, name, row in found:  # everything is checked before anything changes
        if model in _enabled:
            raise RuntimeError(f"{name} is enabled already; call disable() first")
        _check_axes(chosen, grid, name, row)
        layers = row.layers(model)
        _check_layers(dense_layers, len(layers), name)
        _check_processors(layers, name, row)
    steps = Steps(first_dense_steps)
    for model, name, row in found:
        signature = inspect.signature(type(model).forward)
        hooks = Hooks(name, row, signature, chosen, steps, grid)
        hooks.on_model(model)
        for index, layer in enumerate(row.layers(model)):
            if index not in dense_layers:
                hooks.on_layer(index, layer, _processor(layer.processor))
        _enabled[model] = hooks


def disable(pipe_or_transformer: object) -> None:
    """Takes back what `enable` did: the processors that were there, and no hooks.

    Raises:
        TypeError: a model that is not supported.
        RuntimeError: it is not enabled.
    """
    found = _transformers(pipe_or_transformer)
    for model, name, _ in found:
        if model not in _enabled:
            raise RuntimeError(f"{name} is not enabled; call enable() before disable()")
    for model, _, _ in found:
        _enabled.pop(model).remove()


def _transformers(given: object) -> list[tuple[nn.Module, str, Model]]:
    models = [given] if isinstance(given, nn.Module) else [getattr(given, p, None) for p in PARTS]
    models = [model for model in models if model is not None]
    if not models:
        raise TypeError(
            f"{type(given).__name__} is neither a transformer nor a pipeline with one; supported "
            f"are {supported_models()}"
        )
    found = []
    for model in models:
        row = find(model)
        if row is None:
            raise TypeError(
                f"{type(model).__name__} is not supported; supported are {supported_models()}"
            )
        found.append((model, *row))
    return found


def _processor(original: object) -> object:
    """The model's own processor with our backend; a copy, as modules may share one."""
    cogvideox = type(original).__name__ in MODELS["CogVideoXTransformer3DModel"].processors
    processor = CogVideoXProcessor(original) if cogvideox else copy.copy(original)
    processor._attention_backend = BACKEND
    return processor


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an int is needed")
    if value < 0:
        raise ValueError(f"{name} is {value}; at least 0 is needed")


def _check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(grid, Sequence):
        raise TypeError(f"grid is {grid!r}; tokens of each axis are needed")
    for length in grid:
        _check_count("grid", length)
    return tuple(grid)


def _check_axes(method: object, grid: Sequence[int] | None, name: str, row: Model) -> None:
    values = {field: getattr(method, field, None) for field in ("window", "stride", "dilation")}
    for field, value in {**values, "grid": grid}.items():
        if isinstance(value, Sequence) and len(value) != row.axes:
            raise ValueError(
                f"{field} is {value!r}: {len(value)} entries; the grid of {name} has {row.axes} "
                "axes"
            )


def _check_layers(dense_layers: Sequence[int], count: int, name: str) -> None:
    if not isinstance(dense_layers, (Sequence, range, set, frozenset)):
        raise TypeError(f"dense_layers is {dense_layers!r}; indices of blocks are needed")
    for index in dense_layers:
        _check_count("dense_layers", index)
        if index >= count:
            raise ValueError(f"dense_layers has {index}; {name} has blocks 0 to {count - 1}")


def _check_processors(layers: list[nn.Module], name: str, row: Model) -> None:
    for index, layer in enumerate(layers):
        kind = type(layer.processor).__name__
        if kind not in row.processors:
            raise NotImplementedError(
                f"the attention processor of block {index} of {name} is a {kind}; supported are "
                f"{list(row.processors)}"
            )
