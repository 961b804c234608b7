"""Hooks on a transformer and its self-attention modules that set the context of the backend.

They hold everything that `enable` changes. They are plain objects that belong to their modules, so
a copy of a model, or a model saved as a whole, has its own hooks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparse_fmha.integrations._diffusion_backend import CALL, NAME, UNDER_WAY, Call, Layer
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse
from sparse_fmha.integrations._diffusion_models import MODELS, Processor
from sparse_fmha.integrations._diffusion_steps import Steps
from sparse_fmha.integrations._reports import Reports

_signature = functools.cache(inspect.signature)
CHECKPOINT = "_gradient_checkpointing_func"  # called with a block and its arguments


class Checkpointing:
    """Wraps a model's gradient checkpointing function during a call.

    The backward pass runs blocks again after the call has ended. This restores the call for them.
    """

    def __init__(self, original: Callable[..., Any], call: Call) -> None:
        self.original, self.call = original, call

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.original(functools.partial(self._run, block), *args, **kwargs)

    def _run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if CALL.get() is call:
            return block(*args, **kwargs)
        before = CALL.set(call)
        UNDER_WAY[id(call)] = call
        try:
            return block(*args, **kwargs)
        finally:
            CALL.reset(before)
            UNDER_WAY.pop(id(call), None)

    @staticmethod
    def put(model: nn.Module, call: Call) -> None:
        Checkpointing.take(model)
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            setattr(model, CHECKPOINT, Checkpointing(getattr(model, CHECKPOINT), call))

    @staticmethod
    def take(model: nn.Module) -> None:
        put = getattr(model, CHECKPOINT, None)
        if isinstance(put, Checkpointing):
            setattr(model, CHECKPOINT, put.original)


class LayerHooks:
    """Hooks around one self-attention module."""

    def __init__(self, key: object, where: str, layer: Layer, processor: Processor) -> None:
        self.key, self.where, self.layer, self.processor = key, where, layer, processor

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.processor is not self.processor:
            raise RuntimeError(
                f"the attention processor of {self.where} must not change after enable(), got "
                f"{type(module.processor).__name__}; call disable() and enable() again"
            )
        self._set(self.layer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        self._set(None)

    def _set(self, layer: Layer | None) -> None:
        call = CALL.get()
        if call is not None and call.key is self.key:  # not if the module is called directly
            call.layer = layer


class Hooks:
    """The hooks and processors that one `enable` adds to one transformer; `remove` undoes it."""

    def __init__(
        self,
        name: str,
        method: Dense | Sparse,
        steps: Steps,
        grid: tuple[int, ...] | None,
        reports: Reports,
    ) -> None:
        self.name, self.method, self.steps, self.grid = name, method, steps, grid
        self.reports = reports
        self.key = object()
        self.layers: list[tuple[Any, LayerHooks, Processor]] = []  # module, hooks, its processor
        self.handles: list[RemovableHandle] = []
        self.previous: Hooks | None = None
        self.active: object = None
        self.backends: list[tuple[Processor, bool, object]] = []

    @staticmethod
    def of(model: nn.Module) -> Hooks | None:
        """The hooks that are active in a model."""
        for hook in model._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Hooks):
                return owner
        return None

    def add(
        self,
        model: nn.Module,
        dense_layers: Collection[int],
        make: Callable[[Processor], Processor],
    ) -> None:
        """Installs the hooks in place of previous ones; all or nothing.

        Args:
            make: makes our processor from the module's own.
        """
        self.previous = Hooks.of(model)
        try:
            if self.previous is not None:
                self.previous._take()
            self._note_backends(model)
            for index, layer in enumerate(MODELS[self.name].layers(model)):
                if index in dense_layers:
                    continue
                original = layer.processor
                processor = make(original)
                context = Layer(index, getattr(original, "_attention_backend", None))
                where = f"block {index} of {self.name}"
                hooks = LayerHooks(self.key, where, context, processor)
                self.layers.append((layer, hooks, original))
            self._put(model)
        except BaseException:
            self.remove(model)
            raise

    def originals(self) -> dict[nn.Module, Processor]:
        """The original processors by module."""
        return {layer: original for layer, _, original in self.layers}

    def remove(self, model: nn.Module) -> None:
        """Removes the hooks and restores the previous ones."""
        self._take()
        _drop(model)  # a call that was interrupted
        self._restore_backends()
        if self.previous is not None:
            self.previous._put(model)

    def _put(self, model: nn.Module) -> None:
        self._around(model, self)
        for layer, hooks, _ in self.layers:
            layer.set_processor(hooks.processor)
            self._around(layer, hooks)

    def _take(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        for layer, _, original in reversed(self.layers):
            layer.set_processor(original)

    def _around(self, module: nn.Module, hooks: Hooks | LayerHooks) -> None:
        handle = module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        self.handles.append(handle)  # immediately: the next line may be interrupted
        self.handles.append(module.register_forward_hook(hooks.after, always_call=True))

    def _note_backends(self, model: nn.Module) -> None:
        self.active = _AttentionBackendRegistry.get_active_backend()[0]
        found: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
        for processor in {id(p): p for p in found}.values():
            if hasattr(processor, "_attention_backend"):
                own = "_attention_backend" in vars(processor)
                self.backends.append((processor, own, processor._attention_backend))

    def _restore_backends(self) -> None:
        """Restores backends if ours was chosen by name since; `set_attention_backend` sets it for
        the whole model and as the default."""
        for processor, own, backend in self.backends:
            if processor._attention_backend != NAME or backend == NAME:
                continue
            if own:
                processor._attention_backend = backend
            else:
                del processor._attention_backend
        if self.active != NAME and _AttentionBackendRegistry.get_active_backend()[0] == NAME:
            _AttentionBackendRegistry._active_backend = self.active

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _signature(type(model).forward).bind(model, *args, **kwargs).arguments
        row = MODELS[self.name]
        layout = row.layout(model, given, self.grid)
        self.method.check(layout)
        self._report(layout)
        dense = self.steps.is_dense(*row.step(given), model)
        _drop(model)
        settings = model, self.key, self.name, layout, self.method, dense, row.alone
        call = Call(*settings, outer=CALL.get())
        UNDER_WAY[id(call)] = call
        CALL.set(call)
        Checkpointing.put(model, call)

    def _report(self, layout: Layout) -> None:
        """Reports options that have no effect in a call."""
        for option, message in self.method.without_effect(layout):
            self.reports(option, f"{self.name}: {message}")
        for _, hooks, _ in self.layers:
            if (backend := hooks.processor._attention_backend) != NAME:
                chosen = getattr(backend, "value", backend)
                self.reports(
                    "backend",
                    f"enable() has no effect on {hooks.where}: the attention backend {chosen!r} "
                    f"was chosen after it; call set_attention_backend({NAME!r}) to undo that",
                )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, model: nn.Module, args: tuple[Any, ...], out: object) -> None:
        _drop(model)


def _drop(model: nn.Module) -> None:
    """Ends the running call of a model, if any, and calls nested in it. After KeyboardInterrupt
    torch runs no hooks, so calls can be left over."""
    Checkpointing.take(model)
    outermost = None
    call = CALL.get()
    while call is not None:
        outermost = call if call.module is model else outermost
        call = call.outer
    if outermost is None:
        return
    call = CALL.get()
    CALL.set(outermost.outer)
    while call is not None and call is not outermost.outer:
        UNDER_WAY.pop(id(call), None)
        call = call.outer
