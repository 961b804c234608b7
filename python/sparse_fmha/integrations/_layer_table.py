"""The method of each layer of a language model, from a dict or a JSON file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from sparse_fmha.integrations import _layer_patterns, _layers
from sparse_fmha.integrations._layers import Made, Method
from sparse_fmha.integrations._reports import Reports

# What makes each method from its options; None is dense.
METHODS: dict[str, Callable[..., Made | None]] = {
    "dense": _layers.dense,
    "sdpa": _layers.sdpa,
    "skip": _layers.skip,
    "block_topk": _layers.block_topk,
    "anchor": _layers.anchor,
    "vertical_slash": _layers.vertical_slash,
    "minference": _layer_patterns.minference,
    "flexprefill": _layer_patterns.flexprefill,
    "streaming_llm": _layer_patterns.streaming_llm,
    "moa": _layer_patterns.moa,
    "s2": _layer_patterns.s2,
    "power": _layer_patterns.power,
    "dhsa": _layer_patterns.dhsa,
    "hip": _layer_patterns.hip,
    "token_top_k": _layer_patterns.token_top_k,
    "ssa": _layer_patterns.ssa,
    "psa": _layer_patterns.psa,
    "mminference": _layer_patterns.mminference,
    "token_sparse": _layer_patterns.token_sparse,
}
LAYERS = re.compile(r"layers? (\d+)(?:-(\d+))?")
KINDS = re.compile(r"[a-z_]*attention")  # names of `layer_types` in configurations
# Names of the number of layers in configurations, including those of decoders.
COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")


class Layers:
    """The method of each layer index; None for dense."""

    def __init__(
        self,
        default: Method | None,
        keys: Mapping[str, tuple[range, Method | None]],
        kinds: Mapping[str, Method | None] | None = None,
    ):
        self.default, self.keys, self.kinds = default, keys, kinds or {}
        self.of_layer: dict[int | None, Method | None] = {
            i: method for indices, method in keys.values() for i in indices
        }
        self.has_default = False
        self.reports = Reports()
        self.checked: set[tuple[int, tuple[str, ...]]] = set()

    def __call__(self, index: int | None) -> Method | None:
        """`index` is None for a module without one; keys with indices do not apply to it."""
        return self.of_layer.get(index, self.default)

    def of(self, module: nn.Module, index: int | None) -> Method | None:
        """The method of an attention module: by its index, then by its kind in `layer_types`."""
        kinds = getattr(getattr(module, "config", None), "layer_types", None)
        if self.kinds and index is not None and kinds and index not in self.of_layer:
            return self.kinds.get(kinds[index], self.default)
        return self(index)

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
        for kind in self.kinds:
            if kind not in kinds:
                has = ", ".join(sorted(set(kinds))) or "none"
                raise ValueError(
                    f"layers must name layer_types of {model}, which has {has}, got {kind!r}"
                )
        for key, (indices, _) in self.keys.items():
            if indices[-1] >= count:
                raise ValueError(
                    f"layers must name layers 0 to {count - 1} of {model}, got {key!r}"
                )
            kept = {kinds[i] for i in indices} if len(kinds) == count else {"attention"}
            if not any("attention" in kind and "linear" not in kind for kind in kept):
                raise ValueError(
                    f"layers must name layers of {model} with attention, got {key!r}, which has "
                    f"{', '.join(sorted(kept))}"
                )
        named = len(kinds) == count and set(kinds) <= set(self.kinds)
        if self.has_default and (named or all(i in self.of_layer for i in range(count))):
            self.reports(
                "default",
                f"the key 'default' of layers has no effect: each of the layers 0 to {count - 1} "
                f"of {model} has its own key",
            )
        self.checked.add((count, kinds))


def parse(layers: Mapping[str, Mapping[str, Any]] | str | PathLike[str]) -> Layers:
    """Parses the method of each layer index.

    Args:
        layers: `{"default": {"method": "dense"}, "layers 8-31": {"method": "skip", "threshold":
            1e-3}, "layer 3": ..., "full_attention": ...}`, or the path of such a JSON file. A
            number goes before a name of `layer_types`, that before "default". Without "default"
            the other layers are dense.

    Raises:
        ValueError: no key, an unknown key, method or option, a layer named by two keys, a file that
            is not a calibration, or a calibration with too few points.
        OSError: a file cannot be read.
        TypeError: not a mapping, or an option of another type.
    """
    if isinstance(layers, (str, PathLike)):
        layers = _read(Path(layers))
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a mapping or a path, got {type(layers).__name__}")
    if not layers:
        raise ValueError(
            "layers must have keys such as 'default', 'layer 3' or 'layers 8-31', got none"
        )
    for key in layers:
        if not isinstance(key, str):
            raise TypeError(f"keys of layers must be such as 'layers 8-31', got {key!r}")
    methods = {key: _method(key, value) for key, value in layers.items()}
    keys, named, kinds = {}, set(), {}
    for key, method in methods.items():
        if key == "default":
            continue
        if KINDS.fullmatch(key):
            kinds[key] = method
            continue
        keys[key] = indices = _indices(key), method
        for index in indices[0]:
            if index in named:
                raise ValueError(f"layers must name layer {index} once, got it again in {key!r}")
            named.add(index)
    parsed = Layers(methods.get("default"), keys, kinds)
    parsed.has_default = "default" in methods
    return parsed


def _indices(key: str) -> range:
    found = LAYERS.fullmatch(key)
    if not found:
        raise ValueError(
            "keys of layers must be 'default', 'layer 3', 'layers 8-31' or a name of layer_types "
            f"such as 'full_attention', got {key!r}"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"keys of layers must not end before they begin, got {key!r}")
    return range(first, last + 1)


def _read(path: Path) -> Any:
    text = path.read_text()
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"layers must be a JSON file, got {path}: {error}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Makes a JSON object's dict; keys must be unique."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(
                f"keys of one object in the file of layers must be unique, got {key!r} twice"
            )
    return dict(pairs)


def _method(key: str, value: Mapping[str, Any]) -> Method | None:
    if not isinstance(value, Mapping) or value.get("method") not in list(METHODS):
        raise ValueError(
            f"layers[{key!r}] must be a mapping with a method, one of {', '.join(METHODS)}, got "
            f"{value!r}"
        )
    options = {name: given for name, given in value.items() if name != "method"}
    make = METHODS[value["method"]]
    try:
        inspect.signature(make).bind(**options)
    except TypeError as problem:
        raise ValueError(f"layers[{key!r}], {value['method']}: {problem}") from problem
    made = make(**options)
    return made and Method(*made, f"layers[{key!r}], {value['method']}")
