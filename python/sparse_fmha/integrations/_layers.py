"""Which method each layer of a language model takes, from a dict or a JSON file."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from sparse_fmha import patterns, selection
from sparse_fmha._pattern_checks import check_int, check_number
from sparse_fmha.attention import attention, block_sparse_attention, stripe_attention
from sparse_fmha.block_grid import BlockGrid
from sparse_fmha.calibration import Calibration

Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
LAYERS = re.compile(r"layers? (\d+)(?:-(\d+))?")


def dense() -> None:
    """Nothing is left out; any kind of pass."""
    return None


def skip(
    threshold: float | None = None,
    *,
    sparsity: float | None = None,
    calibration: Calibration | str | PathLike | None = None,
) -> Attend:
    """Softmax skipping by a threshold, or by the share of tiles to skip and what measured it.

    A calibration, or the path of a saved one, says the threshold for each call's number of keys.
    """
    if (threshold is None) == (sparsity is None):
        raise ValueError("skip takes a threshold, or a sparsity and a calibration")
    if (sparsity is None) != (calibration is None):
        raise ValueError("skip takes sparsity and calibration together")
    if threshold is not None:
        check_number("threshold", threshold, 0, 1 - 2**-24)
    else:
        check_number("sparsity", sparsity, 0, 1 - 2**-24)
        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        calibration.fit()  # points that no law fits are an error here, not in a model's call

    def attend(q, k, v, scale):
        chosen = threshold
        if chosen is None:
            chosen = calibration.threshold_for(sparsity, k.shape[1])
        return attention(q, k, v, causal=True, scale=scale, skip_threshold=chosen)

    return attend


def block_topk(blocks: int, block_q: int = 128, block_kv: int = 128) -> Attend:
    """The best `blocks` key blocks by pooled scores, the first one and the diagonal."""
    check_int("blocks", blocks, 1)

    def attend(q, k, v, scale):
        grid = BlockGrid.of(q, k, block_q, block_kv, causal=True)
        chosen = selection.top_k_blocks(selection.block_scores(q, k, grid), blocks)
        mask = grid.mask(chosen | grid.sink(1) | grid.diagonal())
        return block_sparse_attention(q, k, v, mask, scale=scale)

    return attend


def anchor(theta: float = 12.0, step: int = 16, block: int = 128) -> Attend:
    """`patterns.anchor_attention`."""

    def attend(q, k, v, scale):
        options = {"theta": theta, "step": step, "block": block, "scale": scale}
        return patterns.anchor_attention(q, k, v, **options).out

    return attend


def vertical_slash(vertical: int = 1000, slash: int = 6096) -> Attend:
    """`patterns.vertical_slash`."""

    def attend(q, k, v, scale):
        mask = patterns.vertical_slash(q, k, vertical=vertical, slash=slash, scale=scale)
        return stripe_attention(q, k, v, mask, scale=scale)

    return attend


METHODS = {f.__name__: f for f in (dense, skip, block_topk, anchor, vertical_slash)}


def parse(layers: Mapping[str, Mapping] | str | PathLike) -> Callable[[int], Attend | None]:
    """The method of each layer index; None where it is dense.

    Args:
        layers: `{"default": {"method": "dense"}, "layers 8-31": {"method": "skip", "threshold":
            1e-3}, "layer 3": ...}`, or the path of such a JSON file. Without "default" other layers
            are dense.

    Raises:
        ValueError: a key, a method or an option that there is not, a layer that two keys name, a
            file that is no calibration or too few points in it.
        OSError: a file that cannot be read.
        TypeError: no mapping.
    """
    if isinstance(layers, (str, PathLike)):
        layers = json.loads(Path(layers).read_text(), object_pairs_hook=_once)
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers is a {type(layers).__name__}; a mapping or a path is needed")
    default, of_layer = None, {}
    for key, value in layers.items():
        method = _method(key, value)
        if key == "default":
            default = method
            continue
        found = LAYERS.fullmatch(key)
        if not found:
            raise ValueError(f"layers has the key {key!r}; 'default', 'layer 3' or 'layers 8-31'")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"layers has the key {key!r}, which ends before it begins")
        for index in range(first, last + 1):
            if index in of_layer:
                raise ValueError(f"layers names layer {index} twice, the second time by {key!r}")
            of_layer[index] = method
    return lambda index: of_layer.get(index, default)


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose keys differ."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the file of layers has the key {key!r} twice in one object")
    return dict(pairs)


def _method(key: str, value: Mapping) -> Attend | None:
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
    return make(**options)
