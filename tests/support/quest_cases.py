"""Quest's choice by its definition, and problems for the op."""

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Numbers are small integers, so scores are exact in any dtype; many are equal."""

    batch: int = 3
    heads: int = 4
    heads_kv: int = 2
    dim: int = 64
    page: int = 16
    width: int = 40
    best: int = 7
    table: bool = True
    odd: bool = False  # some numbers are NaN or infinite, and some pages are missing
    lengths: tuple[int, ...] = ()  # drawn without

    def arguments(self, dtype, q_dtype=None):
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape):
            return torch.randint(-3, 4, shape, generator=generator, device="cpu").to(dtype)

        q = drawn(self.batch, self.heads, self.dim).to(q_dtype or dtype)
        pages = self.batch * self.width + (2 if self.table else 0)
        low = drawn(pages, self.heads_kv, self.dim)
        high = low + drawn(pages, self.heads_kv, self.dim).abs()
        most = self.width * self.page
        drawn_lengths = torch.randint(
            most // 2, most + 20, (self.batch,), generator=generator, device="cpu"
        )
        lengths = torch.tensor(self.lengths, device="cpu") if self.lengths else drawn_lengths
        table = None
        if self.table:
            table = torch.randperm(pages, generator=generator)[: self.batch * self.width]
            table = table.view(self.batch, self.width).int()
        if self.odd:
            low[::7, 0] = torch.inf  # a page without keys
            high[::7, 0] = -torch.inf
            high[3::11, :, 1], q[-1, 0, 0] = torch.nan, torch.nan
            if table is not None:
                table[:, 1], table[0, 4:6] = -1, pages
        return {
            "q": q, "low": low, "high": high, "seq_lens": lengths.int(), "page_table": table,
            "page": self.page, "best": self.best,
        }  # fmt: skip


CASES = {
    "plain": Case(),
    "odd numbers": Case(odd=True),
    "without a table": Case(table=False),
    "lengths": Case(batch=7, lengths=(0, 1, 16, 17, -5, 640, 9999)),
    "nothing but the newest": Case(best=0),
    "more than there are": Case(best=60, odd=True),
    "many heads": Case(heads=24, heads_kv=8, dim=128, page=64),
    "one head, odd pages": Case(heads=5, heads_kv=1, dim=72, page=7, odd=True),
    "the widest heads": Case(dim=256, batch=1, width=90),
    "narrow heads": Case(dim=8, width=300, best=33),
    "several rounds of a thread block": Case(batch=6, heads=4, heads_kv=4, dim=256, width=900),
    "many pages": Case(batch=1, width=3000, best=500, dim=16, page=1),
}


def expected(q, low, high, seq_lens, page_table, page, best):
    """Lists {(batch, key head): pages}; the newest first, then the others ascending."""
    batch, (pages, heads_kv, _) = q.shape[0], low.shape
    width = pages // batch if page_table is None else page_table.shape[1]
    lists = {}
    for b, h in itertools.product(range(batch), range(heads_kv)):
        length = max(0, min(int(seq_lens[b]), width * page))
        newest = (length - 1) // page if length else -1
        queries = q[b].double().unflatten(0, (heads_kv, -1))[h]
        scores = {}
        for i in range(max(0, newest)):
            place = b * width + i if page_table is None else int(page_table[b, i])
            if 0 <= place < pages:
                bounds = queries * low[place, h].double(), queries * high[place, h].double()
                score = torch.maximum(*bounds).sum().item()
                if score > -math.inf:  # nor NaN
                    scores[i] = score
        chosen = sorted(scores, key=lambda i: (-scores[i], i))[:best]
        lists[b, h] = [newest, *sorted(chosen)] if newest >= 0 else []
    return lists


def check(found, lists, best):
    """That indices and counts are these lists."""
    indices, counts = (x.cpu() for x in found)
    assert indices.dtype == counts.dtype == torch.int32
    for at, pages in lists.items():
        assert counts[at] == len(pages), at
        assert indices[at].tolist() == pages + [-1] * (best + 1 - len(pages)), at
