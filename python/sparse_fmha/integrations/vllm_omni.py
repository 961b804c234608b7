"""Sparse self-attention of diffusion models in vLLM-Omni, as its plug-in "sparse_fmha".

The installed package is found by its entry point in the group `vllm_omni.sparse_attn`. Choose it
for self-attention in the configuration of attention (`--diffusion-attention-config`):

    {"per_role": {"self": {"backend": "SPARSE_ATTN", "extra": {
        "backend": "sparse_fmha",
        "params": {"method": "neighborhood", "window": [9, 16, 24], "first_dense_steps": 0.2}}}}}

Written against vLLM-Omni's published interface, and tested against a stub with its signatures only:
no run in vLLM-Omni itself has been made.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_methods import Dense
from sparse_fmha.integrations._reports import Reports

__all__ = ["attend"]

REPORTS = Reports()

MIN_TOKENS = 12288
# What the server says of a call; everything else that is not ours is an option of the method.
SERVER = ("denoise_step_idx", "total_denoise_steps", "latent_shape", "patch_size",
          "total_latent_frames", "patches_per_frame", "kv_cache_dtype")  # fmt: skip
OURS = {"method": "neighborhood", "first_dense_steps": 0, "last_dense_steps": 0, "before": 0,
        "min_tokens": MIN_TOKENS}  # fmt: skip


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Called by vLLM-Omni: q `[B, tokens, H, D]`, k and v `[B, tokens, Hkv, D]` to out like q.

    Args:
        params: the server's state of the call, of which `latent_shape` and `patch_size` are the
            grid, and the configuration: `method` ("neighborhood") and its options, as
            `integrations.diffusers.enable` has them; `first_dense_steps` and `last_dense_steps`,
            numbers of steps or shares as floats; `min_tokens` (12288), below which calls are dense;
            `before`, how many of the tokens that are not on the grid are before it. Other names are
            warned about once and ignored: servers may add some.

    Raises:
        NotImplementedError: causal attention.
        ValueError, TypeError: a call that shows no grid, has fewer tokens or other keys, or an
            option is not allowed.
    """
    if is_causal:
        raise NotImplementedError("sparse_fmha does not support causal attention for vLLM-Omni")
    given = {name: params.get(name, default) for name, default in OURS.items()}
    options = _options(given["method"], params)
    method: Any = _made(given["method"], json.dumps(options, sort_keys=True))
    layout = _layout(query.shape[1], key.shape[1], int(given["before"]), params)
    if layout.tokens < given["min_tokens"] or _is_dense(given, params):
        method = Dense()
    else:
        method.check(layout)
        method = method.prepared(layout, query.device)
    seen = [layout.all_runs()] * query.shape[0]
    out: Tensor = method(query, key, value, layout, seen, softmax_scale)
    return out


def _options(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    names = table.options_of(method)
    options = {}
    for name, value in params.items():
        if name in names:
            options[name] = value
        elif name not in SERVER and name not in OURS:
            REPORTS(
                f"{method} {name}",
                f"params of vLLM-Omni have {name!r}, which is ignored: options of method "
                f"{method!r} are {names}",
            )
    return options


@functools.lru_cache(64)
def _made(method: str, options: str) -> Any:
    return table.make(method, table.as_given(json.loads(options)))


def _layout(tokens: int, keys: int, before: int, params: Mapping[str, Any]) -> Layout:
    if tokens != keys:
        raise ValueError(
            f"key must have the {tokens} tokens of query, got {keys}; choose this attention for "
            "self-attention alone"
        )
    sizes = [params.get(name) for name in ("latent_shape", "patch_size")]
    if any(size is None for size in sizes):
        raise ValueError(
            "params must have latent_shape and patch_size, which this model does not publish, got "
            f"{sorted(params)}"
        )
    grid = tuple(n // p for n, p in zip(*map(_first, sizes), strict=True))
    behind = tokens - math.prod(grid) - before
    if behind < 0:
        raise ValueError(
            f"query must have at least the {math.prod(grid)} tokens of the grid {grid} and "
            f"before = {before} others, got {tokens}"
        )
    return Layout(grid, before, behind)


def _first(value: Any) -> list[int]:
    """Of the first sample: samples of a batch have one size."""
    rows = value.tolist() if isinstance(value, Tensor) else value
    return [int(n) for n in (rows[0] if isinstance(rows[0], (list, tuple)) else rows)]


def _is_dense(given: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    first, last = given["first_dense_steps"], given["last_dense_steps"]
    if not first and not last:
        return False
    state = [params.get(name) for name in ("denoise_step_idx", "total_denoise_steps")]
    if state[0] is None or (state[1] is None and (last or isinstance(first, float))):
        raise ValueError(
            "params must have denoise_step_idx and total_denoise_steps for first_dense_steps = "
            f"{first} and last_dense_steps = {last}, got {sorted(params)}"
        )
    steps = _numbers(state[0])
    total = max(_numbers(state[1])) if state[1] is not None else 0
    first, last = (
        math.ceil(n * total - 1e-9) if isinstance(n, float) else n for n in (first, last)
    )
    dense = {step < first or (last > 0 and step >= total - last) for step in steps}
    if len(dense) > 1:
        raise ValueError(f"denoise_step_idx must be dense or sparse for all samples, got {steps}")
    return dense.pop()


def _numbers(value: Any) -> set[int]:
    """Of the samples: a tensor has one for each of them."""
    return {int(n) for n in (value.tolist() if isinstance(value, Tensor) else [value])}
