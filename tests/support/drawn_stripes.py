"""Lists of single keys and of runs drawn at random, of one batch entry and head."""

import torch
from hypothesis import strategies as st

from sparse_fmha import reference


@st.composite
def problems(draw):
    len_q, len_kv = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    block_q = draw(st.sampled_from([64, 128, 192, 256]))
    range_size = draw(st.sampled_from([64, 128]))
    groups = -(-len_q // block_q)
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    width = draw(st.integers(0, 150))
    columns, starts = [], []
    for _ in range(groups):
        # Disjoint: runs in the first half, columns where there are no runs; some lists end early.
        run = torch.randperm(len_kv, generator=generator)[:3].sort().values.tolist()
        run = [r for i, r in enumerate(run) if i == 0 or r - run[i - 1] >= range_size]
        run = run[: draw(st.integers(0, 3))]
        covered = {k for r in run for k in range(r, r + range_size)}
        free = [k for k in range(len_kv) if k not in covered]
        keep = torch.rand(len(free), generator=generator) < draw(st.sampled_from([0.1, 0.6, 1.0]))
        columns.append([k for k, kept in zip(free, keep.tolist(), strict=True) if kept][:width])
        starts.append(run)
    return len_q, len_kv, block_q, range_size, draw(st.booleans()), columns, starts


def padded(rows, filler):
    width = max(map(len, rows))
    return [row + [filler] * (width - len(row)) for row in rows]


def visible(problem):
    """Which query sees which key, by the reference."""
    len_q, len_kv, block_q, range_size, causal, columns, starts = problem
    counts, range_counts = ([len(row) for row in rows] for rows in (columns, starts))
    columns_t, starts_t = (
        torch.tensor(padded(rows, -1), dtype=torch.int32).view(1, 1, len(rows), -1)
        for rows in (columns, starts)
    )
    return reference.stripe_mask(
        columns_t,
        torch.tensor(counts).int().view(1, 1, -1),
        len_q,
        len_kv,
        block_q,
        starts_t,
        torch.tensor(range_counts).int().view(1, 1, -1),
        range_size,
        causal=causal,
    )[0, 0]
