"""Processors of self-attention that run a method in enabled calls and the original in others."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from sparse_fmha.integrations._diffusion_backend import BACKEND
from sparse_fmha.integrations._diffusion_cogvideox import CogVideoXProcessor
from sparse_fmha.integrations._diffusion_cosmos import CosmosProcessor
from sparse_fmha.integrations._diffusion_hunyuan15 import HunyuanVideo15Processor
from sparse_fmha.integrations._diffusion_models import Processor
from sparse_fmha.integrations._diffusion_sd3 import StableDiffusion3Processor
from sparse_fmha.integrations._diffusion_state import CURRENT, State

# Processors of diffusers that cannot take a backend as they are.
OURS: dict[str, type[Any]] = {
    "CogVideoXAttnProcessor2_0": CogVideoXProcessor,
    "CosmosAttnProcessor2_0": CosmosProcessor,
    "FusedCogVideoXAttnProcessor2_0": CogVideoXProcessor,
    "HunyuanVideo15AttnProcessor2_0": HunyuanVideo15Processor,
    "JointAttnProcessor2_0": StableDiffusion3Processor,
}


class Processors:
    """Makes processors for the modules of a transformer: one for all that have equal originals
    and a method."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.made: list[tuple[Processor, int, Processor]] = []  # original, method, ours

    def of(self, original: Processor, method: int) -> Processor:
        """Our processor in place of the module's own, for a method by its number in calls."""
        for known, number, made in self.made:
            if type(known) is not type(original) or number != method:
                continue
            if vars(known) == vars(original):
                return made
        own = OURS.get(type(original).__name__)
        ours: Any = copy.copy(original) if own is None else own()
        kind: Any = type(ours)
        ours.__class__ = _switch(kind)
        vars(ours).update(sparse_state=self.state, sparse_original=original, sparse_method=method)
        ours._attention_backend = BACKEND
        self.made.append((original, method, ours))
        return self.made[-1][2]


@functools.cache
def _switch(kind: Any) -> Any:
    """A subclass of a processor's class, whose calls in a dense step or outside of an enabled
    transformer are the original's. It has the name and signature of its base, which diffusers
    looks at."""

    class Switch(kind):  # type: ignore[misc]
        sparse_state: State
        sparse_original: Callable[..., Any]
        sparse_method: int

        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            call = self.sparse_state.call
            if call is None or call.dense:
                return self.sparse_original(*args, **kwargs)
            before = CURRENT.call, CURRENT.method
            CURRENT.call, CURRENT.method = call, call.methods[self.sparse_method]
            try:
                return super().__call__(*args, **kwargs)
            finally:
                CURRENT.call, CURRENT.method = before

        def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
            return _rebuilt, (kind,), vars(self)

    Switch.__name__, Switch.__qualname__ = kind.__name__, kind.__qualname__
    return Switch


def _rebuilt(kind: Any) -> Any:
    made = _switch(kind)
    return made.__new__(made)
