"""Packed sequences of any lengths, with NaN wherever no sequence holds a token."""

from dataclasses import dataclass

import torch
from gradient_oracle import packed_mask

NAN = float("nan")
# Queries, keys and keys in use, of several tiles of a GPU's kernel and of a part of one.
LENGTHS = ((300, 300, 300), (1, 900, 700), (0, 64, 64), (513, 40, 40), (128, 128, 128))


def _values(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Packed:
    """Lengths of queries, keys and keys in use, and how many tokens of none lie around them."""

    lengths: tuple[tuple[int, int, int], ...] = ((70, 70, 70), (3, 90, 80), (0, 5, 5), (65, 2, 2))
    before: int = 0
    after: int = 0
    heads: int = 4
    heads_kv: int = 2
    dim: int = 16
    causal: bool = False
    counts_used: bool = False  # pass the keys in use; else all are
    scale: float | None = None

    def starts(self, place):
        sizes = [self.before, *(x[place] for x in self.lengths)]
        return torch.tensor(sizes).cumsum(0).int()

    def tokens(self, place):
        return int(self.starts(place)[-1]) + self.after

    def arguments(self, dtype=torch.float32):
        q, k, v = (
            _values(self.tokens(place), heads, self.dim, seed=seed, dtype=dtype)
            for seed, (place, heads) in enumerate(
                [(0, self.heads), (1, self.heads_kv), (1, self.heads_kv)]
            )
        )
        used = None
        if self.counts_used:
            used = torch.tensor([x[2] for x in self.lengths], dtype=torch.int32)
        given = {
            "q": q,
            "k": k,
            "v": v,
            "cu_q": self.starts(0),
            "cu_k": self.starts(1),
            "max_q": max((x[0] for x in self.lengths), default=0),
            "max_k": max((x[1] for x in self.lengths), default=0),
            "causal": self.causal,
            "seqused_k": used,
            "scale": self.scale,
        }
        mask = packed_mask(given)
        q[~self.held()] = NAN
        for x in (k, v):
            x[~self.used_keys(used)] = NAN
        return given, mask

    def held(self):
        places = torch.arange(self.tokens(0))
        return (places >= self.before) & (places < self.tokens(0) - self.after)

    def used_keys(self, used):
        """The keys of a sequence, even if no query sees them."""
        seen = torch.zeros(self.tokens(1), dtype=torch.bool)
        for b, first in enumerate(self.starts(1)[:-1].tolist()):
            length = self.lengths[b][1] if used is None else int(used[b])
            seen[first : first + length] = True
        return seen


def clean(*tensors):
    """Without NaN and with a batch of one, as the oracle takes them."""
    return [x.nan_to_num(0)[None] for x in tensors]


def in_pages(given, page, seed=0):
    """The same keys and values in shuffled pages, with NaN behind them and in unread pages."""
    used = given["seqused_k"]
    lengths = given["cu_k"].diff() if used is None else used
    width = max([-(-int(n) // page) for n in lengths], default=0) + 1
    pages = len(lengths) * width + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).int()
    table = order[: len(lengths) * width].view(len(lengths), width).clone()
    stores = []
    for x in (given["k"], given["v"]):
        store = x.new_full((pages, page, *x.shape[1:]), NAN)
        for b, n in enumerate(lengths.tolist()):
            for j in range(n):
                store[table[b, j // page], j % page] = x[int(given["cu_k"][b]) + j]
        stores.append(store)
    for b, n in enumerate(lengths.tolist()):  # not read
        table[b, -(-n // page) :] = -1
    return {
        **given,
        "k": stores[0],
        "v": stores[1],
        "cu_k": None,
        "seqused_k": lengths.int(),
        "page_table": table,
    }


def on_device(given, device):
    """The arguments, their tensors on a device."""
    return {n: x.to(device) if torch.is_tensor(x) else x for n, x in given.items()}
