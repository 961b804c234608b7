"""Stripe masks for the tests: drawn at random, with what they mean token by token."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from sparse_fmha import StripeMask, reference


@dataclass(frozen=True)
class Drawn:
    q_len: int
    kv_len: int
    block_q: int = 64
    range_size: int = 64
    batch: int = 1
    heads: int = 1
    causal: bool = False
    share: float = 0.3  # of the keys that are columns
    runs: int = 2  # at most, for each group; negative: no lists of them
    seed: int = 0

    def tensors(self):
        """columns, counts, range_starts, range_counts, disjoint."""
        rng = np.random.default_rng(self.seed)
        groups = -(-self.q_len // self.block_q)
        rows = self.batch * self.heads * groups
        columns, runs = [], []
        for _ in range(rows):
            # Runs in their own places, so that they cannot meet; the last may pass the end.
            places = np.arange(rng.integers(0, self.range_size), self.kv_len, self.range_size)
            starts = rng.permutation(places)[: rng.integers(0, max(self.runs, 0) + 1)]
            free = np.ones(self.kv_len, dtype=bool)
            for start in starts:
                free[start : start + self.range_size] = False
            columns.append(np.flatnonzero(free & (rng.random(self.kv_len) < self.share)))
            runs.append(starts)

        def lists(rows_of, extra):
            width = max((len(row) for row in rows_of), default=0) + extra
            table = np.full((len(rows_of), width), -5, dtype=np.int32)
            for row, listed in zip(table, rows_of, strict=True):
                row[: len(listed)] = listed
            counts = np.array([len(row) for row in rows_of], dtype=np.int32)
            lead = (self.batch, self.heads, groups)
            return torch.from_numpy(table).view(*lead, width), torch.from_numpy(counts).view(lead)

        found = lists(columns, self.seed % 2)
        return (*found, *(lists(runs, 1) if self.runs >= 0 else (None, None)))

    def mask(self):
        columns, counts, *ranges = self.tensors()
        sizes = (self.q_len, self.kv_len, self.block_q)
        return StripeMask(columns, counts, *sizes, *ranges, self.range_size, self.causal)

    def dense(self):
        columns, counts, starts, range_counts = self.tensors()
        sizes = (self.q_len, self.kv_len, self.block_q)
        return reference.stripe_mask(
            columns, counts, *sizes, starts, range_counts, self.range_size, self.causal
        )


@st.composite
def drawn(draw):
    return Drawn(
        draw(st.integers(1, 300)),
        draw(st.integers(1, 400)),
        draw(st.sampled_from([64, 128, 192, 256, 2048])),
        draw(st.sampled_from([64, 128])),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0.02, 0.3, 1])),
        draw(st.integers(-1, 3)),
        draw(st.integers(0, 1 << 30)),
    )
