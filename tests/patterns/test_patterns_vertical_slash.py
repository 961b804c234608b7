"""Vertical-slash attention against its definition, token by token."""

from dataclasses import dataclass
from importlib import import_module

import numpy as np
import pytest
import torch
from dispatch_watch import Watch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import patterns, stripe_attention
from sparse_fmha.patterns.vertical_slash import (
    last_query_sums,
    vertical_slash,
    vertical_slash_mask,
)
from sparse_fmha.selection import reductions

# The function has the module's name.
module = import_module("sparse_fmha.patterns.vertical_slash")


def sums_by_loops(q, k, last, scale):
    """Column and diagonal sums in fp64, weight by weight."""
    batch, q_len, heads, _ = q.shape
    kv_len, group = k.shape[1], heads // k.shape[2]
    columns, diagonals = np.zeros((2, batch, heads, kv_len))
    for b, h in np.ndindex(batch, heads):
        for i in range(max(0, q_len - last), q_len):
            own = i + kv_len - q_len
            scores = scale * k[b, : own + 1, h // group].double() @ q[b, i, h].double()
            for j, weight in enumerate(scores.softmax(0).tolist()):
                columns[b, h, j] += weight
                diagonals[b, h, own - j] += weight
    return torch.from_numpy(columns), torch.from_numpy(diagonals)


@dataclass(frozen=True)
class Maps:
    q_len: int
    past: int = 0  # keys before the first query's
    block_q: int = 64
    range_size: int = 64
    columns: float = 0.05  # shares
    diagonals: float = 0.05
    near: bool = False  # the diagonals at the query, too
    seed: int = 0

    @property
    def kv_len(self):
        return self.q_len + self.past

    def make(self, heads=2):
        rng = np.random.default_rng(self.seed)
        columns = rng.random((1, heads, self.kv_len)) < self.columns
        diagonals = rng.random((1, heads, self.kv_len)) < self.diagonals
        diagonals[..., : 5 * self.near] = True
        return torch.from_numpy(columns), torch.from_numpy(diagonals)

    def mask(self, *maps, **options):
        return vertical_slash_mask(*maps, self.q_len, self.block_q, self.range_size, **options)

    def definition(self, columns, diagonals):
        """Bool [1, H, q_len, kv_len], by walking along the distances of each group's keys."""
        heads = columns.shape[1]
        visible = torch.zeros(1, heads, self.q_len, self.kv_len, dtype=torch.bool)
        for h in range(heads):
            listed = diagonals[0, h].nonzero().flatten().tolist()
            wanted = {s + n for s in listed for n in range(self.block_q)}
            runs, place = set(), 0
            while listed and place <= max(listed):
                if place not in wanted:
                    place = min((s for s in listed if s >= place), default=self.kv_len)
                    continue
                runs |= set(range(place, place + self.range_size))
                place += self.range_size
            # What is wanted behind the last diagonal.
            while listed and place in wanted and place < self.kv_len:
                runs |= set(range(place, place + self.range_size))
                place += self.range_size
            for first in range(0, self.q_len, self.block_q):
                last = min(first + self.block_q, self.q_len) - 1
                seen = columns[0, h].clone()
                seen[[last + self.past - u for u in runs if u <= last + self.past]] = True
                for i in range(first, last + 1):
                    visible[0, h, i, : i + self.past + 1] = seen[: i + self.past + 1]
        return visible


@st.composite
def maps(draw):
    return Maps(
        draw(st.integers(1, 300)),
        draw(st.sampled_from([0, 0, 1, 37, 130])),
        draw(st.sampled_from([64, 64, 128, 192])),
        draw(st.sampled_from([64, 128])),
        draw(st.sampled_from([0, 0.02, 0.2, 1])),
        draw(st.sampled_from([0, 0.005, 0.02, 0.2, 1])),
        draw(st.booleans()),
        draw(st.integers(0, 1 << 30)),
    )


@settings(max_examples=60)
@given(maps())
@example(Maps(300, columns=0, diagonals=0))
@example(Maps(300, past=50, block_q=192, range_size=128, diagonals=0.01))
def test_keys_of_columns_and_diagonals(case):
    columns, diagonals = case.make()
    mask = case.mask(columns, diagonals)
    mask.validate()
    dense = mask.to_dense()
    assert dense.equal(case.definition(columns, diagonals))
    # Lists are short: nothing behind the last query, and columns for less than a run.
    read = torch.arange(mask.columns.shape[-1]) < mask.counts[..., None]
    ends = torch.arange(1, mask.groups + 1).mul(case.block_q).clamp(max=case.q_len) + case.past
    assert not (read & (mask.columns >= ends[:, None])).any()
    spare = mask.counts - columns.sum(-1, keepdim=True)
    assert (spare < case.range_size).all()
    if not case.columns:
        assert (mask.counts < case.range_size).all()
        own = mask.seen().sum(-1) - mask.counts
        assert own.equal(mask.range_counts * case.range_size)
    # Nothing that was asked for is missing.
    for h in range(2):
        for s in diagonals[0, h].nonzero().flatten().tolist():
            assert dense[0, h].diagonal(case.past - s).all()
        visible_rows = dense[0, h][:, columns[0, h]]
        keys = columns[0, h].nonzero().flatten()
        expected = keys <= torch.arange(case.q_len)[:, None] + case.past
        assert visible_rows.equal(expected)
    # Room for what there is gives the same.
    room = {
        "max_columns": int(columns.sum(-1).max()),
        "max_diagonals": int(diagonals.sum(-1).max()),
    }
    assert case.mask(columns, diagonals, **room).to_dense().equal(dense)


def test_too_little_room_loses_the_last():
    case = Maps(300, columns=0.2, diagonals=0.02)
    columns, diagonals = case.make()
    few = torch.where(columns.cumsum(-1) <= 7, columns, False)
    mask = case.mask(columns, diagonals, max_columns=7)
    mask.validate()
    assert mask.to_dense().equal(case.definition(few, diagonals))
    mask = case.mask(columns, diagonals, max_diagonals=1)
    mask.validate()
    assert mask.range_counts.max() == 1
    assert mask.to_dense()[..., columns[0, 0]][0, 0, -1].all()  # columns take a lost run's place


@pytest.mark.parametrize(
    ("q_len", "kv_len", "last"),
    [(150, 150, 64), (40, 40, 64), (70, 133, 20), (1, 9, 64), (5, 5, 1)],
)
@pytest.mark.parametrize("keys", [7, 1 << 14])
@pytest.mark.parametrize("slice_size", [1, 1 << 24])
def test_sums(randn, monkeypatch, q_len, kv_len, last, keys, slice_size):
    monkeypatch.setattr(reductions, "KEYS", keys)
    monkeypatch.setattr(reductions, "SLICE", slice_size)
    q, k = randn(2, q_len, 6, 16), randn(2, kv_len, 2, 16, seed=1)
    found = last_query_sums(q, k, last, scale=0.4)
    for ours, exact in zip(found, sums_by_loops(q, k, last, 0.4), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
        assert ours.sum(-1).sub(min(last, q_len)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("q_len", "past"), [(500, 0), (333, 100)])
def test_from_q_k_v_to_the_output(randn, poisoned, agrees, q_len, past, dtype):
    case = Maps(q_len, past)
    q = randn(1, q_len, 4, 32, dtype=dtype)
    k, v = (randn(1, q_len + past, 2, 32, dtype=dtype, seed=s) for s in (1, 2))
    options = {"vertical": 25, "slash": 12, "last": 30, "first_columns": 4, "last_diagonals": 3}
    with poisoned():
        mask = vertical_slash(q, k, **options)
        out, lse = stripe_attention(q, k, v, mask, return_lse=True)
    mask.validate()
    columns, diagonals = sums_by_loops(q, k, 30, 32**-0.5)
    columns[..., :4], diagonals[..., :3] = torch.inf, torch.inf
    chosen = [
        torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(n, -1).indices, True)
        for x, n in ((columns, 25), (diagonals, 12))
    ]
    visible = case.definition(*chosen)
    assert mask.to_dense().equal(visible)
    agrees(out, lse, q, k, v, visible)
    assert lse.isfinite().all()  # every query sees itself


def test_more_forced_than_asked_for(randn):
    q, k = randn(1, 200, 2, 16), randn(1, 200, 1, 16, seed=1)
    mask = vertical_slash(q, k, vertical=3, slash=0, first_columns=9, last_diagonals=5)
    columns, diagonals = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    columns[..., :9], diagonals[..., :5] = True, True
    assert mask.to_dense()[:, :1].equal(Maps(200).definition(columns, diagonals))


@pytest.mark.parametrize("options", [{}, {"block_q": 256, "range_size": 128}], ids=str)
def test_neither_the_host_nor_pairs_of_tokens(options):
    q = torch.randn(1, 4096, 4, 16, generator=torch.Generator().manual_seed(0))
    k = q[:, :, :2] + 1
    options = {"vertical": 20, "slash": 110} | options
    with Watch() as watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE", 1)
        patch.setattr(reductions, "SLICE", 1)
        mask = vertical_slash(q, k, **options)
    assert watch.largest <= max(q.numel(), 2 * 64 * 4096)  # 64 rows of scores, or their bytes
    on_meta = vertical_slash(q.to("meta"), k.to("meta"), **options)
    for name in ("columns", "range_starts"):
        assert getattr(on_meta, name).shape == getattr(mask, name).shape
    # What the docstring says of the lists.
    block_q, range_size = mask.block_q, mask.range_size
    runs = min(110 * -(-block_q // range_size), 4096 // range_size)
    stored = mask.columns.numel() + mask.range_starts.numel()
    assert stored <= 4 * mask.groups * (30 + range_size + runs)


def test_it_can_be_traced_in_one_graph(randn):
    def layer(q, k, v):
        mask = vertical_slash(q, k, vertical=20, slash=10, last_diagonals=3)
        return stripe_attention(q, k, v, mask)

    q, k, v = (randn(1, 300, 2, 16, seed=s) for s in range(3))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


def test_autocast_leaves_the_choice_alone(randn):
    q, k = randn(1, 300, 2, 16), randn(1, 300, 1, 16, seed=1)
    expected = last_query_sums(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        found = last_query_sums(q, k)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (1, 0)], ids=["no batch", "no tokens"])
def test_empty(shape):
    q = torch.zeros(*shape, 2, 16)
    mask = patterns.vertical_slash(q, q)
    assert stripe_attention(q, q, q, mask).shape == q.shape


def test_errors(randn):
    q, k = randn(1, 100, 2, 16), randn(1, 120, 1, 16)
    for error, message, options in (
        (ValueError, "vertical must be at least 0, got -1", {"vertical": -1}),
        (TypeError, "slash must be an int, got 1.5", {"slash": 1.5}),
        (ValueError, "last must be at least 1, got 0", {"last": 0}),
        (ValueError, "last_diagonals must be at least 0, got -3", {"last_diagonals": -3}),
        (ValueError, "first_columns must be at least 0, got -3", {"first_columns": -3}),
        (ValueError, "scale must be a finite number, got inf", {"scale": float("inf")}),
        (ValueError, "block_q must be a multiple of 64 .*, got 100", {"block_q": 100}),
        (ValueError, "range_size must be 64 or 128, got 32", {"range_size": 32}),
    ):
        with pytest.raises(error, match=message):
            vertical_slash(q, k, **options)
    with pytest.raises(ValueError, match="k must have at least the 100 tokens of q, got 99"):
        vertical_slash(q, k[:, :99])
    with pytest.raises(
        ValueError, match="heads of q must be a multiple of those of k, got 2 and 3"
    ):
        vertical_slash(q, randn(1, 100, 3, 16))
    maps = torch.zeros(2, 1, 1, 100, dtype=torch.bool)
    with pytest.raises(ValueError, match="q_len must be at most the 100 keys of columns, got 101"):
        vertical_slash_mask(*maps, 101)
    with pytest.raises(
        ValueError, match=r"columns and diagonals must have .*, got \[1, 1, 100\] and \[1, 1, 99\]"
    ):
        vertical_slash_mask(maps[0], maps[1, ..., 1:], 50)
    with pytest.raises(TypeError, match=r"diagonals must have .*dtype.*, got torch.int64"):
        vertical_slash_mask(maps[0], maps[1].long(), 50)
    with pytest.raises(ValueError, match="max_diagonals must be at least 0, got -1"):
        vertical_slash_mask(*maps, 50, max_diagonals=-1)
