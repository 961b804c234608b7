"""Prompts and images of different sizes in one call: what a server has beside decode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

import sparse_fmha
from sparse_fmha import reference

DIM = 128
PAGE = 64


@dataclass(frozen=True)
class PackedCase:
    group: str
    name: str
    lengths: tuple[int, ...] = ()  # of the keys of each sequence
    new: int | None = None  # queries at the end of each sequence; None: all
    grids: tuple[tuple[int, ...], ...] = ()
    window: tuple[int, ...] = ()
    heads: tuple[int, int] = (32, 8)

    def tiny(self) -> PackedCase:
        """The same with few tokens."""
        lengths = tuple(max(PAGE, n // 256 // PAGE * PAGE) for n in self.lengths)
        grids = tuple(tuple(max(n // 8, 8) for n in grid) for grid in self.grids)
        small = {"lengths": lengths, "grids": grids, "window": (5,) * len(self.window)}
        return replace(self, **small, new=self.new and 16, heads=(4, 2))

    @property
    def queries(self) -> tuple[int, ...]:
        return tuple(self.new or n for n in self.lengths)

    @property
    def flops(self) -> float:
        """Of both products, over the visible pairs."""
        pairs = sum(
            n * m - n * (n - 1) / 2 for n, m in zip(self.queries, self.lengths, strict=True)
        )
        for height, width in self.grids:
            pairs += height * width * self.window[0] * self.window[1]
        return 4 * self.heads[0] * DIM * pairs


CASES = (
    PackedCase("prefill", "causal, 32k to 512", tuple(32768 >> i for i in range(7))),
    PackedCase("chunks", "8 chunks of 2k, 4k to 32k", (4096, 8192, 16384, 32768) * 2, 2048),
    PackedCase(
        "grids", "8 images of 512 to 2048 pixels",
        grids=((128, 128), (64, 64), (96, 96), (80, 112), (48, 64), (112, 80), (32, 48), (64, 96)),
        window=(16, 16), heads=(24, 24),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Packed tensors; k and v are also in pages, in another order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor  # cu_q itself if they are equal
    used: Tensor  # keys of each sequence
    paged: tuple[Tensor, Tensor]
    page_table: Tensor
    bounds: tuple[int, int]  # most queries and keys of a sequence

    def slices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of each sequence, with a batch of one."""
        of_q, of_k = (torch.diff(cu).tolist() for cu in (self.cu_q, self.cu_k))
        parts = (self.q.split(of_q), self.k.split(of_k), self.v.split(of_k))
        return [tuple(x[None] for x in one) for one in zip(*parts, strict=True)]


def draw(case: PackedCase, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k and v of all tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sum(height * width for height, width in case.grids)
    sizes = (
        (sum(case.queries), sum(case.lengths), sum(case.lengths)) if not tokens else (tokens,) * 3
    )
    return [
        torch.randn((n, heads, DIM), generator=generator, device=device, dtype=dtype)
        for n, heads in zip(sizes, (case.heads[0], case.heads[1], case.heads[1]), strict=True)
    ]


def sequences(case: PackedCase, device: str, dtype: torch.dtype, seed: int) -> Sequences:
    q, k, v = draw(case, device, dtype, seed)

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    cu_k = int32([0, *accumulate(case.lengths)])
    cu_q = cu_k if case.new is None else int32([0, *accumulate(case.queries)])
    counts = [-(-n // PAGE) for n in case.lengths]
    generator = torch.Generator(device).manual_seed(seed + 1)
    order = torch.randperm(sum(counts), generator=generator, device=device)
    rows = order.to(torch.int32).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)
    paged = []
    for x in (k, v):  # every length is a multiple of the page
        pages = torch.empty_like(x).view(-1, PAGE, *x.shape[1:])
        pages[order] = x.view_as(pages)
        paged.append(pages)
    bounds = max(case.queries), max(case.lengths)
    return Sequences(q, k, v, cu_q, cu_k, int32(case.lengths), tuple(paged), table, bounds)


def error(case: PackedCase, device: str, dtype: torch.dtype, seed: int) -> float:
    """Of the small problem's result against fp64, relative to the largest element."""
    small = case.tiny()
    if small.grids:
        q, k, v = draw(small, device, dtype, seed)
        out = sparse_fmha.varlen_neighborhood_attention(q, k, v, small.grids, small.window)
        sizes = [height * width for height, width in small.grids]
        samples = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        parts = [tuple(x[None] for x in one) for one in samples]
        masks = [reference.neighborhood_mask(g, small.window, device=device) for g in small.grids]
    else:
        given = sequences(small, device, dtype, seed)
        q, k, v, parts = given.q, given.k, given.v, given.slices()
        cu = given.cu_q, given.cu_k
        out = sparse_fmha.varlen_attention(q, k, v, *cu, *given.bounds, causal=True)
        sizes = [(q.shape[1], k.shape[1]) for q, k, _ in parts]
        masks = [reference.causal_mask(*size, device) for size in sizes]
    exact = [reference.attention(*one, mask)[0][0] for one, mask in zip(parts, masks, strict=True)]
    expected = torch.cat(exact)
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()
