"""Runs the attention of Hugging Face transformers on this library's kernels.

    from sparse_fmha.integrations import transformers as sparse

    sparse.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sparse_fmha")

The model's masks (causal, padding, sliding window, packed sequences) become block lists. Blocks
that no query sees cost nothing, and no mask of all pairs is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._versions import require

require("transformers", by=__name__, extra="transformers")

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_fmha._checks import MAX_HEAD_DIM
from sparse_fmha.attention import attention, block_sparse_attention, neighborhood_attention
from sparse_fmha.integrations import _transformers_packed, _transformers_sdpa
from sparse_fmha.integrations._layer_table import Layers, parse
from sparse_fmha.integrations._layers import Call, Method
from sparse_fmha.integrations._sinks import with_sink
from sparse_fmha.integrations._transformers_decode import as_mask, decode, is_of_one, seen_by_one
from sparse_fmha.integrations._transformers_masks import plan
from sparse_fmha.integrations._transformers_packed import attend_packed, continuous_batching
from sparse_fmha.integrations._transformers_plan import Plan, of_last

__all__ = ["Plan", "attend", "continuous_batching", "plan", "register"]

NAME = "sparse_fmha"
# Unsupported options of models, by keyword, and what takes them.
REFUSED = {
    "position_bias": ("position_bias", "'eager' or 'sdpa'"),
    "cache": ("a paged cache; for generate_batch, see continuous_batching()", "'eager' or 'sdpa'"),
}
SINKS = "s_aux"  # of each head, as gpt-oss passes them
SOFTCAP = "softcap"  # of scores, as Gemma 2 passes it
WEIGHTS = "output_attentions"  # True or False in each layer's call


def register(
    name: str = NAME, layers: Mapping[str, Mapping[str, Any]] | str | PathLike[str] | None = None
) -> None:
    """Registers `attn_implementation=name` with transformers, for attention and masks.

    Prefill and encoders run on `attention` and `block_sparse_attention`, a forward pass of one
    query (decode) on `decode_attention`, over a list of tokens if padding lies between them. With a
    mask function that is not known, with gradients or with dropout, one query goes to torch's SDPA.

    Args:
        name: a name without "flash" or "/", which transformers interprets in its own way.
        layers: sparse methods by layer, for causal prefill with or without padding. In other
            passes except decode, such a layer raises NotImplementedError. A dict such as
            `{"default": {"method": "dense"}, "layers 8-31": {"method": "skip", "threshold":
            1e-3}, "full_attention": ...}`, or the path of such a JSON file; keys are also names of
            the configuration's `layer_types`. Methods: dense; sdpa, torch's attention, for any pass
            and for head dims above 256 (full attention of Gemma 4); skip(threshold), or
            skip(sparsity, calibration) with the file of a saved `calibration.Calibration`;
            block_topk(blocks, block_q, block_kv); anchor(theta, step, block);
            vertical_slash(vertical, slash); minference(file, top_k); flexprefill(gamma, tau,
            min_budget, max_budget, block); streaming_llm(window, sink); moa(alphas, betas, sink,
            min_span); s2(local_blocks, stride, homo_head); power(sink_blocks, local_blocks,
            block); dhsa(density, shared); hip(keys, granule, local, first); token_top_k(keys,
            local, first); ssa(blocks, block); psa(shares, block); mminference(strides, last);
            token_sparse(tau, min_tokens, window).
            Those from anchor on are methods of `sparse_fmha.patterns`, which explains their
            options. Layers that a model does not have raise an error in its first call. Settings
            without effect are warned about once: a default that no layer uses, options that leave
            nothing out of a call, a calibration outside its fitted range, and decode, which is
            dense.

    Raises:
        ValueError: such a name, or layers, methods or options that do not exist or are not allowed.
        TypeError: an option of another type.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    if "flash" in name or "/" in name:
        raise ValueError(
            f"name must not have 'flash' or '/', which transformers reserves, got {name!r}"
        )
    method_of = None if layers is None else parse(layers)
    AttentionInterface.register(name, functools.partial(attend, method_of=method_of))
    AttentionMaskInterface.register(name, plan)
    AttentionInterface.register(_transformers_packed.NAME, attend_packed)


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
    method_of: Layers | Callable[[int | None], Method | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer.

    Args:
        query: `[B, Hq, Lq, D]`. The last stride is 1, the others are free, as in key and value.
        key, value: `[B, Hkv, Lkv, D]`, not repeated. Heads of value may have fewer numbers (MLA,
            MiMo). Where that is not supported they are copied with zeros behind: one query, a mask
            tensor, a sparse method, GPUs other than Hopper.
        attention_mask: the result of `plan`. None if the model requests no mask; then `is_causal`
            of the call, or else of the module, decides.
        method_of: returns the method of a layer's index, if not all layers are dense.
        kwargs: options of the model. `s_aux`, `[Hq]`, are the sinks of gpt-oss, `softcap` is the
            cap of scores of Gemma 2.

    Returns:
        `[B, Lq, Hq, D]`, and None for the weights, which are never computed.

    Raises:
        NotImplementedError: dropout, output_attentions, or an unsupported option of the model, by
            name; a layer with a sparse method in a pass other than causal prefill.
        ValueError: layers of `method_of` that the model does not have.
    """
    for option, (what, others) in REFUSED.items():
        if kwargs.get(option) is not None:
            raise NotImplementedError(
                f"{NAME} does not support {what}, which {type(module).__name__} requests; load the "
                f"model with attn_implementation={others}"
            )
    if kwargs.get(WEIGHTS):
        raise NotImplementedError(
            f"{WEIGHTS} must be False for {type(module).__name__}, because {NAME} does not compute "
            "attention weights, got True; load the model with attn_implementation='eager'"
        )
    index = getattr(module, "layer_idx", None)
    if isinstance(method_of, Layers):
        method_of.check(module)
        method = method_of.of(module, index)
    else:
        method = None if method_of is None else method_of(index)
    if isinstance(attention_mask, Plan):
        attention_mask = of_last(attention_mask, query)
    in_torch = method is not None and method.in_torch
    dim, value_dim = query.shape[3], value.shape[3]
    if value_dim < dim and not in_torch and (method is not None or _pads(query, attention_mask)):
        value = torch.nn.functional.pad(value, (0, dim - value_dim))
        given: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        out, _ = attend(module, query, key, value, attention_mask, method_of=method_of, **given)
        return out[..., :value_dim], None
    if query.shape[3] > MAX_HEAD_DIM and not in_torch:
        raise NotImplementedError(
            f"{NAME} does not support head dims above {MAX_HEAD_DIM}, {type(module).__name__} of "
            f"layer {index} has {query.shape[3]}; load the model with attn_implementation='sdpa', "
            "or give the layer the method 'sdpa' in layers of register()"
        )
    sink = None if kwargs.get(SINKS) is None else kwargs[SINKS].float()
    softcap = float(kwargs.get(SOFTCAP) or 0)
    if in_torch:
        if softcap or sink is not None:
            _check_dropout(module, dropout)
        if attention_mask is None:
            attention_mask = _unmasked(module, query, is_causal)
        scores = {"scaling": scaling, "sink": sink, "softcap": softcap}
        inputs = (module, query, key, value, attention_mask, dropout)
        return _transformers_sdpa.attend(*inputs, **{**kwargs, **scores}), None
    if method is not None and query.shape[2] > 1 and (softcap or sink is not None):
        raise _not_for(index, "attention sinks" if sink is not None else "logit soft-capping")
    has_lists = isinstance(attention_mask, Plan) and attention_mask.mask is not None
    if isinstance(attention_mask, Tensor) or (query.shape[2] == 1 and not has_lists):
        if method is not None and query.shape[2] > 1:
            raise _not_for(index, "a mask tensor")
        if method is not None:
            message = "a pass of one query, as in decoding, is dense"
            _report(method_of, method, [("decoding", message)])
        if attention_mask is None or isinstance(attention_mask, Plan):
            keys = None if attention_mask is None else attention_mask.keys
            attention_mask = seen_by_one(len(query), keys or key.shape[2], 0, None, query.device)
        if attention_mask is not None and is_of_one(attention_mask):
            if not (dropout or _records(query, key, value, sink)):
                return decode(query, key, value, attention_mask, scaling, sink, softcap), None
            attention_mask = as_mask(attention_mask, key.shape[2])
        if softcap or sink is not None:
            _check_dropout(module, dropout)
            return with_sink(query, key, value, attention_mask, sink, scaling, softcap), None
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    _check_dropout(module, dropout)
    if attention_mask is None:
        attention_mask = _unmasked(module, query, is_causal)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = (x[:, : attention_mask.keys] for x in (k, v))
    options: Any = {"scale": scaling, "softcap": softcap, "sink": sink}
    if method is not None:
        out = _sparse(method, index, q, k, v, attention_mask, scaling)
        runs = attention_mask.runs or [(0, k.shape[1])]
        _report(method_of, method, method.without_effect(max(stop - start for start, stop in runs)))
    elif attention_mask.mask is not None:
        out = block_sparse_attention(q, k, v, attention_mask.mask, **options)
    elif attention_mask.window is not None:
        out = neighborhood_attention(q, k, v, attention_mask.window, causal=True, **options)
    else:
        out = attention(q, k, v, causal=attention_mask.causal, **options)
    return out, None


def _pads(query: Tensor, attention_mask: object) -> bool:
    """Whether values need q's head dim: zeros behind them add nothing."""
    other = query.is_cuda and torch.cuda.get_device_capability(query.device) != (9, 0)
    return other or query.shape[2] == 1 or isinstance(attention_mask, Tensor)


def _unmasked(module: torch.nn.Module, query: Tensor, is_causal: bool | None) -> Plan:
    """The plan of a call without a mask."""
    wanted = getattr(module, "is_causal", False) if is_causal is None else is_causal
    return Plan(causal=bool(wanted) and query.shape[2] > 1)


def _check_dropout(module: torch.nn.Module, dropout: float) -> None:
    if dropout:
        raise NotImplementedError(
            f"attention dropout of {type(module).__name__} must be 0 for {NAME}, got {dropout}; "
            "set attention_dropout to 0 or call model.eval()"
        )


def _records(*inputs: Tensor | None) -> bool:
    """Whether gradients are wanted, which decode attention has not."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _sparse(
    method: Method,
    layer: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float | None,
) -> Tensor:
    """Runs a layer's sparse method; in a padded batch, entry by entry on the real tokens."""
    reason = plan.special
    if reason is None and not plan.causal:
        reason = "attention that is not causal"
    if reason is None and q.shape[1] != k.shape[1]:
        reason = f"{q.shape[1]} queries and {k.shape[1]} keys, as after a cache"
    if reason is not None:
        raise _not_for(layer, reason)
    if plan.runs is None:
        return method(q, k, v, Call(scale, layer))
    out = None
    for entry, (start, stop) in enumerate(plan.runs):
        if start == stop:
            continue
        own = slice(entry, entry + 1), slice(start, stop)
        rows = method(q[own], k[own], v[own], Call(scale, layer))
        if out is None:  # autocast may have changed the dtype
            out = rows.new_zeros((*q.shape[:-1], v.shape[-1]))
        out[entry, start:stop] = rows[0]
    return q.new_zeros((*q.shape[:-1], v.shape[-1])) if out is None else out


def _report(method_of: object, method: Method, options: Iterable[tuple[str, str]]) -> None:
    if isinstance(method_of, Layers):
        for option, message in options:
            method_of.reports(f"{method.name}, {option}", f"{method.name}: {message}")


def _not_for(layer: int | None, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"layer {layer} has a sparse method, which supports only causal prefill, with or without "
        f"padding, got {reason}; give the layer the method 'dense'"
    )
