"""The method of each self-attention of a transformer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_methods import BlockSparse, Dense, Sparse
from sparse_fmha.integrations._diffusion_models import Model

Method = Dense | Sparse
NUMBERS = re.compile(r"layers? (\d+)(?:-(\d+))?")
DEFAULT = "default"


@dataclass(frozen=True)
class Plan:
    """The methods of a transformer.

    Attributes:
        methods: the distinct ones, each of which has processors of its own.
        of_layer: for each self-attention the index of its method; None: it stays the original.
        by: the arguments of `enable` by which some stay the original.
    """

    methods: tuple[Method, ...]
    of_layer: tuple[int | None, ...]
    by: str = "dense_layers"

    def layers(self, number: int) -> list[int]:
        """Those of a method."""
        return [layer for layer, own in enumerate(self.of_layer) if own == number]


class Choice:
    """The methods that `enable` was told, before a transformer is known.

    Args:
        method: of all layers that `layers` does not name; None: these stay the original.
        layers: by "layer 3", "layers 8-31", the name of a list of blocks, or "default".

    Raises:
        ValueError, TypeError: a key, a method or an option is not allowed.
    """

    def __init__(self, method: Method | None, layers: Mapping[str, Any] | None) -> None:
        self.default = method
        self.by_kind: dict[str, Method | None] = {}
        self.by_number: dict[int, tuple[str, Method | None]] = {}
        if layers is None:
            return
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must be a mapping, got {type(layers).__name__}")
        if not layers:
            raise ValueError("layers must have keys such as 'layers 8-31' or 'default', got none")
        for key, value in layers.items():
            if not isinstance(key, str):
                raise TypeError(f"keys of layers must be such as 'layers 8-31', got {key!r}")
            self._add(key, _made(key, value))

    def _add(self, key: str, made: Method | None) -> None:
        if key == DEFAULT:
            if self.default is not None:
                raise ValueError("layers must not have the key 'default' beside a method")
            self.default = made
            return
        numbers = NUMBERS.fullmatch(key)
        if numbers is None:
            self.by_kind[key] = made
            return
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise ValueError(f"keys of layers must not end before they begin, got {key!r}")
        for layer in range(first, last + 1):
            if layer in self.by_number:
                raise ValueError(f"layers must name layer {layer} once, got it again in {key!r}")
            self.by_number[layer] = key, made

    def of(self, model: nn.Module, name: str, row: Model, dense_layers: Collection[int]) -> Plan:
        """The plan of a transformer: `dense_layers` go first, then numbers, then lists of blocks.

        Raises:
            ValueError: layers or lists that the transformer does not have.
        """
        layers = row.layers(model)
        names = {module: path.partition(".")[0] for path, module in model.named_modules()}
        kinds = [names[layer] for layer in layers]
        for kind in self.by_kind:
            if kind not in kinds:
                raise ValueError(
                    "keys of layers must be 'layer 3', 'layers 8-31', 'default' or one of "
                    f"{sorted(set(kinds))} of {name}, got {kind!r}"
                )
        for number, (key, _) in self.by_number.items():
            if number >= len(layers):
                raise ValueError(
                    f"layers must name layers 0 to {len(layers) - 1} of {name}, got {key!r}"
                )
        methods: list[Method] = []
        of_layer: list[int | None] = []
        for number, kind in enumerate(kinds):
            method = self.by_kind.get(kind, self.default)
            if number in self.by_number:
                method = self.by_number[number][1]
            if method is None or number in dense_layers:
                of_layer.append(None)
                continue
            known = [n for n, other in enumerate(methods) if _same(method, other)]
            of_layer.append(known[0] if known else len(methods))
            if not known:
                methods.append(method)
        by = "dense_layers or layers" if self.by_kind or self.by_number else "dense_layers"
        return Plan(tuple(methods), tuple(of_layer), by)


def _made(key: str, value: Any) -> Method | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError(f"layers[{key!r}] must be None or a mapping with a method, got {value!r}")
    options = {name: given for name, given in value.items() if name != "method"}
    try:
        return table.make(value["method"], table.as_given(options))
    except (TypeError, ValueError) as error:
        raise type(error)(f"layers[{key!r}]: {error}") from None


def _same(method: Method, other: Method) -> bool:
    if isinstance(method, BlockSparse):  # its mask is not compared
        return method is other
    return method == other
