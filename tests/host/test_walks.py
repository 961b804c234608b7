"""The four promises of include/sparse_fmha/mechanisms/contract.h, for every mechanism.

The oracle is the mask of docs/design.md, token by token in numpy; it shares nothing with the C++.
A failure prints the line that repeats it.
"""

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from sparse_fmha import _C


@dataclass(frozen=True)
class Prefix:
    """Dense or causal attention on one axis."""

    kind: str
    len_q: int
    len_kv: int
    tile_q: int
    tile_k: int

    def bound(self):
        mechanism = {"dense": _C.walks.Dense, "causal": _C.walks.Causal}[self.kind]
        return mechanism(self.len_q, self.len_kv, self.tile_q, self.tile_k)

    def geometry(self):
        """(grid, dilation, tile) of the queries and of the keys."""
        return tuple(
            ((1, 1, n), (1, 1, 1), (1, 1, t))
            for n, t in ((self.len_q, self.tile_q), (self.len_kv, self.tile_k))
        )

    def mask(self):
        if self.kind == "dense":
            return np.ones((self.len_q, self.len_kv), bool)
        return np.tri(self.len_q, self.len_kv, self.len_kv - self.len_q, dtype=bool)


@dataclass(frozen=True)
class Neighborhood:
    grid: tuple
    window: tuple
    stride: tuple
    dilation: tuple
    causal: tuple
    tile_q: tuple
    tile_k: tuple

    def bound(self):
        return _C.walks.Neighborhood(
            self.grid,
            self.window,
            self.stride,
            self.dilation,
            self.causal,
            self.tile_q,
            self.tile_k,
        )

    def geometry(self):
        return ((self.grid, self.dilation, self.tile_q), (self.grid, self.dilation, self.tile_k))

    def mask(self):
        axes = zip(self.grid, self.window, self.stride, self.dilation, self.causal, strict=True)
        mask = np.ones((1, 1), bool)
        for axis in axes:
            mask = np.kron(mask, axis_mask(*axis))
        return mask


