"""Published methods on one layer: the kind of call that each paper gives a headline for.

A case makes the ops that are compared: the whole method, its selection included, and what the
headline is relative to. Inputs are `planted`: a few first keys, stripes and near keys count; for
grid heads of MMInference `planted_video`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_fmha
from benchmarks.cases import biformer_model, stripes
from sparse_fmha import BlockMask, StripeMask, patterns
from sparse_fmha.selection import BlockGrid, top_k_blocks

DENSE = "dense"  # ours
FA3 = "FlashAttention-3"
MASKED = "SDPA with a mask"
LISTS = "block lists, as dense"
TORCH = "SDPA"
Op = Callable[[], Tensor]


@dataclass(frozen=True)
class Captured:
    """An op whose CUDA graph is replayed where it is timed: without the host's time."""

    op: Op

    def __call__(self) -> Tensor:
        return self.op()


@dataclass(frozen=True)
class Case:
    """One method. `headline` is the published speedup over `against`, None where none is given."""

    method: str
    ops: Callable[[Case, Tensor, Tensor, Tensor], dict[str, Op]]
    length: int = 128 * 1024
    heads: int = 32
    heads_kv: int = 8
    dim: int = 128
    causal: bool = True
    headline: float | None = None
    against: str = FA3
    published: str = ""
    exact: bool = True  # dense attention of the same q, k, v is what the method approximates
    planted: Callable[..., tuple] = stripes.planted
    whole: bool = True  # attention of all queries of q, as FlashAttention-3 beside it computes

    @property
    def size(self) -> dict[str, int]:
        return {
            "heads": self.heads, "heads_kv": self.heads_kv, "dim": self.dim, "length": self.length,
        }  # fmt: skip

    def tiny(self) -> Case:
        # Few heads, and the fewest tokens that every method takes with its defaults.
        ratio = self.heads // self.heads_kv
        return replace(self, length=4096 if self.causal else 3600, heads=2 * ratio, heads_kv=2)


