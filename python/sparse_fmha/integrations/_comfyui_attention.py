"""The override of attention in ComfyUI, and where the tokens of a call are."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sparse_fmha.integrations._comfyui_methods import Tokens
from sparse_fmha.integrations._diffusion_layout import Layout

OVERRIDE = "optimized_attention_override"
H3 = "minimax_h3_layout"  # which says where the tokens of MiniMax-H3 are
# Of ComfyUI's classes of models, whether their text is before the grid or all else behind it; in
# others no tokens but the grid's are known.
TEXT_BEFORE = {"Flux": True, "QwenImageTransformer2DModel": True, "HunyuanVideo": False}
log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where the tokens of a call are."""

    kind: str
    grid: tuple[int, ...]
    before: int  # tokens before those of the grid
    rows_from: int = 0  # see `Tokens`


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
        self.sigmas = (math.inf, 0.0)  # between which attention is sparse

    def install(self, options: dict[str, Any]) -> None:
        """Puts the override on top; a node that comes later may have put its own there."""
        current = options.get(OVERRIDE)
        if current is not self:
            self.previous, options[OVERRIDE] = current, self

    def wrap(self, executor: Any, latent: object, *args: Any, **kwargs: Any) -> Any:
        """Called around the diffusion model; its third argument is the text."""
        model = executor.class_obj
        text = args[1] if len(args) > 1 else kwargs.get("context")
        self.running.place = self._place(model, latent, text)
        try:
            return executor(latent, *args, **kwargs)
        finally:
            self.running.place = None

    def _place(self, model: object, latent: object, text: Tensor | None) -> Place | None:
        patch = getattr(model, "patch_size", None)
        if not isinstance(latent, Tensor):  # of video and audio together
            return None
        sizes = latent.shape[2:]
        if isinstance(patch, int):
            patch = (1,) * (len(sizes) - 2) + (patch,) * 2
        if patch is None or len(patch) != len(sizes):
            return None
        grid = tuple(math.ceil(n / p) for n, p in zip(sizes, patch, strict=True))
        kind = type(model).__name__
        before = text.shape[1] if TEXT_BEFORE.get(kind) and text is not None else 0
        return Place(kind, grid, before)

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
        if not skip_reshape:  # k and v may have fewer heads
            dim = q.shape[-1] // heads
            q, k, v = (x.unflatten(-1, (-1, dim)) for x in (q, k, v))
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        layout = self._layout(q, k, mask, kwargs.get("transformer_options") or {})
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
    ) -> Layout | None:
        """The layout of a call that is ours."""
        tokens = q.shape[1]
        place = h3_place(options, tokens) or getattr(self.running, "place", None)
        if place is None:
            self.tell("attention stays dense: the model or its latent is of an unknown kind")
            return None
        kind, grid, before, rows_from = place
        plain = tokens - math.prod(grid)
        if k.shape[1] != tokens or plain < before:
            return None  # cross-attention, or text alone
        if mask is not None or (plain and kind not in (*TEXT_BEFORE, H3)):
            others = f"{plain} tokens of {kind} are not of the grid {grid}"
            self.tell(f"attention stays dense: {others if mask is None else 'there is a mask'}")
            return None
        block, now = options.get("block_index"), options.get("sigmas")
        if block is None and self.dense_blocks:
            self.tell(f"dense_blocks has no effect, as {kind} does not tell numbers of blocks")
        reason = ""
        if tokens < self.others["min_tokens"]:
            reason = f"{tokens} tokens are fewer than min_tokens"
        elif block in self.dense_blocks:
            reason = "of dense_blocks"
        elif now is not None and not self.sigmas[1] <= float(now[0]) <= self.sigmas[0]:
            reason = "of start_percent and end_percent"
        if self.others["verbose"]:
            sparse = f"sparse on the grid {grid}, beside {plain} other tokens"
            self.tell(f"attention stays dense: {reason}" if reason else sparse)
        if reason:
            return None
        layout = Tokens(grid, before, plain - before, rows_from=rows_from)
        self.method.check(layout)
        return layout

    def tell(self, message: str) -> None:
        """Once. What keeps the node from working is told also if it is not verbose."""
        if message not in self.told:
            self.told.add(message)
            log.warning("sparse_fmha: %s", message)


def blocks_of(text: str) -> set[int]:
    """The numbers of a list such as "0, 1, 47-49"."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdigit() or ("-" in part and not last.isdigit()):
            raise ValueError(f"dense_blocks must be like '0, 1, 47-49', got {text!r}")
        ends = sorted((int(first), int(last or first)))
        found |= set(range(ends[0], ends[1] + 1))
    return found


def h3_place(options: Mapping[str, Any], tokens: int) -> Place | None:
    """Of a call of MiniMax-H3 with all its tokens: text, references and audio are before the
    video, which is last."""
    layout = options.get(H3)
    if layout is None or layout.seq_len != tokens:
        return None
    video = next(((a, b) for a, b, kind in layout.segments if kind == "video"), None)
    _, frames, height, width, _ = layout.signature
    grid = (int(frames), int(height) // 2, int(width) // 2)
    if video is None or video[1] != tokens or video[1] - video[0] != math.prod(grid):
        return None
    audio = (a for a, _, kind in layout.segments if kind == "audio")
    return Place(H3, grid, video[0], next(audio, 0))
