"""Published methods of `sparse_fmha.patterns` for layers of a language model, for causal prefill.

Like those in `_layers`, each is made from its options, which are checked there: it is called once
with one token. None takes tokens that a prefill does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike

import torch
from torch import Tensor

from sparse_fmha import patterns
from sparse_fmha._checks import check_collection, check_int
from sparse_fmha.attention import block_sparse_attention, stripe_attention
from sparse_fmha.integrations._kept import kept
from sparse_fmha.integrations._layers import Attend, Call, Made, WithoutEffect
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.patterns.minference_heads import FALLBACK
from sparse_fmha.patterns.psa import LEVELS, SHARES

Mask = BlockMask | StripeMask
# From q, k and the scale, as the functions of `patterns` that choose by them.
Choice = Callable[[Tensor, Tensor, float | None], Mask]
# From tokens, query heads and device, as those that need no more.
Fixed = Callable[[int, int, torch.device], BlockMask]


def minference(file: str | PathLike[str], top_k: int = 100) -> Made:
    """`patterns.minference_attention`, each layer by its own entry of a file of MInference."""
    layers = patterns.load_minference(str(file))
    check_int("top_k", top_k)
    named = [FALLBACK, *(pattern for layer in layers for pattern in layer.values())]
    covered = min(0 if kind == "block_sparse" else max(numbers) for kind, *numbers in named)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.layer is None or call.layer >= len(layers):
            raise ValueError(
                f"file must have the patterns of layer {call.layer}, got those of {len(layers)} "
                "layers"
            )
        own = layers[call.layer]
        return patterns.minference_attention(q, k, v, own, top_k=top_k, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if covered >= keys:
            yield "file", f"file has no effect: each of its patterns covers all {keys} keys"

    return attend, without_effect


def flexprefill(
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1,
    max_budget: int | None = None,
    block: int = 128,
) -> Made:
    """`patterns.flexprefill_mask`."""

    def choose(q: Tensor, k: Tensor, scale: float | None) -> Mask:
        return patterns.flexprefill_mask(
            q,
            k,
            gamma=gamma,
            tau=tau,
            min_budget=min_budget,
            max_budget=max_budget,
            scale=scale,
            block=block,
        )

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if 2 * block >= keys:
            yield (
                "block",
                f"block = {block} has no effect: the first block and the diagonal, which are "
                f"always taken, cover all {keys} keys",
            )

    return _chosen(choose, without_effect)


def streaming_llm(window: int = 1020, sink: int = 4) -> Made:
    """`patterns.streaming_llm`."""

    def make(length: int, heads: int, device: torch.device) -> BlockMask:
        return patterns.streaming_llm(length, length, window=window, sink=sink, device=device)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if window + sink >= keys:
            yield (
                "window",
                f"window = {window} and sink = {sink} have no effect: they cover all {keys} keys",
            )

    return _fixed(make, without_effect)


def moa(
    alphas: Sequence[float], betas: Sequence[float], sink: int = 64, min_span: int = 128
) -> Made:
    """`patterns.moa`, with an alpha and a beta for each query head."""

    def make(length: int, heads: int, device: torch.device) -> BlockMask:
        if heads not in (len(alphas), 1):  # one head: the check of the options
            raise ValueError(
                f"alphas must have one entry for each of the {heads} query heads, got {len(alphas)}"
            )
        return patterns.moa(
            length, length, alphas, betas, sink=sink, min_span=min_span, device=device
        )

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        spans = [alpha + beta * keys for alpha, beta in zip(alphas, betas, strict=True)]
        if max(min(spans), min_span) >= keys:
            yield "alphas", f"alphas and betas have no effect: each span covers all {keys} keys"

    return _fixed(make, without_effect)


def s2(local_blocks: int = 16, stride: int = 8, homo_head: bool = False) -> Made:
    """`patterns.s2_attention`."""

    def make(length: int, heads: int, device: torch.device) -> BlockMask:
        return patterns.s2_attention(
            length,
            length,
            heads,
            local_blocks=local_blocks,
            stride=stride,
            homo_head=homo_head,
            device=device,
        )

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if stride == 1:
            yield "stride", "stride = 1 has no effect: all blocks are taken"
        elif local_blocks * 64 >= keys:
            yield (
                "local_blocks",
                f"local_blocks = {local_blocks} has no effect: blocks of 64 keys cover all {keys} "
                "keys",
            )

    return _fixed(make, without_effect)


def power(sink_blocks: int = 1, local_blocks: int = 5, block: int = 256) -> Made:
    """`patterns.power_attention`."""
    size = 128 if check_int("block", block, 1) % 128 == 0 else 64

    def make(length: int, heads: int, device: torch.device) -> BlockMask:
        return patterns.power_attention(
            length,
            length,
            sink_blocks=sink_blocks,
            local_blocks=local_blocks,
            block=block,
            block_q=size,
            block_kv=size,
            device=device,
        )

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if (sink_blocks + local_blocks) * block >= keys:
            yield (
                "local_blocks",
                f"sink_blocks = {sink_blocks} and local_blocks = {local_blocks} have no effect: "
                f"blocks of {block} keys cover all {keys} keys",
            )

    return _fixed(make, without_effect)


def dhsa(density: float = 0.125, shared: bool = False) -> Made:
    """`patterns.dhsa_blocks`; its chunks of variable length need a network of the model's own."""

    def choose(q: Tensor, k: Tensor, scale: float | None) -> Mask:
        return patterns.dhsa_blocks(q, k, density=density, shared=shared)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if density == 1:
            yield "density", "density = 1 has no effect: all blocks are taken"
        elif keys <= 64:
            yield "density", f"density = {density} has no effect: two blocks cover all {keys} keys"

    return _chosen(choose, without_effect)


