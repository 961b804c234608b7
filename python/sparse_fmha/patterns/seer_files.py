"""Reads the gates of SeerAttention from its published files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._checks import plain_ints
from sparse_fmha.patterns.seer_attention import SeerAttentionGate
from sparse_fmha.patterns.seer_decode import SeerDecodeGate

KEY = re.compile(
    r"(?:.*\.)?layers\.(\d+)\..*attn_gate\."
    r"(mask_linear_q|mask_linear_k|attngate_linear_q|attngate_linear_k|attngate_qnorm|attngate_knorm)"
    r"\.weight"
)
OURS = {
    "mask_linear_q": "weight_q", "mask_linear_k": "weight_k", "attngate_linear_q": "weight_q",
    "attngate_linear_k": "weight_k", "attngate_qnorm": "norm_q", "attngate_knorm": "norm_k",
}  # fmt: skip


@plain_ints
def load_seer_gates(
    source: str | Path | Mapping[str, Tensor],
    heads: int,
    heads_kv: int,
    head_dim: int,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> dict[int, SeerAttentionGate | SeerDecodeGate]:
    """Returns the gates of a model's layers, by the layer's index.

    Source: the repositories "...-AttnGates" of SeerAttention and SeerAttention-R, whose file
    `attn_gate_weights.pth` has `model.layers.N.self_attn.attn_gate.mask_linear_q.weight` and
    `mask_linear_k` (prefill), or `attngate_linear_q`, `attngate_linear_k`, `attngate_qnorm` and
    `attngate_knorm` (decode).

    Args:
        source: such a file, one of safetensors with the same names, or its tensors by name. Other
            names are passed over.
        heads, heads_kv, head_dim: of the model.
        device: of the weights; their dtype is the file's. Default: where they were read to.
        options: of `SeerAttentionGate` or `SeerDecodeGate`, such as `rope_base`, which is the
            model's; the numbers of pools must be the file's.

    Raises:
        ValueError: there is no gate, layers of both kinds, or weights of another shape.
        OSError: the file cannot be read.
        ImportError: a file of safetensors, and that package is not installed.
    """
    found: dict[int, dict[str, Tensor]] = {}
    kinds = set()
    for name, tensor in _tensors(source).items():
        matched = KEY.fullmatch(name)
        if matched:
            kinds.add(matched[2].partition("_")[0])
            found.setdefault(int(matched[1]), {})[OURS[matched[2]]] = tensor
    if len(kinds) != 1:
        raise ValueError(
            "source must have gates of SeerAttention or of SeerAttention-R, such as "
            "'model.layers.0.self_attn.attn_gate.mask_linear_k.weight', got "
            f"{'both' if kinds else 'none'}"
        )
    kind = SeerAttentionGate if kinds == {"mask"} else SeerDecodeGate
    gates: dict[int, SeerAttentionGate | SeerDecodeGate] = {}
    for layer, weights in sorted(found.items()):
        if "weight_k" not in weights:
            raise ValueError(f"source must have the weight of keys of layer {layer}, got none")
        own = weights["weight_k"]
        given = {"gate_dim": own.shape[-1], "device": device or own.device, "dtype": own.dtype}
        if kind is SeerDecodeGate:
            given["norm"] = "norm_k" in weights
            if "weight_q" in weights:  # [heads_kv, heads of a group, head_dim, gate_dim]
                weights["weight_q"] = weights["weight_q"].flatten(1, -2)
        gate = kind(heads, heads_kv, head_dim, **{**given, **options})
        try:
            gate.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"source must have the weights of layer {layer}: {error}") from None
        gates[layer] = gate
    return gates


def _tensors(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    if Path(source).suffix == ".safetensors":
        from safetensors.torch import load_file

        read: dict[str, Tensor] = load_file(str(source))
        return read
    state: Mapping[str, Tensor] = torch.load(source, map_location="cpu", weights_only=True)
    return state
