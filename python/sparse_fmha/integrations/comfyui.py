"""A node for ComfyUI that runs the self-attention of a diffusion model sparsely.

    from sparse_fmha.integrations.comfyui import write_node
    write_node("ComfyUI/custom_nodes")  # then restart ComfyUI

ComfyUI calls an override in place of each attention, without the grid of the tokens; a wrapper of
the diffusion model reads it from the latent. What is not ours (cross-attention, masks, dense blocks
and steps, few tokens) goes to the override that was there before, or to ComfyUI's own attention.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from sparse_fmha._checks import check_choice, check_int
from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations._comfyui_attention import Attention
from sparse_fmha.integrations._comfyui_methods import CONDITIONING, Routed, Windows

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "SparseAttention", "write_node"]

KEY = "sparse_fmha"
FOLDER = "sparse_fmha_nodes"
CODE = '''"""Sparse attention, by sparse_fmha."""

from sparse_fmha.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''
METHODS = ("window", "sol-attn", "sla", "vsa", "subblock")


class SparseAttention:
    """The node: a MODEL in, a patched clone of it out."""

    RETURN_TYPES: ClassVar = ("MODEL",)
    FUNCTION: ClassVar = "apply"
    CATEGORY: ClassVar = "model/patch"
    DESCRIPTION: ClassVar = "Sparse self-attention over the tokens of the image or video."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        axis = {"default": 0, "min": 0, "max": 4096, "tooltip": "in tokens; 0: the whole axis"}
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        percent = {"default": 10.0, "min": 0.5, "max": 95.0, "step": 0.5}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS),),
                "window_frames": ("INT", axis),
                "window_height": ("INT", {**axis, "default": 24}),
                "window_width": ("INT", {**axis, "default": 24}),
                "tau": ("FLOAT", {"default": 1.3, "min": 0.0, "max": 4.0, "step": 0.05}),
                "keep_percent": ("FLOAT", percent),
                "start_percent": ("FLOAT", {**share, "default": 0.2}),
                "end_percent": ("FLOAT", {**share, "default": 1.0}),
                "dense_blocks": ("STRING", {"default": ""}),
                "min_tokens": ("INT", {"default": 12288, "min": 0, "max": 1 << 20}),
                "verbose": ("BOOLEAN", {"default": False}),
            },
            "optional": {  # last, so that workflows that were saved without them stay as they are
                "extra_tokens": ("INT", {"default": 256, "min": 0, "max": 256, "step": 64}),
                "sink_conditioning": (list(CONDITIONING), {"default": "exact_kv_and_rows"}),
            },
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
        extra_tokens: int = 0,
        sink_conditioning: str = "exact_kv_and_rows",
        **others: Any,
    ) -> tuple[Any]:
        """Patches a clone of the model.

        Args:
            method: "window" (the three windows), "sol-attn" (tau), "sla", "vsa" or "subblock"
                (keep_percent, of 100).
            extra_tokens: of "sol-attn" and "sla", single tokens of other blocks that a block of
                queries sees exactly.
            sink_conditioning: of the tokens beside the grid in "sol-attn" and "sla": "exact_kv",
                all queries see them exactly; "exact_kv_and_rows", and they see all (of MiniMax-H3
                the audio, or all of them if there is none); "off", they are as the others.
            others: start_percent, end_percent: shares of the schedule, as the model's sampling
                counts them, between which attention is sparse. dense_blocks: such as "0, 1, 47-49".
                min_tokens: calls with fewer stay dense. verbose: logs once what is sparse, and what
                stays dense by these settings; a model that cannot be sparse is told anyhow.
        """
        check_choice("method", method, METHODS)
        check_choice("sink_conditioning", sink_conditioning, CONDITIONING)
        check_int("extra_tokens", extra_tokens)
        given = extra_tokens, sink_conditioning
        chosen: Any
        if method == "window":
            chosen = Windows((window_frames, window_height, window_width))
        elif method == "sol-attn":
            chosen = Routed({"tau": tau}, *given)
        elif method == "sla":
            chosen = Routed({"keep": keep_percent / 100}, *given)
        else:
            chosen = table.make(method, {"keep": keep_percent / 100})
        patched = model.clone()
        options = patched.model_options.setdefault("transformer_options", {})
        attention = Attention(chosen, None, others)
        if others["verbose"] and not isinstance(chosen, Routed):
            attention.tell(
                f"extra_tokens and sink_conditioning have no effect on the method {method!r}, "
                "where other tokens are exact"
            )
        sampling = model.get_model_object("model_sampling")
        attention.sigmas = (
            float(sampling.percent_to_sigma(others["start_percent"])),
            float(sampling.percent_to_sigma(others["end_percent"])),
        )
        attention.install(options)
        patched.add_wrapper_with_key("diffusion_model", KEY, attention.wrap)

        def again(patcher: object, timestep: object, model_options: dict[str, Any]) -> None:
            attention.install(model_options["transformer_options"])

        patched.add_callback_with_key("on_prepare_state", KEY, again)
        return (patched,)


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
