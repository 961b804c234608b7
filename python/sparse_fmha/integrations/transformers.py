"""Attention of Hugging Face transformers by this library's kernels.

    from sparse_fmha.integrations import transformers as sparse

    sparse.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse_fmha")

The model's masks become block lists: causal, padding, sliding window and packed sequences alike are
evaluated block by block, and blocks that nobody sees cost nothing. No mask of all pairs is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.integrations._layers import parse

NAME = "sparse_fmha"
# Options of models that are not there, by the keyword that brings them.
REFUSED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "position_bias",
    "cache": "continuous batching (a paged cache)",
}


@dataclass(frozen=True)
class Plan:
    """What the queries of one forward pass see; made once, and read by each layer."""

    causal: bool = False
    mask: BlockMask | None = field(default=None, repr=False)

    def contiguous(self) -> Plan:
        """Asked for where transformers makes masks ahead of the model's call, which takes tensors.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{NAME} does not take caches that are compiled (cache_implementation='static'); "
            "generate with the default cache, or with attn_implementation='sdpa'"
        )


def register(
    name: str = NAME, layers: Mapping[str, Mapping] | str | PathLike | None = None
) -> None:
    """Makes `attn_implementation=name` known to transformers, attention and masks together.

    Prefill and encoders run on `attention` and `block_sparse_attention`. A forward pass of one
    query (decoding) goes to torch's SDPA with the mask that transformers makes for it: there is no
    kernel for it here yet.

    Args:
        name: without "flash" or "/", which transformers reads in its own way.
        layers: sparse methods by layer, for causal prefill without padding or a window; in other
            passes, but for decoding, such a layer raises NotImplementedError. A dict as
            `{"default": {"method": "dense"}, "layers 8-31": {"method": "skip", "threshold":
            1e-3}}`, or the path of such a JSON file. Methods:
            dense; skip(threshold); block_topk(blocks, block_q, block_kv); anchor(theta, step,
            block); vertical_slash(vertical, slash).

    Raises:
        ValueError: such a name; layers, methods or options that there are not.
    """
    if "flash" in name or "/" in name:
        raise ValueError(
            f"name is {name!r}; transformers takes names with 'flash' or '/' for its own"
        )
    method_of = None if layers is None else parse(layers)
    AttentionInterface.register(name, functools.partial(attend, method_of=method_of))
    AttentionMaskInterface.register(name, plan)


def plan(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> Plan | Tensor | None:
    """What transformers calls once for each kind of mask of a forward pass.

    Of one query it is the mask of `sdpa_mask`, else a `Plan`. Padding is read, which waits for the
    device.
    """
    if q_length == 1:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    padded = attention_mask is not None and not bool(attention_mask.all())
    aligned = q_offset == kv_offset and q_length == kv_length
    if not padded and mask_function is bidirectional_mask_function:
        return Plan()
    if not padded and aligned and mask_function is causal_mask_function:
        return Plan(causal=True)

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = mask_function(b, h, q + q_offset, kv + kv_offset)
        return seen & attention_mask[b, kv + kv_offset] if padded else seen

    if padded:
        attention_mask = attention_mask.to(device=device, dtype=torch.bool)
        missing = kv_length + kv_offset - attention_mask.shape[1]
        if missing > 0:  # of a cache that is longer than what has been seen
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    # Packed sequences differ by batch entry, too, and only the function knows.
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    batch = batch_size if padded or not plain else 1
    mask = BlockMask.from_mask_mod(sees, batch, 1, q_length, kv_length, device=device)
    return Plan(mask=mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Plan | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    method_of: Callable | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        query: `[B, Hq, Lq, D]`. key, value: `[B, Hkv, Lkv, D]`, not repeated. Any strides with a
            unit last one.
        attention_mask: what `plan` made; None where the model asks for none, then `is_causal`, or
            that of the module, decides.
        method_of: the method of a layer's index, where not all are dense.

    Returns:
        `[B, Lq, Hq, D]`, and None for the weights, which are never there.

    Raises:
        NotImplementedError: dropout, or an option of the model that is not there, by its name; a
            layer with a sparse method in another pass than causal prefill.
    """
    for option, what in REFUSED.items():
        if kwargs.get(option) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {what}, which {NAME} does not have; load the "
                "model with attn_implementation='eager' or 'sdpa'"
            )
    if query.shape[2] == 1 or isinstance(attention_mask, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if dropout:
        raise NotImplementedError(
            f"{type(module).__name__} asks for attention dropout {dropout}, which {NAME} does not "
            "have; set attention_dropout to 0 or call model.eval()"
        )
    if attention_mask is None:
        wanted = getattr(module, "is_causal", False) if is_causal is None else is_causal
        attention_mask = Plan(causal=bool(wanted))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    method = None if method_of is None else method_of(module.layer_idx)
    if method is not None:
        if not attention_mask.causal or q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                f"layer {module.layer_idx} has a sparse method, which takes causal prefill alone: "
                "not padding, windows, packed positions, encoders or a prompt behind a cache, nor "
                "what torch.compile traces with use_cache=False"
            )
        out = method(q, k, v, scaling)
    elif attention_mask.mask is not None:
        out = block_sparse_attention(q, k, v, attention_mask.mask, scale=scaling)
    else:
        out = attention(q, k, v, causal=attention_mask.causal, scale=scaling)
    return out, None
