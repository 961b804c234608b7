"""The steps in which a rank gets keys, and what it computes with those of each step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from sparse_fmha.distributed import _masks
from sparse_fmha.distributed._shards import Shards, Span

HALF = 128  # queries; halves are multiples of it
# Some of a rank's tokens: slices, or the indices of them.
Rows = tuple[slice, ...] | Tensor


@dataclass(frozen=True)
class Piece:
    """One call: some of a rank's queries, and some of a step's keys."""

    rows: slice
    keys: slice
    causal: bool = False
    mask: _masks.Mask | None = None


@dataclass(frozen=True)
class Step:
    """Keys that are exchanged together. The first step has a rank's own keys, without exchange.

    Attributes:
        sent: for each rank, the keys of this one that it gets.
        received: for each rank, the number of keys that come from it. They lie in rank order.
        pieces: what is computed with the keys.
    """

    sent: tuple[Rows, ...] = ()
    received: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()


def distances(world: int, steps: int | None) -> list[range]:
    """How far the ranks are that a rank receives from in each step: that many before it."""
    others = world - 1
    count = others if steps is None else min(steps, others)
    edges = [1 + others * i // count for i in range(count + 1)] if count else []
    return [range(first, last) for first, last in itertools.pairwise(edges)]


@functools.lru_cache(maxsize=64)
def dense(
    queries: Shards, keys: Shards, rank: int, causal: bool, steps: int | None
) -> tuple[Step, ...]:
    """The steps of attention without lists. Keys that no query of a rank sees are not sent to it.

    Args:
        queries, keys: the tokens of each rank.
        causal: query i sees key j only if `j <= i + keys.length - queries.length`.
        steps: see `distances`.
    """
    world = queries.world
    offset = keys.length - queries.length if causal else None
    own = queries.spans[rank]
    if causal and queries == keys and own:
        # Local positions are in the order of global ones.
        everything = slice(0, queries.lengths[rank])
        found = [Step(pieces=(Piece(everything, everything, causal=True),))]
    else:
        found = [Step(pieces=tuple(pieces(own, keys.spans[rank], offset)))]
    for group in distances(world, steps):
        to = {(rank + distance) % world for distance in group}
        sent = tuple(
            _local(keys.spans[rank], seen(queries, keys, other, rank, offset))
            if other in to else () for other in range(world)
        )  # fmt: skip
        sources = sorted((rank - distance) % world for distance in group)
        spans = {source: seen(queries, keys, rank, source, offset) for source in sources}
        received = tuple(sum(b - a for a, b in spans.get(other, ())) for other in range(world))
        buffer = [span for source in sources for span in spans[source]]
        if _exchanged(queries, keys, group, offset):
            found.append(Step(sent, received, tuple(pieces(own, buffer, offset))))
    return tuple(found)


def seen(queries: Shards, keys: Shards, rank: int, source: int, offset: int | None) -> list[Span]:
    """The keys of `source` that queries of `rank` see; of all of these if offset is None."""
    if not queries.spans[rank]:
        return []
    if offset is None:
        return list(keys.spans[source])
    limit = queries.spans[rank][-1][1] + offset
    return [(start, min(stop, limit)) for start, stop in keys.spans[source] if start < limit]


def pieces(queries: Iterable[Span], keys: Iterable[Span], offset: int | None) -> list[Piece]:
    """The calls for all visible pairs of queries and keys, each pair in one of them.

    Args:
        queries, keys: positions, which lie one after the other in a rank's tensors.
        offset: query i sees key j only if `j <= i + offset`; all if None.
    """
    found: list[Piece] = []
    placed = list(_placed(keys))
    for span, row in _placed(queries):
        row_pieces: list[Piece] = []
        for key_span, key in placed:
            for piece in _cell(span, row, key_span, key, offset):
                _add_joined(row_pieces, piece)
        for piece in row_pieces:
            _add_joined(found, piece)
    return found


def halves(found: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Two parts of a step's calls: if there is one, about half of its queries in each."""
    if len(found) != 1:
        return found[:1], found[1:]
    (piece,) = found
    rows = piece.rows.stop - piece.rows.start
    unit = HALF if piece.mask is None else piece.mask.block_q
    cut = rows // 2 // unit * unit
    if not cut:
        return found, ()
    return (_of_rows(piece, 0, cut),), (_of_rows(piece, cut, rows),)


def _of_rows(piece: Piece, start: int, stop: int) -> Piece:
    """The call for some of a call's queries."""
    rows, keys = (part.stop - part.start for part in (piece.rows, piece.keys))
    lists = None if piece.mask is None else _masks.query_rows(piece.mask, start, stop)
    if lists is not None:
        keys = lists.kv_len
    elif piece.causal:
        keys = _masks.visible_keys(stop, rows, keys)
    first, key = piece.rows.start, piece.keys.start
    return Piece(
        slice(first + start, first + stop), slice(key, key + keys), piece.causal, lists
    )  # fmt: skip


def _cell(span: Span, row: int, keys: Span, key: int, offset: int | None) -> Iterator[Piece]:
    """At most two calls for one span of queries and one of keys, at these local places."""
    (first, last), (start, stop) = span, keys
    everything = slice(key, key + stop - start)
    if offset is None:
        yield Piece(slice(row, row + last - first), everything)
        return
    begin = max(first, start - offset)  # the first query that sees a key
    if begin < last and begin + offset + 1 < stop:
        # These see the keys up to a diagonal that ends at the last of them.
        end = min(last, stop - offset)
        aligned = slice(key, key + end + offset - start)
        yield Piece(slice(row + begin - first, row + end - first), aligned, causal=True)
        begin = end
    if begin < last:
        yield Piece(slice(row + begin - first, row + last - first), everything)


def _add_joined(found: list[Piece], piece: Piece) -> None:
    """Adds a call, together with the one before it if both are one rectangle."""
    if found and not found[-1].causal:
        before = found[-1]
        if before.rows == piece.rows and before.keys.stop == piece.keys.start:
            found[-1] = replace(piece, keys=slice(before.keys.start, piece.keys.stop))
            return
        if not piece.causal and before.keys == piece.keys and before.rows.stop == piece.rows.start:
            found[-1] = replace(piece, rows=slice(before.rows.start, piece.rows.stop))
            return
    found.append(piece)


def _placed(spans: Iterable[Span]) -> Iterator[tuple[Span, int]]:
    """Spans with the local place of each."""
    place = 0
    for start, stop in spans:
        yield (start, stop), place
        place += stop - start


def _local(own: Iterable[Span], wanted: list[Span]) -> tuple[slice, ...]:
    """Where the wanted beginnings of a rank's own spans are."""
    stops = dict(wanted)
    found: list[slice] = []
    for (start, _), place in _placed(own):
        if start in stops:
            part = slice(place, place + stops[start] - start)
            if found and found[-1].stop == part.start:
                found[-1] = slice(found[-1].start, part.stop)
            else:
                found.append(part)
    return tuple(found)


def _exchanged(queries: Shards, keys: Shards, group: range, offset: int | None) -> bool:
    """Whether any rank receives keys in a step; all ranks agree, as all must call a collective."""
    world = queries.world
    return any(
        seen(queries, keys, rank, (rank - distance) % world, offset)
        for rank in range(world) for distance in group
    )  # fmt: skip
