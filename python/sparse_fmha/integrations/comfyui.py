"""A node for ComfyUI that runs the self-attention of a diffusion model sparsely.

    from sparse_fmha.integrations.comfyui import write_node
    write_node("ComfyUI/custom_nodes")  # then restart ComfyUI

ComfyUI calls an override in place of each attention, without the grid of the tokens; a wrapper of
the diffusion model reads it from the latent. What is not ours (cross-attention, masks, dense blocks
and steps, few tokens) goes to the override that was there before, or to ComfyUI's own attention.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._diffusion_layout import Layout

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "SparseAttention", "write_node"]

KEY = "sparse_fmha"
OVERRIDE = "optimized_attention_override"
FOLDER = "sparse_fmha_nodes"
CODE = '''"""Sparse attention, by sparse_fmha."""

from sparse_fmha.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''
# Of ComfyUI's classes of models, whether their text is before the grid or all else behind it; in
# others no tokens but the grid's are known.
TEXT_BEFORE = {"Flux": True, "QwenImageTransformer2DModel": True, "HunyuanVideo": False}
METHODS = {"window": "neighborhood", "sol-attn": "sol", "vsa": "vsa", "subblock": "subblock"}
log = logging.getLogger(__name__)


class Attention:
    """The override of one patched model, and the wrapper that tells it the grid.

    Args:
        method: computes q, k, v of the grid and other tokens.
        previous: the override that was there before.
        others: the arguments of the node that say what stays dense.
    """

    def __init__(
        self, method: Any, previous: Callable[..., Tensor] | None, others: Mapping[str, Any]
    ) -> None:
        self.method, self.previous, self.others = method, previous, others
        self.dense_blocks = blocks_of(others["dense_blocks"])
        self.running = threading.local()  # grid and tokens before it, while the model runs
        self.told: set[str] = set()

    def wrap(self, executor: Any, latent: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Called around the diffusion model; its third argument is the text."""
        model = executor.class_obj
        text = args[1] if len(args) > 1 else kwargs.get("context")
        self.running.place = self._place(model, latent, text)
        try:
            return executor(latent, *args, **kwargs)
        finally:
            self.running.place = None

    def _place(
        self, model: object, latent: Tensor, text: Tensor | None
    ) -> tuple[str, tuple[int, ...], int] | None:
        patch = getattr(model, "patch_size", None)
        sizes = latent.shape[2:]
        if isinstance(patch, int):
            patch = (1,) * (len(sizes) - 2) + (patch,) * 2
        if patch is None or len(patch) != len(sizes):
            return None
        grid = tuple(math.ceil(n / p) for n, p in zip(sizes, patch, strict=True))
        kind = type(model).__name__
        before = text.shape[1] if TEXT_BEFORE.get(kind) and text is not None else 0
        return kind, grid, before

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: object = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Called by ComfyUI: q, k, v `[B, N, H * D]`, or `[B, H, N, D]` with skip_reshape, to the
        same of the result with skip_output_reshape."""
        if not skip_reshape:
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        layout, reason = self._layout(q, k, mask, kwargs.get("transformer_options") or {})
        self._tell(reason)
        if layout is None:
            form = (lambda x: x.transpose(1, 2)) if skip_reshape else (lambda x: x.flatten(-2))
            inner = func if self.previous is None else self.previous
            given = (func,) if self.previous is not None else ()
            return inner(
                *given,
                *map(form, (q, k, v)),
                heads,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
                **kwargs,
            )
        method = self.method.prepared(layout, q.device)
        out: Tensor = method(q, k, v, layout, [layout.all_runs()] * q.shape[0], kwargs.get("scale"))
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(-2)

    def _layout(
        self, q: Tensor, k: Tensor, mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Layout | None, str]:
        """The layout of a call that is ours, or None; and the reason."""
        place = getattr(self.running, "place", None)
        tokens = q.shape[1]
        if place is None:
            return None, "the model or its latent is of an unknown kind"
        kind, grid, before = place
        plain = tokens - math.prod(grid)
        if k.shape[1] != tokens or plain < before:
            return None, ""  # cross-attention, or text alone
        if plain and kind not in TEXT_BEFORE:
            return None, f"{plain} tokens of {kind} are not of the grid {grid}"
        if mask is not None:
            return None, "there is a mask"
        if tokens < self.others["min_tokens"]:
            return None, f"{tokens} tokens are fewer than min_tokens"
        if options.get("block_index") in self.dense_blocks:
            return None, "of dense_blocks"
        if not self.others["start_percent"] <= progress(options) < self.others["end_percent"]:
            return None, "of start_percent and end_percent"
        layout = Layout(grid, before, plain - before)
        self.method.check(layout)
        return layout, f"sparse on the grid {grid}, beside {plain} other tokens"

    def _tell(self, reason: str) -> None:
        if reason and self.others["verbose"] and reason not in self.told:
            self.told.add(reason)
            ours = reason.startswith("sparse")
            log.warning("sparse_fmha: %s%s", "" if ours else "attention stays dense: ", reason)


def blocks_of(text: str) -> set[int]:
    """The numbers of a list such as "0, 1, 47-49"."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"dense_blocks must be like '0, 1, 47-49', got {text!r}")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def progress(options: Mapping[str, Any]) -> float:
    """The share of the steps before the current one, by its sigma; 0 if it is not told."""
    now, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if now is None or schedule is None or len(schedule) < 2:
        return 0.0
    done = int((schedule > float(now.max()) * (1 + 1e-6)).sum())
    return done / (len(schedule) - 1)


