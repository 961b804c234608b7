"""HiP's search by its definition, chunk by chunk, and problems for the op."""

import itertools
import math
from dataclasses import dataclass

import torch


def search(score, low, high, chunks, granule, halvings=None):
    """The chunks of keys [low, high) that are kept, as pairs.

    score: of the key at a position. halvings: how often chunks are scored; None: until all are
    short. Chunks whose score is NaN or -inf are not kept; of equal scores the first is.
    """
    edges = [low + (high - low) * c // chunks for c in range(chunks + 1)]
    kept = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    for _ in itertools.count() if halvings is None else range(halvings):
        if halvings is None and all(b - a <= granule for a, b in kept):
            break
        halves = []
        for a, b in kept:
            middle = a + (b - a + 1) // 2 if b - a > granule else b
            halves += [part for part in ((a, middle), (middle, b)) if part[1] > part[0]]
        scores = {(a, b): score(a + (b - a) // 2) for a, b in halves}
        halves = [part for part in halves if scores[part] > -math.inf]
        kept = sorted(sorted(halves, key=lambda part: -scores[part])[:chunks])
    return kept


@dataclass(frozen=True)
class Case:
    """Numbers are small integers, so scores are exact in any dtype; many are equal."""

    q_len: int = 70
    kv_len: int = 500
    batch: int = 2
    heads: int = 4
    heads_kv: int = 2
    dim: int = 16
    block_q: int = 64
    sample: int = 2
    chunks: int = 8
    granule: int = 2
    first: int = 3
    page: int = 0  # 0: no pages
    by_head: bool = False  # pages of KV heads
    odd: bool = False  # some numbers are NaN or infinite, and some pages are missing

    def arguments(self, dtype):
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape):
            return torch.randint(-2, 3, shape, generator=generator, device="cpu").to(dtype)

        groups = -(-self.q_len // self.block_q)
        q = drawn(self.batch, self.q_len, self.heads, self.dim)
        table = None
        if self.page:
            width, heads = self.kv_len // self.page, self.heads_kv if self.by_head else 1
            count = self.batch * heads * width
            k = drawn(count + 1, self.page, self.heads_kv, self.dim)
            table = torch.randperm(count, generator=generator, device="cpu").int()
            table = table.view(self.batch, heads, width).clone()
        else:
            k = drawn(self.batch, self.kv_len, self.heads_kv, self.dim)
        begin = torch.randint(
            self.kv_len // 2, self.kv_len + 9, (self.batch, groups), generator=generator,
            device="cpu", dtype=torch.int32,
        )  # fmt: skip
        begin[0, -1] = self.kv_len + 99  # is clamped
        if self.odd:
            begin[-1, 0] = -3
            k[:, ::7, :, 1], k[:, 3::11, :, 0], q[0, 0, 0, 0] = torch.nan, torch.inf, torch.nan
            k[:, 5::13, :, 2] = -torch.inf
            if table is not None:
                table[:, :, 1], table[0, :, -2] = -1, len(k)
        return {
            "q": q, "k": k, "begin": begin, "page_table": table, "block_q": self.block_q,
            "sample": self.sample, "chunks": self.chunks, "granule": self.granule,
            "first": self.first, "halvings": self.halvings(),
        }  # fmt: skip

    def halvings(self):
        times, longest = 0, -(-self.kv_len // self.chunks)
        while longest > self.granule:
            times, longest = times + 1, -(-longest // 2)
        return times


CASES = {
    "plain": Case(),
    "odd numbers": Case(odd=True),
    "all queries, wide heads": Case(q_len=130, sample=1, dim=72, heads=2, batch=1),
    "one query, many chunks": Case(q_len=1, chunks=100, granule=1, kv_len=700),
    "more queries than a set holds": Case(q_len=120, block_q=120, sample=1, odd=True),
    "more chunks than keys": Case(chunks=300, kv_len=200, first=0),
    "more first keys than keys": Case(first=900, kv_len=90, odd=True),
    "long granules": Case(granule=31, chunks=3),
    "the widest heads": Case(dim=256, q_len=40, chunks=20),
    "head dim 136": Case(dim=136, q_len=40, odd=True),
    "pages": Case(page=16, kv_len=496),
    "pages of heads": Case(page=16, kv_len=496, by_head=True, odd=True, heads=6),
    "odd pages": Case(page=7, kv_len=497, odd=True, q_len=5),
}


def expected(q, k, begin, page_table, block_q, sample, chunks, granule, first, halvings):
    """Lists {(batch, head, group): keys}."""
    lists = {}
    (batch, q_len, heads, _), heads_kv = q.shape, k.shape[2]
    capacity = k.shape[1] * (1 if page_table is None else page_table.shape[2])
    for b, h in itertools.product(range(batch), range(heads)):
        own = h * heads_kv // heads
        keys = k[b, :, own].double() if page_table is None else _by_pages(k, page_table, b, own)
        for group, start in enumerate(range(0, q_len, block_q)):
            queries = q[b, start : min(start + block_q, q_len) : sample, h].double()
            scores = (queries @ keys.T).amax(0)  # NaN if one of them is
            high = max(0, min(int(begin[b, group]), capacity))
            low = min(first, high)
            found = search(scores.tolist().__getitem__, low, high, chunks, granule, halvings)
            taken = [j for a, e in found for j in range(a, min(e, a + granule))]
            lists[b, h, group] = [*range(low), *taken]
    return lists


def _by_pages(k, table, batch, head):
    """Keys of a request; NaN, which is never kept, where there is no page."""
    keys = []
    for page in table[batch, head % table.shape[1]].tolist():
        there = 0 <= page < len(k)
        keys.append(k[page, :, head].double() if there else k[0, :, head].double() * torch.nan)
    return torch.cat(keys)


def check(found, lists, width):
    """That columns and counts are these lists."""
    columns, counts = (x.cpu() for x in found)
    assert columns.dtype == counts.dtype == torch.int32
    for at, keys in lists.items():
        assert counts[at] == len(keys), at
        assert columns[at].tolist() == keys + [-1] * (width - len(keys)), at
