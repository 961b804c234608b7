"""Stripes whose lists have room for few keys, so that Hopper's gradients copy what is listed."""

from __future__ import annotations

import torch
from gradient_cases import Case


def lists(q_len, kv_len, block_q, heads, share, runs=0, causal=False, batch=1, seed=0):
    """Each key is a column with a probability of `share`. Every third group lists nothing.

    runs: of 64 keys, apart from each other, in descending order; the first ends behind all keys.
    """
    rng = torch.Generator().manual_seed(seed)
    groups = -(-q_len // block_q)
    shape = batch, heads, groups
    seen = torch.rand(*shape, kv_len, generator=rng) < share
    empty = torch.arange(groups) % 3 == 2
    seen[:, :, empty] = False
    starts = None
    if runs:
        starts = kv_len - 30 - 80 * torch.arange(runs)
        for start in starts.tolist():
            seen[..., max(start, 0) : start + 64] = False
        starts = starts.expand(*shape, -1)
    counts = seen.sum(3)
    columns = seen.int().argsort(dim=3, descending=True, stable=True)[..., : int(counts.max())]

    def options(device):
        found = {"columns": columns, "counts": counts, "range_starts": None, "range_counts": None}
        if starts is not None:
            count = torch.randint(1, runs + 1, shape, generator=rng.manual_seed(seed))
            found |= {"range_starts": starts, "range_counts": count.masked_fill(empty, 0)}
        placed = {
            name: x if x is None else x.to(device, torch.int32).contiguous()
            for name, x in found.items()
        }
        return placed | {"block_q": block_q, "range_size": 64, "causal": causal}

    return options


CASES = {
    "columns": Case("stripe", (600,), lists(600, 700, 256, 2, 0.1), kv=(700,)),
    "a list for all, groups of heads": Case(
        "stripe", (300,), lists(300, 1100, 256, 1, 0.05, 2), (1100,), heads=4, heads_kv=2, batch=2
    ),
    "a list for each, groups of heads": Case(
        "stripe",
        (330,),
        lists(330, 1300, 192, 4, 0.1, 1, batch=2),
        kv=(1300,),
        heads=4,
        heads_kv=2,
        batch=2,
    ),
    "causal": Case(
        "stripe", (900,), lists(900, 900, 256, 3, 0.12, 2, causal=True), heads=3, heads_kv=3
    ),
    "causal, more keys": Case(
        "stripe", (200,), lists(200, 1000, 64, 2, 0.04, causal=True), kv=(1000,)
    ),
    "causal, rows without keys": Case(
        "stripe", (700,), lists(700, 420, 512, 2, 0.3, 1, causal=True), kv=(420,)
    ),
    "several thousand keys": Case("stripe", (150,), lists(150, 9000, 128, 1, 0.03), kv=(9000,)),
    "nothing but runs": Case("stripe", (260,), lists(260, 900, 256, 2, 0.0, 3), kv=(900,)),
}
