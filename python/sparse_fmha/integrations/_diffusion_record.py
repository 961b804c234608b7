"""What a run of an enabled pipeline computes, by layer and head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_fmha.integrations._diffusion_hooks import Hooks
from sparse_fmha.integrations._diffusion_layout import Layout, Seen
from sparse_fmha.integrations._diffusion_methods import Dense
from sparse_fmha.integrations._diffusion_models import transformers_of
from sparse_fmha.integrations._diffusion_plan import Method, Plan
from sparse_fmha.integrations._diffusion_watch import (
    Pairs,
    Running,
    Watched,
    errors,
    image_of,
    watching,
)


@dataclass
class Layer:
    """The calls of one self-attention with a method; others are dense.

    Attributes:
        name: of the transformer and the block.
        pairs: for each call `[H]`, the share of the pairs of a query and a key that are computed,
            also of those that a mask hides in a block, or that pad cubes at the grid's end; so it
            may be above 1.
        errors: for each call `[H]`, the relative error of the output, where that is recorded.
    """

    name: str
    pairs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)


@dataclass
class Recording:
    """A recorded run.

    Attributes:
        layers: all self-attentions of the transformers, in order.
    """

    layers: list[Layer]

    @property
    def density(self) -> Tensor:
        """fp64 `[layers, heads]`, the mean over calls; 1 for layers without a method."""
        return self._table("pairs", 1.0)

    @property
    def error(self) -> Tensor:
        """fp64 `[layers, heads]`, the root of the mean square over calls; 0 likewise, and for all
        if errors are not recorded."""
        return self._table("errors", 0.0, squares=True)

    def _table(self, name: str, default: float, squares: bool = False) -> Tensor:
        heads = max((len(x) for layer in self.layers for x in layer.pairs[:1]), default=0)
        rows = []
        for layer in self.layers:
            calls: Sequence[Tensor] = getattr(layer, name)
            if not calls:
                row = torch.full((heads,), default, dtype=torch.float64, device="cpu")
            elif squares:
                row = torch.stack(list(calls)).square().mean(0).sqrt()
            else:
                row = torch.stack(list(calls)).mean(0)
            rows.append(row)
        return torch.stack(rows)


class Recorded(Watched):
    """A layer's own method, noting what it computes."""

    def __init__(self, own: Method, layer: Layer, error: bool) -> None:
        super().__init__(own)
        self.layer, self.error = layer, error

    def prepared(self, layout: Layout, device: torch.device) -> Any:
        method = self.own.prepared(layout, device)

        def compute(
            q: Tensor, k: Tensor, v: Tensor, layout: Layout, seen: Seen, scale: float | None
        ) -> Tensor:
            with Pairs(q.shape[2]) as pairs:
                out = method(q, k, v, layout, seen, scale)
            self.layer.pairs.append(pairs.by_head / (q.shape[0] * q.shape[1] * k.shape[1]))
            if self.error:
                with torch.no_grad():
                    exact = Dense()(q, k, v, layout, seen, scale)
                    lost, size = errors(image_of(out, layout), image_of(exact, layout))
                tiny = torch.finfo(size.dtype).tiny
                self.layer.errors.append((lost / size.clamp(min=tiny)).sqrt())
            return out

        return Running(compute)


@contextlib.contextmanager
def record(pipe_or_transformer: object, *, error: bool = False) -> Iterator[Recording]:
    """Records what enabled transformers compute, while the context is open.

        with record(pipe) as recording:
            pipe("a cat")
        sparse_fmha.explore(grid, window, recording=recording, out="page.html")

    Results do not change. The lists of each call are read on the host, which takes time; dense
    steps are not recorded.

    Args:
        error: also compute each call densely, and record the relative error of each head's output
            over the grid.

    Raises:
        RuntimeError: a transformer is not enabled.
        TypeError: an unsupported model.
    """
    made = Recording([])
    found = transformers_of(pipe_or_transformer)
    with contextlib.ExitStack() as stack:
        for part, (model, name, _) in enumerate(found):
            hooks = Hooks.of(model)
            if hooks is None:
                raise RuntimeError(f"{name} must be enabled for record(); call enable() first")
            plan = hooks.settings.plan
            prefix = f"{name} {part + 1}, " if len(found) > 1 else ""
            layers = [Layer(f"{prefix}{number}") for number in range(len(plan.of_layer))]
            made.layers += layers

            def watched(
                methods: Sequence[Method], layers: list[Layer] = layers, plan: Plan = plan
            ) -> list[Recorded | None]:
                return [
                    None if own is None else Recorded(methods[own], layer, error)
                    for own, layer in zip(plan.of_layer, layers, strict=True)
                ]

            settings = hooks.settings
            later = [watched(methods) for methods in settings.later]
            own = watched(plan.methods)
            stack.enter_context(watching(model, name, own, settings, hooks.steps, later))
        yield made
