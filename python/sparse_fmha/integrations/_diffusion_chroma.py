"""Chroma's mask of padded text, which its blocks make a product for all pairs of tokens.

Its pipeline gives floats, and diffusers adds them to the scores: 1 for two tokens that are both not
padding, else 0. So padding is not hidden: other queries see it with 1/e of the weight, and its own
queries see all alike. That is computed here, by a bias of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.attention import attention
from sparse_fmha.integrations import _diffusion_tokens as tokens
from sparse_fmha.integrations._diffusion_joint import Joint
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_methods import Dense, Sparse
from sparse_fmha.integrations._diffusion_tokens import Given, Grid, Transformer


def others(model: Transformer, given: Given, grid: Grid | None) -> tuple[int, int]:
    """Text before the image.

    Raises:
        NotImplementedError: the mask hides tokens of the image, or has weights of other values.
    """
    text, references = tokens.text_and_references(model, given, grid)
    mask = given.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise NotImplementedError(
                "attention_mask of Chroma must be one of its tokens, [B, tokens], got shape "
                f"{list(mask.shape)}"
            )
        padding = mask[:, :text] == 0
        if not bool(
            ((mask == 1) | torch.nn.functional.pad(padding, (0, mask.shape[1] - text))).all()
        ):
            raise NotImplementedError(
                "attention_mask of Chroma must be 1, or 0 for padding of the text, got other "
                "values, or a mask that hides image tokens"
            )
    return text, references


def attend(
    method: Dense | Sparse,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Tensor,
    scale: float | None,
) -> Tensor:
    """The method under `mask`, `[B, 1, tokens, tokens]`."""
    if isinstance(method, Joint) and not method.in_graph:
        raise NotImplementedError(
            "the attention_mask of Chroma, which weakens padded text and does not hide it, is not "
            f"supported by {type(method).__name__}"
        )
    plain = layout.split(mask[:, 0, -1])[1]  # for the image's last token, which is no padding
    if mask.dtype == torch.bool:
        return method(q, k, v, layout, plain, scale)
    out = method(q, k, v, layout, plain.float() - 1, scale)
    alike = attention(layout.split(q)[1], k, v, scale=scale)
    text = torch.where(plain[..., None, None] > 0, layout.split(out)[1], alike)
    return layout.join(layout.image_of(out), text)