class SparseAttention:
    """The node: a MODEL in, a patched clone of it out."""

    RETURN_TYPES: ClassVar = ("MODEL",)
    FUNCTION: ClassVar = "apply"
    CATEGORY: ClassVar = "model_patches/attention"
    DESCRIPTION: ClassVar = "Sparse self-attention over the tokens of the image or video."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        axis = {"default": 0, "min": 0, "max": 4096, "tooltip": "in tokens; 0: the whole axis"}
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS),),
                "window_frames": ("INT", axis),
                "window_height": ("INT", {**axis, "default": 24}),
                "window_width": ("INT", {**axis, "default": 24}),
                "tau": ("FLOAT", {"default": 1.3, "min": 0.0, "max": 4.0, "step": 0.05}),
                "keep_percent": ("FLOAT", {**share, "default": 0.25}),
                "start_percent": ("FLOAT", {**share, "default": 0.2}),
                "end_percent": ("FLOAT", {**share, "default": 1.0}),
                "dense_blocks": ("STRING", {"default": ""}),
                "min_tokens": ("INT", {"default": 12288, "min": 0, "max": 1 << 24}),
                "verbose": ("BOOLEAN", {"default": False}),
            }
        }

    def apply(
        self,
        model: Any,
        method: str,
        window_frames: int,
        window_height: int,
        window_width: int,
        tau: float,
        keep_percent: float,
        **others: Any,
    ) -> tuple[Any]:
        """Patches a clone of the model.

        Args:
            method: "window" (the three windows), "sol-attn" (tau), "vsa" or "subblock"
                (keep_percent).
            others: start_percent, end_percent: shares of the steps between which attention is
                sparse. dense_blocks: such as "0, 1, 47-49". min_tokens: calls with fewer stay
                dense. verbose: logs each reason once.
        """
        chosen: Any
        if method == "window":
            chosen = Windows((window_frames, window_height, window_width))
        else:
            options = {"tau": tau} if method == "sol-attn" else {"keep": keep_percent}
            chosen = table.make(METHODS[method], options)
        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        attention = Attention(chosen, options.get(OVERRIDE), others)
        options[OVERRIDE] = attention
        patched.add_wrapper_with_key("diffusion_model", KEY, attention.wrap)
        return (patched,)


class Windows:
    """Neighborhoods of one size on any grid: an axis that is shorter is whole."""

    def __init__(self, window: tuple[int, int, int]) -> None:
        self.window = window

    def check(self, layout: Layout) -> None:
        self.prepared(layout, None).check(layout)

    def prepared(self, layout: Layout, device: object) -> Any:
        sizes = zip(self.window[-len(layout.grid) :], layout.grid, strict=True)
        window = tuple(min(size or length, length) for size, length in sizes)
        return table.make("neighborhood", {"window": window})


def write_node(custom_nodes: str | PathLike[str]) -> Path:
    """Writes a folder of nodes into ComfyUI's `custom_nodes`; it imports the installed package.

    Returns:
        the folder, `CUSTOM_NODES/sparse_fmha_nodes`; a file of its own there is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(custom_nodes) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(CODE, encoding="utf-8")
    return folder


NODE_CLASS_MAPPINGS = {"SparseFMHAAttention": SparseAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"SparseFMHAAttention": "Sparse Attention (sparse_fmha)"}
