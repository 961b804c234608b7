"""Hooks on a transformer and its self-attention modules that set the context of the backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from sparse_fmha.integrations._diffusion_backend import CALL, LAYER, Call, Layer
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse
from sparse_fmha.integrations._diffusion_models import Model


class Steps:
    """Counts denoising steps: a new timestep is a new step, one that grows begins a new run.

    So the calls of one step, with and without the prompt, are one step. Where each token has its
    timestep, the largest counts: those of given frames are 0 throughout.
    """

    def __init__(self, dense: int) -> None:
        self.dense = dense
        self.step, self.last = 0, None

    def is_dense(self, timestep: Tensor | float | None) -> bool:
        if not self.dense:
            return False
        now = float(timestep.max() if isinstance(timestep, Tensor) else timestep)
        if self.last is None or now > self.last:
            self.step = 0
        elif now < self.last:
            self.step += 1
        self.last = now
        return self.step < self.dense


class Hooks:
    """What `enable` put into one transformer; `remove` takes it out."""

    def __init__(
        self,
        name: str,
        row: Model,
        signature: inspect.Signature,
        method: Dense | Sparse,
        steps: Steps,
        grid: tuple[int, ...] | None,
    ) -> None:
        self.name, self.row, self.signature = name, row, signature
        self.method, self.steps, self.grid = method, steps, grid
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.originals: list[tuple[nn.Module, object]] = []

    def on_model(self, model: nn.Module) -> None:
        self._around(model, self._call, CALL)

    def on_layer(self, index: int, layer: nn.Module, processor: object) -> None:
        original = layer.processor
        self.originals.append((layer, original))
        layer.set_processor(processor)
        context = Layer(index, getattr(original, "_attention_backend", None))
        self._around(layer, partial(self._layer, context, processor), LAYER)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer, original in self.originals:
            layer.set_processor(original)

    def _around(self, module: nn.Module, context: Callable, variable: ContextVar) -> None:
        def before(module, args, kwargs):
            variable.set(context(module, args, kwargs))

        def after(module, args, out):
            variable.set(None)

        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),  # after an error, too
        ]

    def _call(self, model: nn.Module, args: tuple, kwargs: dict[str, object]) -> Call:
        given = self.signature.bind(model, *args, **kwargs).arguments
        layout = self.row.layout(model, given, self.grid)
        self.method.check(layout)
        return Call(self.name, layout, self.method, self.steps.is_dense(given.get("timestep")))

    def _layer(self, context: Layer, processor: object, layer: nn.Module, *_) -> Layer:
        if layer.processor is not processor:
            raise RuntimeError(
                f"the attention processor of block {context.index} of {self.name} was replaced by "
                f"a {type(layer.processor).__name__} after enable(); disable() and enable() again"
            )
        return context