def tensors(case: Case, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    return list(case.planted(case.size, device, dtype, seed)[:3])


def _over(make: Callable[[Tensor, Tensor], BlockMask | StripeMask], q, k, v) -> Op:
    """Makes the mask and computes attention over it."""
    return lambda: stripes.attend(q, k, v, make(q, k))


def _dhsa(case, q, k, v):
    chunks = torch.arange(0, case.length + 1, 32, device=q.device)[None]
    budget = case.length // 16
    return {
        "dhsa": _over(lambda q, k: patterns.dhsa(q, k, chunks, budget), q, k, v),
        "dhsa_blocks": _over(patterns.dhsa_blocks, q, k, v),
    }


def _dma(case, q, k, v):
    bias = torch.randn(1, case.heads_kv, case.length, device=q.device)
    keep = min(1024, case.length // 8)

    def masked():
        kept = torch.zeros(1, case.heads_kv, case.length, dtype=torch.bool, device=q.device)
        kept.scatter_(2, bias.topk(keep).indices, True)
        rows = torch.arange(case.length, device=q.device)
        seen = kept[:, :, None] & (rows <= rows[:, None])
        mask = seen.repeat_interleave(case.heads // case.heads_kv, 1)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    def method():
        return patterns.dma_attention(q, k, v, bias, keep)

    return {"dma": method, "dma, captured": Captured(method), MASKED: masked}


def _psa(case, q, k, v):
    grid = BlockGrid.of(q, k, 128, 128)
    scores = torch.randn(1, case.heads, *grid.shape, device=q.device)
    mask = grid.mask(top_k_blocks(scores, density=0.156))

    def method():
        return patterns.psa_attention(q, k, v, patterns.psa_levels(q, k))

    return {"psa": method, LISTS: lambda: stripes.attend(q, k, v, mask)}


def _rectified(case, q, k, v):
    return {"rectified": lambda: patterns.rectified_attention(q, k, v, keep=0.11)}


def _sol(case, q, k, v):
    return {"sol": lambda: patterns.sol_attention(q, k, v)}


def _ssa(case, q, k, v):
    return {"ssa": lambda: patterns.ssa_attention(q, k, v)}


def _token_sparse(case, q, k, v):
    def kept(attend=None):
        indices = patterns.token_sparse_indices(q, k, keep=case.length * 3 // 4)
        return patterns.token_sparse_attention(q, k, v, indices=indices, attend=attend)

    def flexprefill(q, k, v):
        return _over(patterns.flexprefill_query_aware, q, k, v)()

    return {"token_sparse": kept, "token_sparse, flexprefill": lambda: kept(flexprefill)}


def _hip(case, q, k, v):
    return {"hip": _over(patterns.hip, q, k, v)}


def _hip_decode(case, q, k, v):
    """A step of 16 requests: with a search, and as the steps until the next one are."""
    batch, heads_kv = 16, k.shape[2]
    caches = [x.repeat(batch, 1, 1, 1) for x in (k, v)]
    queries = q[:, -batch:].transpose(0, 1).contiguous()
    lengths = torch.full((batch,), k.shape[1], dtype=torch.int32, device=q.device)
    found = patterns.HipSearch(batch, heads_kv, device=q.device)

    def listed():
        tokens = found.tokens(lengths)
        return sparse_fmha.decode_attention(queries, *caches, lengths, tokens=tokens)

    def searched():
        found.search(queries, caches[0], lengths)
        return listed()

    return {
        "hip_decode": Captured(searched),
        "hip_decode, between searches": Captured(listed),
        DENSE: Captured(lambda: sparse_fmha.decode_attention(queries, *caches, lengths)),
    }


def _light_forcing(case, q, k, v):
    frame = case.length // 21
    chunk = 3 * frame
    q, k, v = (x[:, : 21 * frame] for x in (q, k, v))
    tail = q[:, -chunk:]
    layout = patterns.LightForcingLayout(chunk, 21 * frame, frame, device=q.device)

    method = _over(lambda q, k: patterns.light_forcing(q, k, layout), tail, k, v)
    return {
        "light_forcing": method,
        "light_forcing, captured": Captured(method),
        DENSE: lambda: sparse_fmha.attention(tail, k, v),
    }


def _grid_heads(case, q, k, v):
    def method():
        return patterns.mminference_grid_attention(q, k, v, (64, 128, 256))

    return {"mminference": method}


def _minference(case, q, k, v):
    heads = {h: ("vertical_and_slash", 1000, 6096) for h in range(case.heads)}
    return {"minference": lambda: patterns.minference_attention(q, k, v, heads)}


def _minference_mix(case, q, k, v):
    """Patterns of MInference's candidates, as its search might choose for inputs like these."""
    columns = [("vertical_and_slash", 500, 700, 0.0)] * 4 + [("vertical_and_slash", 3500, 100, 0.0)]
    others = [("stream_llm", 1024, 4096, 0.0), ("block_sparse", 100, 0, 0.0)]
    patterns_of = [*columns, *others, ("vertical_and_slash", 100, 800, 0.0)]
    layer = {str(head): list(patterns_of[head % 8]) for head in range(case.heads)}
    (heads,) = patterns.load_minference([layer])
    sizes = case.heads, q.shape[1], k.shape[1]
    methods = patterns.minference_heads(heads, *sizes, device=q.device)
    return {"minference_mix": lambda: patterns.per_head_attention(q, k, v, methods)}


def _flexprefill(case, q, k, v):
    return {"flexprefill": _over(patterns.flexprefill_query_aware, q, k, v)}


def _anchor(case, q, k, v):
    return {"anchor": lambda: patterns.anchor_attention(q, k, v, width=1024).out}


def _pka(case, q, k, v):
    conditions, tokens = 16, case.length // 17
    side = int(tokens**0.5)
    tokens = side * side
    image = q[:, :tokens]
    parts = [(k[:, i : i + tokens], v[:, i : i + tokens]) for i in
             range(tokens, tokens * (conditions + 1), tokens)]  # fmt: skip
    own = k[:, :tokens], v[:, :tokens]
    all_k, all_v = (x[:, : tokens * (conditions + 1)] for x in (k, v))

    def joined():  # every token of every stream attends to all, as in a joint transformer
        return sparse_fmha.attention(q[:, : all_k.shape[1]], all_k, all_v)

    def method():
        return patterns.pka_attention(image, *own, (side, side), spatial=parts)

    return {"pka": method, "pka, captured": Captured(method), DENSE: joined}


def _images(tokens: int, *tensors: Tensor) -> list[Tensor]:
    """Tokens of one sequence as images `[B, tokens, H, D]`."""
    images = tensors[0].shape[1] // tokens
    return [x[:, : images * tokens].reshape(images, tokens, *x.shape[2:]) for x in tensors]


def _with_gradients(attend: Callable[..., Tensor], *tensors: Tensor) -> Op:
    """Attention and its gradients; returns that of q."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attend(*leaves).sum(), leaves)[0]


def _sdpa(q, k, v):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _biformer(number: int, side: int) -> Callable[..., dict[str, Op]]:
    """A stage of BiFormer: images of side x side tokens in 7 x 7 regions."""

    def ops(case, q, k, v):
        images = _images(side * side, q, k, v)
        stage = biformer_model.stages(224, q.device)[number - 1]

        def method(q, k, v):
            return biformer_model.routed(q, k, v, stage, case.dim**-0.5)

        return {
            case.method: lambda: method(*images),
            f"{case.method}, captured": Captured(lambda: method(*images)),
            f"{case.method}, with gradients": _with_gradients(method, *images),
            DENSE: lambda: sparse_fmha.attention(*images),
            TORCH: lambda: _sdpa(*images),
            "SDPA, with gradients": _with_gradients(_sdpa, *images),
        }

    return ops


def _sparsifiner(case, q, k, v):
    images = _images(197, q, k, v)
    options = {"device": q.device, "dtype": q.dtype}
    predictor = patterns.SparsifinerPredictor(197, case.heads, case.dim, **options)
    mask = predictor.mask(*images[:2])
    return {
        "sparsifiner": _over(predictor.mask, *images),
        "sparsifiner, attention alone": lambda: stripes.attend(*images, mask),
        DENSE: lambda: sparse_fmha.attention(*images),
    }


CASES = {
    case.method: case
    for case in (
        Case("dhsa", _dhsa, 32 * 1024, 8, 4, 256, headline=1.67, against=DENSE,
             published="prefill 20 to 60% shorter, 8k to 64k, Gemma-2"),
        Case("dma", _dma, 32 * 1024, 8, 2, headline=49.8, against=MASKED, exact=False,
             published="32k tokens, 1024 keys"),
        Case("psa", _psa, 32 * 1024, 12, 12, causal=False, headline=0.91, against=LISTS,
             published="at most 1.1 times the time of block lists, 85% sparse"),
        Case("rectified", _rectified, 118800, 24, 24, causal=False, headline=3.33,
             published="HunyuanVideo, 89% sparse"),
        Case("sol", _sol, 32 * 1024, 24, 24, causal=False),
        Case("ssa", _ssa, headline=2.0, published="inference at 128k"),
        Case("token_sparse", _token_sparse, headline=1.36,
             published="1.36x alone, 3.23x with FlexPrefill, 128k"),
        Case("hip", _hip),
        Case("hip_decode", _hip_decode, headline=6.8, against=DENSE, exact=False, whole=False,
             published="decode at 128k, a search at each step; 14.3x, one in eight"),
        Case("light_forcing", _light_forcing, 21 * 1560, 12, 12, causal=False, headline=3.79,
             against=DENSE, published="attention, Wan 2.1 1.3B", exact=False, whole=False),
        *(
            Case(f"biformer_{n}", _biformer(n, side), 64 * side**2, heads, heads, 32,
                 causal=False, headline=1.0, against=TORCH, exact=False, whole=False,
                 published="no slower than dense attention in any stage, 64 images of 224 pixels")
            for n, (side, heads) in enumerate(((56, 2), (28, 4), (14, 8)), 1)
        ),
        Case("sparsifiner", _sparsifiner, 64 * 197, 6, 6, 64, causal=False, headline=1.0,
             against=DENSE, exact=False, whole=False,
             published="attention alone no slower than dense, 75% sparse"),
        Case("mminference", _grid_heads, headline=8.3, published="1M tokens",
             planted=stripes.planted_video),
        Case("minference", _minference, headline=10.0, published="1M tokens"),
        Case("minference_mix", _minference_mix, headline=10.0, published="1M tokens"),
        Case("flexprefill", _flexprefill),
        Case("anchor", _anchor, headline=4.6, published="over FlashAttention, 128k"),
        Case("pka", _pka, 17 * 1024, 24, 24, causal=False, headline=10.0, against=DENSE,
             published="16 conditions of 1024 tokens", exact=False),
    )
}  # fmt: skip
