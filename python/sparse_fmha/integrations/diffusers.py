"""Sparse self-attention in the transformers of diffusers (Hugging Face).

    from sparse_fmha.integrations import diffusers as sparse
    sparse.enable(pipe, "neighborhood", window=(6, 16, 16), first_dense_steps=5)

Importing this module adds the attention backend "sparse_fmha" to the registry of diffusers.
`enable` selects it for a model's self-attention and sets hooks that pass it the token grid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import Any

from torch import nn

from sparse_fmha._versions import require

require("diffusers", by=__name__, extra="diffusers")

from sparse_fmha._checks import check_flag
from sparse_fmha.integrations import _diffusion_checks as checks
from sparse_fmha.integrations import _diffusion_presets as named
from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_budgets import Budgets
from sparse_fmha.integrations._diffusion_calibrate import calibrate
from sparse_fmha.integrations._diffusion_decoder import disable_decoder, enable_decoder
from sparse_fmha.integrations._diffusion_hooks import Hooks, Settings
from sparse_fmha.integrations._diffusion_methods import Dense
from sparse_fmha.integrations._diffusion_models import MODELS, Model, transformers_of
from sparse_fmha.integrations._diffusion_plan import Choice
from sparse_fmha.integrations._diffusion_presets import Preset
from sparse_fmha.integrations._diffusion_record import Recording, record
from sparse_fmha.integrations._diffusion_steps import Request, Schedule, Steps
from sparse_fmha.integrations._diffusion_upscaler import disable_upscaler, enable_upscaler
from sparse_fmha.integrations._reports import Reports

__all__ = [
    "Budgets",
    "Preset",
    "Recording",
    "Request",
    "calibrate",
    "disable",
    "disable_decoder",
    "disable_upscaler",
    "enable",
    "enable_decoder",
    "enable_upscaler",
    "is_enabled",
    "presets",
    "record",
    "supported_models",
]

MIN_TOKENS = 12288  # of videos: with fewer, attention is little of a call


def supported_models() -> list[str]:
    """Names of the transformer classes that `enable` takes."""
    return list(MODELS)


def presets(
    pipe_or_transformer: object | None = None, grid: Sequence[int] | None = None
) -> list[Preset]:
    """Named settings of `enable` with their sources.

    Args:
        pipe_or_transformer: keep those for its transformers; those by layer, for as many layers.
        grid: keep those that run on so many tokens per axis.

    Returns:
        Presets; none if there are no published settings for the model.

    Raises:
        ValueError, TypeError: grid is not the tokens of each axis of the model, or the model is not
            supported.
    """
    found = [] if pipe_or_transformer is None else transformers_of(pipe_or_transformer)
    sizes = None if grid is None else checks.check_grid(grid)
    for _, name, row in found:
        checks.check_axes(None, sizes, name, row)
    return [
        preset
        for preset in named.known().values()
        if all(each[1] in preset.models and _has_layers(preset, *each) for each in found)
        and (sizes is None or preset.fits(sizes))
    ]


def _has_layers(preset: Preset, model: nn.Module, name: str, row: Model) -> bool:
    """Whether the layers that a preset names are all layers of a model, or it names none."""
    choice, count = Choice(None, preset.layers or None), len(row.layers(model))
    numbers = {*choice.by_number, *preset.dense_layers}
    return (not choice.by_number or len(choice.by_number) == count) and all(
        number < count for number in numbers
    )


def is_enabled(pipe_or_transformer: object) -> bool:
    """Whether all transformers of the argument are enabled, through any pipeline."""
    return all(Hooks.of(model) for model, _, _ in transformers_of(pipe_or_transformer))


def enable(
    pipe_or_transformer: object,
    method: str | None = None,
    *,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    by_step: Sequence[Mapping[str, Any]] | None = None,
    preset: str | PathLike[str] | Preset | None = None,
    first_dense_steps: float | None = None,
    last_dense_steps: float | None = None,
    dense_layers: Collection[int] | None = None,
    grid: Sequence[int] | None = None,
    min_tokens: int | None = None,
    verbose: bool = False,
    **options: Any,
) -> None:
    """Replaces the self-attention over image or video tokens; `disable` undoes it.

    The settings belong to the transformer: they apply to all pipelines that share it, and a copy of
    the model, or a model saved as a whole, has its own. Calls nest: a second `enable` holds until
    its own `disable`, which restores the first. If this raises, nothing has changed.

    Image tokens see each other according to the method. Other tokens in the same attention (text,
    reference images; none in Wan and LTX) are visible to every query, and see everything
    themselves; padding tokens are visible to none. Cross-attention does not change.

    Args:
        pipe_or_transformer: a pipeline, or a transformer of `supported_models()`. All transformers
            of a pipeline (two in Wan 2.2) are enabled, and count steps together.
        method:
            "neighborhood": `sparse_fmha.neighborhood_attention` with the options window, stride and
            dilation in tokens per axis: (height, width) for images, (frames, height, width) for
            videos, or one int for all axes; a window of -1 is the whole axis. An axis with one
            token needs a window of 1.
            "block_sparse": `sparse_fmha.block_sparse_attention` with the option mask: a BlockMask
            of the grid's tokens in row-major order, without text, or a function that makes one from
            q and k, `[B, tokens of the grid, H, D]`, in every layer and step.
            "dense": `sparse_fmha.attention`.
            Published methods of `sparse_fmha.patterns`, which explains their options:
            "sol" (tau, rest, block), "subblock" (keep, piece, block), "cube_top_k" and "vsa" (keep,
            cube), "draft" (keep, cube), "rectified" (keep, theta, block), "psa" (shares, by, least,
            similarity, every), "sliding_tile" (tile, window: tokens and tiles per axis), "skip"
            (threshold, or sparsity and a calibration of thresholds or its file); for videos
            only: "radial" (decay, first_frame, block), "svg" (keep, first_frame, rows, block),
            "nabla" (p, window, cube). "vsa" is without its coarse branch, whose gates models of
            diffusers do not have.
        layers: methods by layer, such as `{"default": {"method": "sol", "tau": 1.3}, "layers 0-1":
            None, "layer 7": {"method": "cube_top_k", "keep": [0.1, 0.25]}}`. Keys are numbers of
            blocks, counted as in dense_layers, names of the model's lists of blocks, such as
            "single_transformer_blocks", or "default", which is `method` if that is given. A number
            goes before a list, a list before the default. None, as no default, keeps the original
            attention. Each different method is a graph of its own in a compiled model.
        by_step: options of `method` that change, one mapping for each step that is not dense, such
            as `[{"keep": 0.5}, {"keep": 0.3}]`; the last is for all steps from there on. Counts
            steps as first_dense_steps does. In a compiled model each is a graph of its own.
        preset: a name of `presets()`, one of them, or the path of such a JSON file, as
            `calibrate` writes it, in place of a method. Arguments and options that are given
            replace those of the preset.
        first_dense_steps: denoising steps at the start of each run that use the original attention:
            their number, or as a float their share of all steps, rounded up. A new value of
            `timestep` is a new step, and a larger value begins a run. Reading it waits for the
            device. Interleaved runs are distinguished by the tensor of their text embeddings and
            their thread, or by a `Request`.
        last_dense_steps: the same at the end of each run. For it and for shares the number of steps
            is read from the scheduler of the pipeline, or is that of a `Request`.
        dense_layers: indices of blocks that keep the original attention. Blocks of models with
            `single_transformer_blocks` are counted through both streams, these last. Blocks of VACE
            are counted from `vace_blocks` on. A block of Stable Diffusion 3.5 with two attentions
            counts twice.
        grid: tokens per axis, for calls from which they cannot be read, without reference images;
            default: read from each call.
        min_tokens: calls with fewer tokens in the self-attention stay dense, as there is little to
            gain; this is warned about once. Default: the preset's, or 12288 for videos, 0 for
            images and the method "dense".
        verbose: warn once for each of: what runs, and what stays dense by which setting.

    Model calls then raise ValueError if the grid has another number of tokens than the attention or
    the window is larger than the grid, NotImplementedError for masks other than text padding, for
    dropout and for context parallelism other than Ulysses, RuntimeError for runs that cannot be
    distinguished, and the errors of the functions above. Settings without effect are warned about
    once: a window of the whole grid, a stride where the window covers an axis, a share of 1 (keep,
    p), all blocks in dense_layers, and runs that end before first_dense_steps.

    Raises:
        TypeError: an argument of the wrong type, an option that the method does not have, or an
            unsupported model.
        ValueError: an unknown method, a layer that does not exist or is named twice, or values for
            another number of axes.
        NotImplementedError: an attention processor that is not the model's own.
    """
    check_flag("verbose", verbose)
    settings = None if preset is None else named.find(preset)
    if settings is not None:
        if method is not None or layers is not None:
            name, given = ("method", method) if layers is None else ("layers", layers)
            raise ValueError(
                f"{name} must not be given beside preset = {settings.name!r}, got {given!r}"
            )
        method, layers = settings.method, settings.layers or None
        options = {**settings.options, **options}
        by_step = settings.by_step if by_step is None else by_step
    if method is None and layers is None:
        raise TypeError("method, layers or preset must be given")
    if method is None and options:
        raise TypeError(f"options must be given in layers if there is no method, got {options!r}")
    if by_step is not None:
        checks.check_by_step(by_step)
    if by_step and (method is None or layers is not None):
        raise TypeError("by_step must be given with a method, and without layers")
    choice = Choice(None if method is None else table.make(method, options), layers)
    if first_dense_steps is None:
        first_dense_steps = 0 if settings is None else settings.first_dense_steps
    if last_dense_steps is None:
        last_dense_steps = 0 if settings is None else settings.last_dense_steps
    if dense_layers is None:
        dense_layers = () if settings is None else settings.dense_layers
    first = checks.check_steps("first_dense_steps", first_dense_steps)
    last = checks.check_steps("last_dense_steps", last_dense_steps)
    if min_tokens is None and settings is not None:
        min_tokens = settings.min_tokens
    if min_tokens is not None:
        checks.check_count("min_tokens", min_tokens)
    found = transformers_of(pipe_or_transformer)
    grid = None if grid is None else checks.check_grid(grid)
    steps_of = [{**options, **table.as_given(changed)} for changed in by_step or ()]
    later_of: list[Any] = [table.make(str(method), changed) for changed in steps_of]
    plans = []
    for model, name, row in found:  # check everything before changing anything
        if settings is not None and name not in settings.models:
            raise ValueError(
                f"preset {settings.name!r} is for {' and '.join(settings.models)}, got {name}"
            )
        modules = row.layers(model)
        checks.check_layers(dense_layers, len(modules), name)
        plans.append(choice.of(model, name, row, dense_layers))
        for chosen in (*(plans[-1].methods or (choice.default,)), *later_of):
            checks.check_axes(chosen, grid, name, row)
        checks.check_processors(modules, Hooks.of(model), name, row)
    reports = Reports()
    for (_, name, _), plan in zip(found, plans, strict=True):
        if not plan.methods:
            reports(
                "dense_layers",
                f"method {method!r} has no effect: dense_layers names all blocks of {name}"
                if layers is None
                else f"enable() has no effect: layers and dense_layers leave no block of {name}",
            )
    schedule = Schedule(pipe_or_transformer) if hasattr(pipe_or_transformer, "scheduler") else None
    steps, done = Steps(first, last, schedule, bool(by_step)), []
    try:
        for (model, name, row), plan in zip(found, plans, strict=True):
            least = min_tokens
            if least is None:
                sparse = not all(isinstance(each, Dense) for each in plan.methods)
                least = MIN_TOKENS if row.axes == 3 and sparse else 0
            later = tuple((each,) * len(plan.methods) for each in later_of)
            hooks = Hooks(name, Settings(plan, later, grid, least, verbose), steps, reports)
            hooks.add(model)
            done.append((model, hooks))
    except BaseException:
        for model, hooks in reversed(done):
            hooks.remove(model)
        raise


def disable(pipe_or_transformer: object) -> None:
    """Undoes the last `enable` of each transformer and restores the previous state.

    Restores the same processor objects and removes the hooks. If "sparse_fmha" was chosen by name
    since, it also restores the backends that were chosen before.

    Raises:
        TypeError: an unsupported model.
        RuntimeError: none of the transformers is enabled.
    """
    found = [(model, Hooks.of(model)) for model, _, _ in transformers_of(pipe_or_transformer)]
    if not any(hooks for _, hooks in found):
        names = " and ".join(type(model).__name__ for model, _ in found)
        raise RuntimeError(f"{names} must be enabled before disable(); call enable() first")
    for model, hooks in found:
        if hooks is not None:
            hooks.remove(model)
