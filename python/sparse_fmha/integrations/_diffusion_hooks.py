"""The hook around a transformer's forward that tells its self-attention grid and step.

It holds everything that `enable` changes. It is a plain object that belongs to its model, so a copy
of a model, or a model saved as a whole, has its own. There are no hooks in layers, and torch runs
this one outside of what it compiles, so that the model or its blocks are one graph.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_fmha.integrations._diffusion_backend import NAME
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_models import MODELS, Processor
from sparse_fmha.integrations._diffusion_plan import Method, Plan
from sparse_fmha.integrations._diffusion_processors import Processors
from sparse_fmha.integrations._diffusion_state import Call, State
from sparse_fmha.integrations._diffusion_steps import Steps
from sparse_fmha.integrations._reports import Reports

_signature = functools.cache(inspect.signature)
CHECKPOINT = "_gradient_checkpointing_func"  # called with a block and its arguments


class Checkpointing:
    """Wraps a model's gradient checkpointing function during a call.

    The backward pass runs blocks again after the call has ended, maybe in a thread of its own. This
    restores the call for them.
    """

    def __init__(self, original: Callable[..., Any], state: State, call: Call) -> None:
        self.original, self.state, self.call = original, state, call

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.original(functools.partial(self._run, block), *args, **kwargs)

    def _run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self.state.call = self.state.call, self.call
        try:
            return block(*args, **kwargs)
        finally:
            self.state.call = before

    @staticmethod
    def put(model: nn.Module, state: State, call: Call) -> None:
        Checkpointing.take(model)
        if getattr(model, "gradient_checkpointing", False) and torch.is_grad_enabled():
            own = getattr(model, CHECKPOINT)
            setattr(model, CHECKPOINT, Checkpointing(own, state, call))

    @staticmethod
    def take(model: nn.Module) -> None:
        put = getattr(model, CHECKPOINT, None)
        if isinstance(put, Checkpointing):
            setattr(model, CHECKPOINT, put.original)


@dataclass(frozen=True)
class Settings:
    """What `enable` was told, but for steps."""

    plan: Plan
    later: tuple[tuple[Method, ...], ...]  # in place of the plan's methods, by sparse step
    grid: tuple[int, ...] | None
    min_tokens: int
    verbose: bool


class Hooks:
    """The hook and processors that one `enable` adds to one transformer; `remove` undoes it."""

    def __init__(self, name: str, settings: Settings, steps: Steps, reports: Reports) -> None:
        self.name, self.settings, self.steps, self.reports = name, settings, steps, reports
        self.state = State()
        # index of the block, its module, our processor, its own
        self.layers: list[tuple[int, Any, Processor, Processor]] = []
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

    def add(self, model: nn.Module) -> None:
        """Installs the hook and processors in place of previous ones; all or nothing."""
        self.previous = Hooks.of(model)
        try:
            if self.previous is not None:
                self.previous._take()
            self._note_backends(model)
            processors = Processors(self.state)
            layers = MODELS[self.name].layers(model)
            methods = self.settings.plan.of_layer
            for index, (layer, method) in enumerate(zip(layers, methods, strict=True)):
                if method is not None:
                    own = layer.processor
                    self.layers.append((index, layer, processors.of(own, method), own))
            self._put(model)
        except BaseException:
            self.remove(model)
            raise

    def originals(self) -> dict[nn.Module, Processor]:
        """The original processors by module."""
        return {layer: own for _, layer, _, own in self.layers}

    def remove(self, model: nn.Module) -> None:
        """Removes the hook and restores the previous one."""
        self._take()
        self._end(model)  # a call that was interrupted
        self._restore_backends()
        if self.previous is not None:
            self.previous._put(model)

    def _put(self, model: nn.Module) -> None:
        handle = model.register_forward_pre_hook(self.before, with_kwargs=True)
        self.handles.append(handle)  # immediately: the next line may be interrupted
        self.handles.append(model.register_forward_hook(self.after, always_call=True))
        for _, layer, ours, _ in self.layers:
            layer.set_processor(ours)

    def _tell_originals(self) -> None:
        """Of context parallelism that the model was told of after `enable`, for dense steps."""
        for _, _, ours, own in self.layers:
            config = getattr(ours, "_parallel_config", None)
            if config is None or getattr(own, "_parallel_config", None) is config:
                continue
            if not hasattr(own, "_parallel_config"):
                raise NotImplementedError(
                    f"context parallelism of {self.name} is not supported: {type(own).__name__}, "
                    "its attention processor, does not have it"
                )
            vars(own)["_parallel_config"] = config

    def _take(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        self._tell_originals()
        for _, layer, _, own in reversed(self.layers):
            layer.set_processor(own)

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
        self._check()
        self._tell_originals()
        given = _signature(type(model).forward).bind(model, *args, **kwargs).arguments
        row, settings = MODELS[self.name], self.settings
        layout = row.layout(model, given, settings.grid)
        step = row.step(given)
        dense, number = self.steps.place(*step, model)
        methods = settings.plan.methods
        if settings.later:
            methods = settings.later[min(number, len(settings.later) - 1)]
        if layout.tokens < settings.min_tokens:
            dense = True
            self.reports(
                "min_tokens",
                f"{self.name}: a call stays dense, as its {layout.tokens} tokens are fewer than "
                f"min_tokens = {settings.min_tokens}",
            )
        else:
            for method in methods:
                method.check(layout)
            self._report(layout)
            if settings.verbose:
                self._tell(layout, dense, step[0], len(row.layers(model)))
        if not dense:
            device = _device(given)
            methods = tuple(method.prepared(layout, device) for method in methods)
        self._end(model)
        self.state.call = Call(self.name, layout, methods, dense, row.alone, row.cut, row.masked)
        Checkpointing.put(model, self.state, self.state.call)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, model: nn.Module, args: tuple[Any, ...], out: object) -> None:
        self._end(model)

    def _end(self, model: nn.Module) -> None:
        """Ends the running call, if any. After KeyboardInterrupt torch runs no hooks, so that a
        call can be left over."""
        Checkpointing.take(model)
        self.state.call = None

    def _check(self) -> None:
        """Looks for what other code did to the layers since `enable`."""
        for index, layer, ours, _ in self.layers:
            if layer.processor is not ours:
                raise RuntimeError(
                    f"the attention processor of block {index} of {self.name} must not change "
                    f"after enable(), got {type(layer.processor).__name__}; call disable() and "
                    "enable() again"
                )

    def _tell(self, layout: Layout, dense: bool, timestep: object, blocks: int) -> None:
        """Says once what runs, and what stays dense for which reason."""
        plan = self.settings.plan
        kept = [layer for layer, method in enumerate(plan.of_layer) if method is None]
        if dense:
            at: Any = timestep.max().item() if isinstance(timestep, Tensor) else timestep
            told = f"the call at timestep {abs(at):g} stays dense, by {self.steps.named}"
            self.reports("dense step", f"{self.name}: {told}")
        else:
            for number, method in enumerate(plan.methods):
                own, named = plan.layers(number), type(method).__name__
                told = f"blocks {own} of {blocks} run {named}: {layout}"
                self.reports(f"sparse {number} {layout}", f"{self.name}: {told}")
        if kept:
            told = f"blocks {kept} stay dense, by {plan.by}"
            self.reports("dense block", f"{self.name}: {told}")

    def _report(self, layout: Layout) -> None:
        """Reports options that have no effect in a call."""
        for method in self.settings.plan.methods:
            for option, message in method.without_effect(layout):
                self.reports(option, f"{self.name}: {message}")
        for index, _, ours, _ in self.layers:
            if (backend := ours._attention_backend) != NAME:
                chosen = getattr(backend, "value", backend)
                self.reports(
                    "backend",
                    f"enable() has no effect on block {index} of {self.name}: the attention "
                    f"backend {chosen!r} was chosen after it; call set_attention_backend({NAME!r}) "
                    "to undo that",
                )


def _device(given: Mapping[str, Any]) -> torch.device:
    """The device of a call's input."""
    leaves = torch.utils._pytree.tree_leaves(dict(given))
    return next(x.device for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
