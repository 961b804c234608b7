"""Cases of decode attention: requests, where their keys are, and which of them are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_fmha import patterns, reference

DIM = 128
BLOCK = 64  # of block lists
THRESHOLD = 0.01
HEIGHT = 5.0  # of keys that are not skipped, in natural-log units; the others are as far below zero
BATCHES = (1, 4, 16, 64, 256)
LENGTHS = (1, 4, 16, 32, 128)  # thousands of tokens


@dataclass(frozen=True)
class DecodeCase:
    """One new token of each request."""

    group: str
    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (32, 8)  # of queries and of keys
    page: int | None = None  # None: a contiguous cache
    sparsity: int = 0  # percent of the blocks that are not listed, or of the tiles to be skipped
    head_dim: int = DIM

    def tiny(self) -> DecodeCase:
        """The same with few tokens."""
        lengths = tuple(max(64, n // 256) for n in self.lengths[:3])
        return replace(self, lengths=lengths, heads=(2 * self.heads[0] // self.heads[1], 2))

    @property
    def tokens(self) -> int:
        """That the caches have room for: requests of equal size, or pages."""
        if self.page is None:
            return len(self.lengths) * max(self.lengths)
        return sum(-(-n // self.page) * self.page for n in self.lengths)

    def cache_bytes(self, itemsize: int) -> int:
        return 2 * self.tokens * self.heads[1] * self.head_dim * itemsize

    @property
    def listed(self) -> int:
        """Blocks that each KV head reads of a request."""
        return max(round(self.lengths[0] // BLOCK * (1 - self.sparsity / 100)), 1)

    def read_bytes(self, itemsize: int) -> int:
        """Of the keys and values that a call has to read, and of q and out."""
        keys = sum(self.lengths)
        if self.group in ("blocks", "select") and self.sparsity:
            keys = len(self.lengths) * self.listed * BLOCK
        if self.group == "select":  # bounds are as large as a key and a value of each block
            keys += sum(self.lengths) // BLOCK
        rows = keys * self.heads[1] + len(self.lengths) * self.heads[0]
        return 2 * rows * self.head_dim * itemsize


def dense_cases() -> list[DecodeCase]:
    return [
        DecodeCase("dense", f"{batch}x{length}k", (1024 * length,) * batch)
        for batch in BATCHES
        for length in LENGTHS
    ]


CASES = (
    *dense_cases(),
    *(DecodeCase("pages", f"16x32k, page {p}", (32768,) * 16, page=p) for p in (16, 1)),
    DecodeCase("ragged", "1x128k + 63x2k", (131072, *(2048,) * 63), page=64),
    *(
        DecodeCase("blocks", f"16x128k 64/8, {s}% sparse", (131072,) * 16, (64, 8), sparsity=s)
        for s in (50, 80, 90)
    ),
    DecodeCase("select", "16x64k, Quest, 90% sparse", (65536,) * 16, page=BLOCK, sparsity=90),
    *(
        DecodeCase("skip", f"64x64k 64/4, {s}% skipped", (65536,) * 64, (64, 4), sparsity=s)
        for s in (0, 50, 70, 80)
    ),
)


@dataclass(frozen=True)
class Call:
    """The tensors of a call."""

    q: Tensor  # [B, 1, Hq, D]
    k: Tensor  # [B, N, Hkv, D], or [pages, page, Hkv, D] with a table
    v: Tensor
    seq_lens: Tensor
    lengths: tuple[int, ...]
    page_table: Tensor | None = None
    blocks: tuple[Tensor, Tensor, int] | None = None
    threshold: float = 0.0

    @property
    def options(self) -> dict:
        """What decode_attention takes besides the first four."""
        lists = {"page_table": self.page_table, "blocks": self.blocks}
        return lists | {"skip_threshold": self.threshold}

    def rows(self, length: int) -> list[Tensor]:
        """Keys and values of the first request."""
        if self.page_table is None:
            return [x[0, :length] for x in (self.k, self.v)]
        pages = self.page_table[0].long()[: -(-length // self.k.shape[1])]
        return [x[pages].flatten(0, 1)[:length] for x in (self.k, self.v)]


class Cache:
    """Keys and values that all cases share, each in its own shape."""

    def __init__(self, tokens_bytes: int, device: str, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype
        size = tokens_bytes // 2 // dtype.itemsize
        self.k, self.v = (self.normal(size) for _ in "kv")

    def normal(self, *shape: int) -> Tensor:
        """In the cache's dtype from the start: a copy in another one may not fit."""
        options = {"device": self.device, "dtype": self.dtype}
        return torch.randn(shape, generator=self.generator, **options)

    def int32(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def call(self, case: DecodeCase) -> Call:
        """The keys of a case, all of them seen."""
        (heads_q, heads), dim = case.heads, case.head_dim
        q = self.normal(len(case.lengths), 1, heads_q, dim)
        size = case.tokens * heads * dim
        flat = [x[:size] for x in (self.k, self.v)]
        lens = self.int32(case.lengths)
        if case.page is None:
            k, v = (x.view(len(case.lengths), -1, heads, dim) for x in flat)
            return Call(q, k, v, lens, case.lengths)
        k, v = (x.view(-1, case.page, heads, dim) for x in flat)
        return Call(q, k, v, lens, case.lengths, self.table(case.lengths, case.page))

    def table(self, lengths: tuple[int, ...], page: int) -> Tensor:
        """Pages in random order, -1 behind the end of each request."""
        counts = [-(-n // page) for n in lengths]
        order = torch.randperm(sum(counts), generator=self.generator, device=self.device)
        rows = order.to(torch.int32).split(counts)
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)

    def lists(self, case: DecodeCase) -> tuple[Tensor, Tensor, int]:
        """Random blocks of each KV head, and the newest one."""
        shape = len(case.lengths), case.heads[1], -(-case.lengths[0] // BLOCK)
        scores = torch.rand(shape, generator=self.generator, device=self.device)
        scores[..., -1] = 1
        indices = scores.topk(case.listed).indices.sort().values.to(torch.int32)
        return indices, torch.full_like(indices[..., 0], case.listed), BLOCK

    def bounds(self, case: DecodeCase, call: Call) -> patterns.PageBounds:
        """Of the keys of each page."""
        pages, page, heads, dim = call.k.shape
        made = patterns.PageBounds(pages, page, heads, dim, dtype=self.dtype, device=self.device)
        for first in range(0, pages, 1024):
            keys = call.k[first : first + 1024].flatten(0, 1)
            made.write(keys, torch.arange(len(keys), device=self.device) + first * page)
        return made

    def shape_scores(self, case: DecodeCase, call: Call) -> Call:
        """The call with keys of its own, of which so many percent of the tiles lie far below.

        All queries look in one direction, and the keys of a tile lie along it or against it. The
        first tile is a high one.
        """
        dim = case.head_dim
        way = torch.nn.functional.normalize(self.normal(case.heads[1], dim).float(), dim=-1)
        tiles = call.k.shape[1] // BLOCK
        shape = call.k.shape[0], tiles, case.heads[1]
        low = torch.rand(shape, generator=self.generator, device=self.device)
        low = low < case.sparsity / 100
        low[:, 0] = False
        along = torch.where(low, -HEIGHT, HEIGHT).to(call.k.dtype)[:, :, None, :, None]
        k = self.normal(*call.k.shape).mul_(0.2)
        k.view(k.shape[0], tiles, BLOCK, *k.shape[2:]).add_(along * way.to(k.dtype))
        group = case.heads[0] // case.heads[1]
        q = (dim**0.5 * way).repeat_interleave(group, 0).to(k.dtype) + 0.05 * call.q
        return Call(q, k, call.v, call.seq_lens, call.lengths, threshold=THRESHOLD)


def error(call: Call, out: Tensor) -> float:
    """Of the first request's result against fp64, relative to its largest element."""
    length, (heads_q, heads) = call.lengths[0], (call.q.shape[2], call.k.shape[2])
    k, v = call.rows(length)
    worst, largest = 0.0, 0.0
    for head in range(heads):  # one by one: few of these keys fit in fp64
        own = slice(head * heads_q // heads, (head + 1) * heads_q // heads)
        seen = torch.ones(length, dtype=torch.bool, device=k.device)
        if call.blocks is not None:
            listed = torch.zeros_like(seen[::BLOCK])
            indices, counts = (x[0, head] for x in call.blocks[:2])
            listed[indices[:counts].long()] = True
            seen = listed.repeat_interleave(BLOCK)[:length]
        one = (x[None, :, head : head + 1] for x in (k, v))
        exact, _ = reference.attention(call.q[:1, :, own], *one, seen[None])
        worst = max(worst, (out[:1, :, own].double() - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    return worst / largest