def axis_mask(length, window, stride, dilation, causal):
    mask = np.zeros((length, length), bool)
    for i in range(length):
        residue, p = i % dilation, i // dilation
        positions = length // dilation + (residue < length % dilation)
        if causal:
            leader = min((p // stride) * stride + stride - 1, positions - 1)
            a, b = max(leader - window + 1, 0), p + 1
        else:
            leader = min((p // stride) * stride + stride // 2, positions - 1)
            a = min(max(leader - window // 2, 0), positions - window)
            b = a + window
        for j in range(length):
            mask[i, j] = j % dilation == residue and a <= j // dilation < b
    return mask


class Tile:
    """The box of in-range tokens at an origin, and whether the whole box is in range."""

    def __init__(self, geometry, residue, origin):
        grid, dilation, extent = geometry
        axes = [
            [p for p in range(o, o + e) if p * d + r < n]
            for o, e, d, r, n in zip(origin, extent, dilation, residue, grid, strict=True)
        ]
        self.positions = list(itertools.product(*axes))
        self.tokens = np.array(
            [
                np.ravel_multi_index(
                    [p * d + r for p, d, r in zip(position, dilation, residue, strict=True)], grid
                )
                for position in self.positions
            ],
            dtype=int,
        )
        self.whole = len(self.positions) == np.prod(extent)


def check_walks(walk, tiles, other_tiles, mask, exact):
    """Promises 2 and 3 for the walk of each tile over tiles of the other side, as a generator of
    (tile, visited tile, whether it is called full). `mask` has the walking side first.
    """
    visits = np.zeros(mask.shape, int)
    for i, (residue, tile) in enumerate(tiles):
        partial, full, origins = walk(i)
        assert partial >= 0
        assert full >= 0
        assert len(origins) == partial + full
        for n, origin in enumerate(origins):
            other = other_tiles(residue, origin)
            pairs = np.ix_(tile.tokens, other.tokens)
            visits[pairs] += 1
            all_visible = mask[pairs].all()
            if n >= partial:
                assert all_visible, f"full tile {origin} of tile {i} has an invisible pair"
                assert len(other.positions), f"full tile {origin} of tile {i} is out of range"
            yield tile, other, n >= partial
            if exact:
                assert mask[pairs].any(), f"tile {origin} of tile {i} is visited for nothing"
    assert (visits[mask] == 1).all(), "visible pairs visited not once"
    assert visits.max(initial=0) <= 1, "pairs visited twice"


def check(config):
    note(f'repeat: python tests/host/test_walks.py "{config!r}"')
    bound, mask = config.bound(), config.mask()
    geometry_q, geometry_k = config.geometry()
    exact = isinstance(config, Neighborhood)  # no tile is visited for nothing

    query_tiles = []
    for i in range(bound.num_query_tiles()):
        residue, origin = bound.query_tile(i)
        query_tiles.append((residue, origin, Tile(geometry_q, residue, origin)))
    covered = np.concatenate([tile.tokens for *_, tile in query_tiles])
    assert sorted(covered) == list(range(mask.shape[0])), "promise 1: the queries are not covered"
    assert all(tile.positions for *_, tile in query_tiles), "a query tile without queries"

    key_tiles = []
    for i in range(bound.num_key_tiles()):
        residue, origin = bound.key_tile(i)
        key_tiles.append((residue, origin, Tile(geometry_k, residue, origin)))
    covered = np.concatenate([tile.tokens for *_, tile in key_tiles])
    assert sorted(covered) == list(range(mask.shape[1])), "the keys are not covered"

    forward = check_walks(
        bound.walk,
        [(residue, tile) for residue, _, tile in query_tiles],
        lambda residue, origin: Tile(geometry_k, residue, origin),
        mask,
        exact,
    )
    for q, k, full in forward:
        assert not full or k.whole, "a full key tile has keys out of range"
        can_be_full = k.whole and mask[np.ix_(q.tokens, k.tokens)].all()
        assert full == can_be_full, "a tile that needs no mask is called partial"

    aligned = {(residue, origin) for residue, origin, _ in query_tiles}
    for i, (residue, *_) in enumerate(key_tiles):
        assert all((residue, o) in aligned for o in bound.walk_transposed(i)[2]), "not aligned"
    backward = check_walks(
        bound.walk_transposed,
        [(residue, tile) for residue, _, tile in key_tiles],
        lambda residue, origin: Tile(geometry_q, residue, origin),
        mask.T,
        exact,
    )
    for k, q, full in backward:
        can_be_full = k.whole and mask[np.ix_(q.tokens, k.tokens)].all()
        assert full == can_be_full, "full and partial query tiles are mixed up"

    for i, (residue, _, tile) in enumerate(query_tiles):
        everything = Tile((geometry_k[0], geometry_k[1], geometry_k[0]), residue, (0, 0, 0))
        seen = mask[np.ix_(tile.tokens, everything.tokens)]
        said = bound.visible(residue, tile.positions, everything.positions)
        assert np.array_equal(np.array(said).reshape(seen.shape), seen), "visible() is wrong"
        tokens = [bound.token(residue, p) for p in tile.positions]
        assert np.array_equal(
            np.ravel_multi_index(np.transpose(tokens), geometry_q[0]), tile.tokens
        )
        if isinstance(config, Neighborhood):
            edge = np.array(everything.positions)[seen.any(axis=0)].min(axis=0)
            first = np.array(bound.walk(i)[2]).min(axis=0)
            assert np.array_equal(first, edge), "the walk does not start at the window's edge"


@st.composite
def prefixes(draw, kind):
    length, tile = st.integers(1, 90), st.integers(3, 40)
    return Prefix(kind, draw(length), draw(length), draw(tile), draw(tile))


@st.composite
def neighborhoods(draw, rank):
    longest = {1: 120, 2: 18, 3: 7}[rank]
    axes = [(1, 1, 1, 1, 0, 1, 1)] * (3 - rank)
    for _ in range(rank):
        length = draw(st.integers(1, longest))
        dilation = draw(st.integers(1, length))
        window = draw(st.integers(1, length // dilation))
        axes.append(
            (
                length,
                window,
                draw(st.integers(1, window)),
                dilation,
                draw(st.integers(0, 1)),
                draw(st.integers(1, 9)),
                draw(st.integers(1, 9)),
            )
        )
    return Neighborhood(*zip(*axes, strict=True))


@pytest.mark.parametrize("kind", ["dense", "causal"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_prefix(kind, data):
    check(data.draw(prefixes(kind)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_neighborhood(rank, data):
    check(data.draw(neighborhoods(rank)))


if __name__ == "__main__":
    check(eval(sys.argv[1]))
