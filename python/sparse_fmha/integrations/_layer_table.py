"""The method of each layer of a language model, from a dict or a JSON file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sparse_fmha.integrations._layers import METHODS, Method
from sparse_fmha.integrations._reports import Reports

LAYERS = re.compile(r"layers? (\d+)(?:-(\d+))?")
# Names of the number of layers in configurations, including those of decoders.
COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")


class Layers:
    """The method of each layer index; None for dense."""

    def __init__(self, default: Method | None, keys: Mapping[str, tuple[range, Method | None]]):
        self.default, self.keys = default, keys
        self.of_layer: dict[int | None, Method | None] = {
            i: method for indices, method in keys.values() for i in indices
        }
        self.has_default = False
        self.reports = Reports()
        self.checked: set[tuple[int, tuple[str, ...]]] = set()

    def __call__(self, index: int | None) -> Method | None:
        """`index` is None for a module without one; keys with indices do not apply to it."""
        return self.of_layer.get(index, self.default)

    def check(self, module: nn.Module) -> None:
        """Checks that each key names layers that the model of an attention module has.

        Raises:
            ValueError: a key names a layer that does not exist.
        """
        config = getattr(module, "config", None)
        # The vision tower of a language model counts its own layers.
        if config is None or not hasattr(config, "vocab_size"):
            return
        count = max((getattr(config, name, None) or 0 for name in COUNTS), default=0)
        kinds = tuple(getattr(config, "layer_types", None) or ())
        if not count or (count, kinds) in self.checked:
            return
        model = f"the model of {type(module).__name__}"
        for key, (indices, _) in self.keys.items():
            if indices[-1] >= count:
                raise ValueError(f"layers has the key {key!r}; {model} has layers 0 to {count - 1}")
            kept = {kinds[i] for i in indices} if len(kinds) == count else {"attention"}
            if not any("attention" in kind and "linear" not in kind for kind in kept):
                raise ValueError(
                    f"layers has the key {key!r}; {model} has no attention there, but "
                    f"{', '.join(sorted(kept))}"
                )
        if self.has_default and all(i in self.of_layer for i in range(count)):
            self.reports(
                "default",
                f"layers has the key 'default'; {model} has layers 0 to {count - 1}, and each has "
                "a key of its own",
            )
        self.checked.add((count, kinds))


def parse(layers: Mapping[str, Mapping[str, Any]] | str | PathLike[str]) -> Layers:
    """Parses the method of each layer index.

    Args:
        layers: `{"default": {"method": "dense"}, "layers 8-31": {"method": "skip", "threshold":
            1e-3}, "layer 3": ...}`, or the path of such a JSON file. Without "default" the other
            layers are dense.

    Raises:
        ValueError: no key, an unknown key, method or option, a layer named by two keys, a file that
            is not a calibration, or a calibration with too few points.
        OSError: a file cannot be read.
        TypeError: not a mapping.
    """
    if isinstance(layers, (str, PathLike)):
        layers = json.loads(Path(layers).read_text(), object_pairs_hook=_once)
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers is a {type(layers).__name__}; a mapping or a path is needed")
    if not layers:
        raise ValueError("layers is empty; 'default', 'layer 3' or 'layers 8-31' are its keys")
    methods = {key: _method(key, value) for key, value in layers.items()}
    keys, named = {}, set()
    for key, method in methods.items():
        if key == "default":
            continue
        keys[key] = indices = _indices(key), method
        for index in indices[0]:
            if index in named:
                raise ValueError(f"layers names layer {index} twice, the second time by {key!r}")
            named.add(index)
    parsed = Layers(methods.get("default"), keys)
    parsed.has_default = "default" in methods
    return parsed


def _indices(key: str) -> range:
    found = LAYERS.fullmatch(key)
    if not found:
        raise ValueError(f"layers has the key {key!r}; 'default', 'layer 3' or 'layers 8-31'")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"layers has the key {key!r}, which ends before it begins")
    return range(first, last + 1)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Makes a JSON object's dict; keys must be unique."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the file of layers has the key {key!r} twice in one object")
    return dict(pairs)


def _method(key: str, value: Mapping[str, Any]) -> Method | None:
    if not isinstance(value, Mapping) or value.get("method") not in METHODS:
        raise ValueError(
            f"layers[{key!r}] is {value!r}; a mapping with a method is needed, one of: "
            + ", ".join(METHODS)
        )
    options = {name: given for name, given in value.items() if name != "method"}
    make = METHODS[value["method"]]
    try:
        inspect.signature(make).bind(**options)
    except TypeError as problem:
        raise ValueError(f"layers[{key!r}], {value['method']}: {problem}") from problem
    made = make(**options)
    return made and Method(*made, f"layers[{key!r}], {value['method']}")
