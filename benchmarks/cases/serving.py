"""What serving runs besides decode over all keys: methods that choose keys, and packed calls that
skip or are trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import sparse_fmha
from benchmarks.cases import decode, packed
from sparse_fmha import patterns

Op = Callable[[], object]

BLOCK = decode.BLOCK
SHARE = 10  # percent of the keys that a budget allows
SPANS = ((4, 2), (12, 6), (20, 10), (4, 2))  # percent of the length: alpha's and beta's part
RUN = 640  # keys of a run that is high or low: whole tiles of every kernel
THRESHOLD = 0.01


class Method(NamedTuple):
    step: Op  # from the new token to out
    choice: Op  # the step without attention


def methods(
    length: int, batch: int, heads: tuple[int, int], cache: decode.Cache
) -> tuple[Op, dict[str, Method]]:
    """Attention over all keys, and methods by name.

    Of SnapKV a step only attends, and its choice, with both gathers, is made once for a prompt.
    """
    case = decode.DecodeCase("select", "", (length,) * batch, heads, page=BLOCK)
    call = cache.call(case)
    caches = [x.view(batch, length, heads[1], decode.DIM) for x in (call.k, call.v)]
    budget = length * SHARE // 100 // BLOCK * BLOCK
    attend = sparse_fmha.decode_attention
    q, lens = call.q, call.seq_lens

    def over_blocks(choose: Callable[[], tuple]) -> Op:
        return lambda: attend(q, *caches, lens, blocks=choose())

    choices = {
        "Quest": quest(case, cache, call, budget),
        "SeerAttention-R": seer(caches[0], q, lens, budget),
        "S2-Attention": lambda: patterns.s2_attention_cache(lens, length, heads[1]),
        "PowerAttention": lambda: patterns.power_attention_cache(lens, length),
    }
    found = {name: Method(over_blocks(choose), choose) for name, choose in choices.items()}
    found["MoA"] = moa(length, batch, heads[1], cache, q)
    found["SnapKV"] = snapkv(caches, q, budget, cache)
    return lambda: attend(q, *caches, lens), found


def quest(
    case: decode.DecodeCase, cache: decode.Cache, call: decode.Call, budget: int
) -> Callable[[], tuple]:
    """Takes the newest key into the bounds and chooses; pages are in order."""
    bounds = cache.bounds(case, call)
    newest = (torch.arange(1, len(case.lengths) + 1, device=cache.device) * case.lengths[0]) - 1
    keys = call.k.flatten(0, 1)[newest]

    def choose() -> tuple:
        bounds.write(keys, newest)
        return patterns.quest(call.q, bounds, call.seq_lens, budget=budget)

    return choose


def seer(k: Tensor, q: Tensor, lens: Tensor, budget: int) -> Callable[[], tuple]:
    """Takes the newest key into the compressed ones and chooses."""
    (batch, length, heads, dim), heads_q = k.shape, q.shape[2]
    gate = patterns.SeerDecodeGate(heads_q, heads, dim, device=k.device, dtype=k.dtype)
    made = [patterns.SeerKeys(gate, 1, length) for _ in range(batch)]
    for one, rows in zip(made, k, strict=True):  # one by one: pools are made in fp32
        one.start(rows[None], lens[:1])
    keys = patterns.SeerKeys(gate, batch, length)
    keys.compressed.copy_(torch.cat([one.compressed for one in made]))
    newest = k[:, -1].contiguous()

    def choose() -> tuple:
        keys.write(newest, lens - 1)
        return gate.blocks(q, keys.compressed, lens, budget=budget)

    return choose


def moa(length: int, batch: int, heads: int, cache: decode.Cache, q: Tensor) -> Method:
    """Places the newest token in the ring of each head and attends."""
    parts = [SPANS[i % len(SPANS)] for i in range(heads)]
    alphas = [float(a * length // 100) for a, _ in parts]
    rings = patterns.MoaCache(length, alphas, [b / 100 for _, b in parts], device=cache.device)
    rows = [cache.normal(batch, rings.rows, decode.DIM) for _ in "kv"]
    new = [cache.normal(batch, heads, decode.DIM) for _ in "kv"]
    lens = torch.full((batch,), length, dtype=torch.int32, device=cache.device)
    requests = torch.arange(batch, device=cache.device)[:, None]
    views = [x.unsqueeze(2).expand(-1, -1, heads, -1) for x in rows]

    def place() -> dict[str, Tensor]:
        at = rings.places(lens - 1)
        for x, newest in zip(rows, new, strict=True):
            x[requests, at] = newest
        return rings.keys(lens)

    return Method(lambda: sparse_fmha.decode_attention(q, *views, **place()), place)


def snapkv(caches: list[Tensor], q: Tensor, keep: int, cache: decode.Cache) -> Method:
    batch, length = caches[0].shape[:2]
    queries = cache.normal(batch, min(256, length), *q.shape[2:])
    most = {"sink": 4, "recent": min(128, keep // 4)}

    def choose() -> list[Tensor]:
        indices, counts = patterns.snapkv(queries, caches[0], keep=keep, **most)
        return [*(patterns.kept_rows(x, indices, room=BLOCK) for x in caches), counts + 1]

    kept_k, kept_v, lens = choose()
    return Method(lambda: sparse_fmha.decode_attention(q, kept_k, kept_v, lens), choose)


def shaped(given: packed.Sequences, percent: int, seed: int) -> packed.Sequences:
    """The sequences with keys of which so many percent of the runs lie far below the others.

    Queries look in one direction, and the keys of a run lie along it or against it. The first run
    of each sequence is a high one.
    """
    generator = torch.Generator(given.q.device).manual_seed(seed)
    options = {"generator": generator, "device": given.q.device}
    way = torch.nn.functional.normalize(torch.randn(packed.DIM, **options), dim=-1)
    parts = []
    for rows in given.k.split(torch.diff(given.cu_k).tolist()):
        low = torch.rand(-(-len(rows) // RUN), **options) < percent / 100
        low[0] = False
        along = torch.where(low, -decode.HEIGHT, decode.HEIGHT).repeat_interleave(RUN)
        keys = 0.2 * rows.float() + (along[: len(rows), None] * way)[:, None]
        parts.append(keys.to(rows.dtype))
    q = (packed.DIM**0.5 * way + 0.05 * given.q.float()).to(given.q.dtype)
    return replace(given, q=q, k=torch.cat(parts))


def skipping(
    case: packed.PackedCase, percent: int, device: str, dtype: torch.dtype
) -> tuple[Op, Op, Op]:
    """Packed calls without and with a threshold, and one call each; causal."""
    given = shaped(packed.sequences(case, device, dtype, 0), percent, 1)
    tensors, lists = (given.q, given.k, given.v), (given.cu_q, given.cu_k, *given.bounds)
    run, attend, parts = sparse_fmha.varlen_attention, sparse_fmha.attention, given.slices()
    options = {"causal": True, "skip_threshold": THRESHOLD}
    return (
        lambda: run(*tensors, *lists, causal=True),
        lambda: run(*tensors, *lists, **options),
        lambda: [attend(*one, **options) for one in parts],
    )


def gradients(case: packed.PackedCase, device: str, dtype: torch.dtype) -> tuple[Op, Op]:
    """Forward and backward pass, packed and in a loop, with gradients of packed tensors."""
    if case.grids:
        q, k, v = packed.draw(case, device, dtype, 0)
        sizes = [height * width for height, width in case.grids]
        run = sparse_fmha.varlen_neighborhood_attention
        whole = lambda *x: run(*x, case.grids, case.window)  # noqa: E731
        shapes = [(1, *grid) for grid in case.grids]
        attend = lambda *x: sparse_fmha.neighborhood_attention(*x, case.window)  # noqa: E731
    else:
        given = packed.sequences(case, device, dtype, 0)
        q, k, v = given.q, given.k, given.v
        sizes = list(case.lengths)
        lists = given.cu_q, given.cu_k, *given.bounds
        whole = lambda *x: sparse_fmha.varlen_attention(*x, *lists, causal=True)  # noqa: E731
        shapes = [(1, n) for n in sizes]
        attend = lambda *x: sparse_fmha.attention(*x, causal=True)  # noqa: E731
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.ones_like(q)

    def loop() -> tuple[Tensor, ...]:
        parts = zip(*(x.split(sizes) for x in leaves), strict=True)
        outs = [
            attend(*(x.unflatten(0, shape) for x in one))
            for one, shape in zip(parts, shapes, strict=True)
        ]
        made = [out.flatten(0, out.dim() - 3) for out in outs]
        return torch.autograd.grad(made, leaves, list(grad.split(sizes)))

    return lambda: torch.autograd.grad(whole(*leaves), leaves, grad), loop
