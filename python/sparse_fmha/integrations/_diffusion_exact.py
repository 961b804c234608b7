"""Models of diffusers that were trained with an attention of this library. They need no options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class Replaced:
    """Base of processors in place of a module's original one."""

    def __init__(self, original: Any) -> None:
        self.original = original


@dataclass(frozen=True)
class Exact:
    """A model class.

    Attributes:
        name: of the class; part: of a pipeline.
        word: what the functions `enable_WORD` and `disable_WORD` and their argument call it.
        processors: names of processor classes that can be replaced.
        ours: takes their place.
        layers: returns the attention modules in the order of the blocks.
    """

    name: str
    part: str
    word: str
    processors: tuple[str, ...]
    ours: type[Replaced]
    layers: Callable[[Any], list[Any]]

    def enable(self, given: object) -> None:
        layers = self._layers(given)
        for index, layer in enumerate(layers):
            kind = type(layer.processor).__name__
            if kind not in (*self.processors, self.ours.__name__):
                raise NotImplementedError(
                    f"the attention processor of block {index} of {self.name} must be one of "
                    f"{list(self.processors)}, got {kind}"
                )
        for layer in layers:
            if not isinstance(layer.processor, self.ours):
                layer.set_processor(self.ours(layer.processor))

    def disable(self, given: object) -> None:
        layers = self._layers(given)
        if not all(isinstance(layer.processor, self.ours) for layer in layers):
            raise RuntimeError(
                f"{self.name} must be enabled, with its attention processors in place, before "
                f"disable_{self.word}(); call enable_{self.word}() first"
            )
        for layer in layers:
            layer.set_processor(layer.processor.original)

    def _layers(self, given: object) -> list[Any]:
        model: Any = given if isinstance(given, nn.Module) else getattr(given, self.part, None)
        named = [cls for cls in type(model).__mro__ if cls.__name__ == self.name]
        if not any(cls.__module__.partition(".")[0] == "diffusers" for cls in named):
            raise TypeError(
                f"pipe_or_{self.word} must be a {self.name} of diffusers or a pipeline with one as "
                f"{self.part}, got {type(given).__name__}"
            )
        return self.layers(model)
