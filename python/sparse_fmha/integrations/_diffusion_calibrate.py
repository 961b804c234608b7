"""Runs a pipeline to find the budgets of a method by layer and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparse_fmha._checks import check_int, check_number
from sparse_fmha.integrations import _diffusion_checks as checks
from sparse_fmha.integrations._diffusion_budgets import (
    BUDGETS,
    Budgets,
    Measured,
    Trial,
    made,
    tried,
)
from sparse_fmha.integrations._diffusion_hooks import Settings
from sparse_fmha.integrations._diffusion_models import transformers_of
from sparse_fmha.integrations._diffusion_plan import Plan
from sparse_fmha.integrations._diffusion_steps import Schedule, Steps
from sparse_fmha.integrations._diffusion_watch import watching


def calibrate(
    pipe_or_transformer: object,
    runs: Callable[[], object] | Sequence[Callable[[], object]],
    method: str = "cube_top_k",
    *,
    error: float = 0.05,
    values: Sequence[float] | None = None,
    every: int = 1,
    first_dense_steps: float = 0,
    **options: Any,
) -> Budgets:
    """Finds the cheapest budget of a method with an allowed error, for each layer and head.

        found = calibrate(pipe, [lambda: pipe("a cat"), lambda: pipe("a street")], "subblock")
        found.save("mine.json")
        enable(pipe, preset="mine.json")

    The runs are dense. Beside each call the method is tried with all values on the same q, k and v,
    and its output over the grid is compared with the dense one: the error of a head is the norm of
    the difference over that of the output, over all calls and tokens. So what errors of earlier
    layers and steps do to later ones is not part of it, nor is what one sees in pictures.

    Args:
        pipe_or_transformer: a pipeline with one transformer, or a transformer; not compiled.
        runs: a function, or several of them; each makes a run of the model, such as one prompt.
        method: "cube_top_k", "vsa", "draft" or "subblock", whose budget is `keep`, by head; or
            "skip", whose budget is `threshold`, by layer.
        error: the relative error that a head may have ("skip": a layer).
        values: budgets to try, the cheapest first; default: some of the method's range. Where none
            is good enough, the budget leaves nothing out.
        every: tries the method in one of so many calls of each layer. A run takes a few times as
            long as a dense one where it tries all calls.
        first_dense_steps: as in `enable`: these steps are not measured, and stay dense with the
            preset.
        options: of the method.

    Returns:
        the budgets, how stable they are over the runs (of one run, over its halves), and `save`.

    Raises:
        ValueError, TypeError: an argument is not allowed, or no call of a layer was measured.
    """
    found = transformers_of(pipe_or_transformer)
    if len(found) != 1:
        raise ValueError(
            "pipe_or_transformer must have one transformer, got "
            f"{' and '.join(name for _, name, _ in found)}; calibrate one after the other"
        )
    ((model, name, row),) = found
    if callable(runs):
        runs = [runs]
    if not isinstance(method, str) or method not in BUDGETS:
        raise ValueError(f"method must be one of {list(BUDGETS)}, got {method!r}")
    if not isinstance(runs, Sequence) or not runs or not all(map(callable, runs)):
        raise TypeError(f"runs must be functions, each of which makes a run, got {runs!r}")
    check_number("error", error, 0, 1)
    check_int("every", every, 1)
    first = checks.check_steps("first_dense_steps", first_dense_steps)
    budget = BUDGETS[method]
    if budget.option in options:
        raise TypeError(f"{budget.option} must not be given: it is what is looked for")
    if values is not None and not checks.is_sequence(values):
        raise TypeError(f"values must be budgets to try, got {values!r}")
    chosen = budget.values if values is None else tuple(values)
    methods = tried(method, options, chosen)
    if not methods:
        raise ValueError("values must have at least one budget, got none")
    layers = row.layers(model)
    checks.check_axes(methods[0], None, name, row)
    checks.check_processors(layers, None, name, row)
    measured = [Measured() for _ in layers]
    trials = [Trial(methods, layer, every) for layer in measured]
    schedule = Schedule(pipe_or_transformer) if hasattr(pipe_or_transformer, "scheduler") else None
    settings = Settings(Plan((), ()), (), None, 0, False)
    with watching(model, name, trials, settings, Steps(first, 0, schedule)):
        for run in runs:
            for layer in measured:
                layer.runs.append([])
            run()
    for number, layer in enumerate(measured):
        if not all(layer.runs):
            raise ValueError(f"runs must call layer {number} of {name} after first_dense_steps")
    return made(name, method, options, chosen, error, measured, first)