def hip(keys: int = 512, granule: int = 2, local: int = 128, first: int = 4) -> Made:
    """`patterns.hip`."""
    wanted = keys

    def choose(q: Tensor, k: Tensor, scale: float | None) -> Mask:
        return patterns.hip(q, k, keys=wanted, granule=granule, local=local, first=first)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if wanted + local + first >= keys:
            yield (
                "keys",
                f"keys = {wanted}, local = {local} and first = {first} have no effect: they cover "
                f"all {keys} keys",
            )

    return _chosen(choose, without_effect)


def token_top_k(keys: int, local: int = 128, first: int = 0) -> Made:
    """`patterns.token_top_k`."""
    wanted = keys

    def choose(q: Tensor, k: Tensor, scale: float | None) -> Mask:
        return patterns.token_top_k(q, k, wanted, local=local, first=first)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if wanted + local >= keys:
            yield (
                "keys",
                f"keys = {wanted} and local = {local} have no effect: they cover all {keys} keys",
            )

    return _chosen(choose, without_effect)


def ssa(blocks: int = 16, block: int = 16) -> Made:
    """`patterns.ssa_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return patterns.ssa_attention(q, k, v, blocks=blocks, block=block, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if blocks * block >= keys:
            yield (
                "blocks",
                f"blocks = {blocks} has no effect: blocks of {block} keys cover all {keys} keys",
            )

    return _whole(attend, without_effect)


def psa(shares: Sequence[float] = tuple(SHARES.values()), block: int = 128) -> Made:
    """`patterns.psa_attention` with the levels of `psa_levels`, by rank; a share for each of the
    levels 1, 2, 4 and 8."""
    check_collection("shares", shares)
    if len(shares) != len(LEVELS):
        raise ValueError(
            f"shares must have one entry for each of the levels {LEVELS}, got {len(shares)}"
        )
    by_level = dict(zip(LEVELS, shares, strict=True))

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        levels = patterns.psa_levels(
            q, k, by_level, causal=True, scale=call.scale, block_q=block, block_kv=block
        )
        return patterns.psa_attention(
            q, k, v, levels, causal=True, scale=call.scale, block_q=block, block_kv=block
        )

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if by_level[1] == 1:
            yield "shares", "shares has no effect: all blocks are at level 1"
        elif block >= keys:
            yield "block", f"block = {block} has no effect: one block covers all {keys} keys"

    return _whole(attend, without_effect)


def mminference(strides: Sequence[int], last: int = 64) -> Made:
    """`patterns.mminference_grid_attention`, grid heads; strides longer than a prompt are left out
    there, and with none left it is dense, the grid of stride 1."""
    check_collection("strides", strides)
    candidates = [check_int(f"strides[{n}]", stride, 1) for n, stride in enumerate(strides)]
    if not candidates:
        raise ValueError("strides must have at least one entry, got none")

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        own = [stride for stride in candidates if stride <= k.shape[1]] or [1]
        return patterns.mminference_grid_attention(q, k, v, own, last=last, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if not [stride for stride in candidates if 1 < stride <= keys]:
            yield "strides", f"strides have no effect: none is from 2 to the {keys} keys"

    return _whole(attend, without_effect)


def token_sparse(tau: float = 0.005, min_tokens: int = 1024, window: int = 128) -> Made:
    """`patterns.token_sparse_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        indices = patterns.token_sparse_indices(
            q, k, tau=tau, min_tokens=min_tokens, window=window, scale=call.scale
        )
        return patterns.token_sparse_attention(q, k, v, indices=indices, scale=call.scale)

    def without_effect(keys: int) -> Iterator[tuple[str, str]]:
        if tau == 0:
            yield "tau", "tau = 0 has no effect: no token is dropped"
        elif min_tokens + window >= keys:
            yield (
                "min_tokens",
                f"min_tokens = {min_tokens} and window = {window} have no effect: they keep all "
                f"{keys} tokens",
            )

    return _whole(attend, without_effect)


def _whole(attend: Attend, without_effect: WithoutEffect) -> Made:
    one = _one()
    attend(one, one, one, Call(None, 0))
    return attend, without_effect


def _chosen(choose: Choice, without_effect: WithoutEffect) -> Made:
    one = _one()
    choose(one, one, None)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        mask = choose(q, k, call.scale)
        if isinstance(mask, StripeMask):
            return stripe_attention(q, k, v, mask, scale=call.scale)
        return block_sparse_attention(q, k, v, mask, scale=call.scale)

    return attend, without_effect


def _fixed(make: Fixed, without_effect: WithoutEffect) -> Made:
    make(1, 1, torch.device("cpu"))

    def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        mask = kept(make, q.shape[1], q.shape[2], q.device)
        return block_sparse_attention(q, k, v, mask, scale=call.scale)

    return attend, without_effect


def _one() -> Tensor:
    """q or k of one token, to check options with."""
    return torch.zeros(1, 1, 1, 8, device="cpu")
