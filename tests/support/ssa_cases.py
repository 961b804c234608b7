"""SSA's choice by its definition, token by token, and problems for the op."""

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """Queries and means are multiples of 1/32 that any dtype has; many scores are equal."""

    q_len: int = 70
    columns: int = 31
    batch: int = 2
    heads: int = 4
    heads_kv: int = 1
    dim: int = 16
    parts: int = 2
    block: int = 16
    at: int = 400
    few: int = 5
    scale: float = 0.25
    kinds: int = 12  # of blocks; equal ones have equal weights
    odd: bool = False  # some numbers are NaN or infinite

    def arguments(self, dtype):
        generator = torch.Generator().manual_seed(7)

        def drawn(*shape):
            return torch.randint(-3, 4, shape, generator=generator, device="cpu").to(dtype)

        q = drawn(self.batch, self.q_len, self.heads, self.dim)
        means = drawn(self.parts, self.batch, self.kinds, self.heads_kv, self.dim)
        kind = torch.randint(self.kinds, (self.columns,), generator=generator, device="cpu")
        means = means[:, :, kind]
        for part in range(1, self.parts):
            means[part] /= 8 << part
        if self.odd:
            q[0, 3, 0, 1] = torch.nan
            q[-1, 5, -1, 0] = torch.inf
            means[0, 0, -4, 0, 2], means[0, -1, -3, -1, 3] = torch.nan, -torch.inf
        return {
            "q": q, "means": means, "block": self.block, "at": self.at, "few": self.few,
            "scale": self.scale,
        }  # fmt: skip


CASES = {
    "plain": Case(),
    "odd numbers": Case(odd=True, q_len=90),
    "one head": Case(heads=2, heads_kv=2),
    "a group of two": Case(heads=4, heads_kv=2, dim=64),
    "a group of three": Case(heads=3, few=9),
    "two warps for a group": Case(heads=12, heads_kv=2, dim=72, batch=1),
    "four warps for a group": Case(heads=13, dim=128, batch=1, q_len=40),
    "wide heads": Case(dim=136, heads=2, q_len=20, batch=1),
    "the widest heads, eight warps for a group": Case(dim=256, heads=16, q_len=20, batch=1),
    "tokens before all keys": Case(at=-20, few=3, scale=-0.5),
    "more than there are": Case(few=40, at=0, q_len=130, heads=2, block=8),
    "none but the own block": Case(few=0),
    "queries past the means": Case(at=520),
    "many blocks": Case(columns=400, at=6380, few=15, q_len=20, batch=1, kinds=300, dim=32),
    "many to choose": Case(columns=300, at=4780, few=70, q_len=20, batch=1, kinds=300, heads=2),
    "three parts": Case(parts=3, block=32, at=900, q_len=40),
    "one part, no scale": Case(parts=1, scale=0.0),
}


def weights(q, means, block, at, few, scale):
    """fp64 `[Hkv, n]` of the n blocks before it, for each (batch, token), and the own block."""
    del few
    (batch, q_len, heads, _), heads_kv = q.shape, means.shape[3]
    means = means.double().sum(0)
    for b, i in itertools.product(range(batch), range(q_len)):
        position = at + i
        own, complete = max(-1, position // block), max(0, (position + 1) // block)
        grouped = q[b, i].double().view(heads_kv, heads // heads_kv, -1)
        scores = scale * torch.einsum("hgd,jhd->hgj", grouped, means[b, :complete])
        shares = scores.softmax(-1).sum(1)
        yield b, i, shares[:, : max(0, own)], own


def check(found, given, error=1e-4):
    """That a result is the choice; weights that differ, but not by more than `error`, may swap."""
    found = found.cpu()
    few = given["few"]
    assert found.dtype == torch.int32
    assert found.shape == (
        given["q"].shape[0], given["means"].shape[3], given["q"].shape[1], few + 1,
    )  # fmt: skip
    chosen = 0
    for b, i, shares, own in weights(**given):
        for h, row in enumerate(shares.tolist()):
            taken = found[b, h, i].tolist()
            assert taken.pop() == own, (b, h, i)
            there = [j for j in range(len(row)) if not math.isnan(row[j])]
            best = sorted(sorted(there, key=lambda j: (-row[j], j))[:few])
            assert taken[len(best) :] == [-1] * (few - len(best)), (b, h, i)
            taken = taken[: len(best)]
            chosen += len(taken)
            if taken != best:
                assert taken == sorted(set(taken)), (b, h, i)
                assert set(taken) <= set(there), (b, h, i)
                swapped = [row[j] for j in set(taken) ^ set(best)]
                assert max(swapped) <= min(swapped) * (1 + error), (b, h, i)
                assert max(swapped) > min(swapped), (b, h, i)
    return chosen
