"""Which tokens of a sequence each rank has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from sparse_fmha.distributed import _deal

Span = tuple[int, int]


@dataclass(frozen=True)
class Shards:
    """The tokens of each rank, as spans of positions in the sequence.

    A rank holds the tokens of its spans one after the other. Ranks may have different numbers of
    tokens, and none.

    Attributes:
        spans: for each rank its spans `(start, stop)`, ascending, with `start < stop`. Together the
            ranks have every position once.

    Raises:
        ValueError: a span is empty or out of order, or positions are missing or there twice.
    """

    spans: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        for rank, spans in enumerate(self.spans):
            edges = [edge for span in spans for edge in span]
            if any(start >= stop for start, stop in spans) or edges != sorted(edges):
                raise ValueError(
                    f"spans of rank {rank} must be ascending and not empty, got {list(spans)}"
                )
        expected = 0
        for start, stop in sorted(span for spans in self.spans for span in spans):
            if start != expected:
                raise ValueError(
                    f"spans must have every position once, got {start} after {expected} tokens"
                )
            expected = stop

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.spans)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return sum(self.lengths)

    @staticmethod
    def of_lengths(lengths: Iterable[int]) -> Shards:
        """Rank after rank, each with the given number of tokens."""
        edges = [0, *accumulate(lengths)]
        return Shards(tuple(_joined([edge]) for edge in pairwise(edges)))

    @staticmethod
    def even(length: int, world: int, unit: int = 1) -> Shards:
        """Rank after rank, with lengths that differ by at most one unit of tokens.

        Args:
            length: tokens of the sequence.
            world: number of ranks.
            unit: spans start at multiples of it, such as the block size of a mask.
        """
        edges = _edges(length, world, unit)
        return Shards(tuple(_joined([edge]) for edge in pairwise(edges)))

    @staticmethod
    def zigzag(length: int, world: int, unit: int = 1) -> Shards:
        """The order of `zigzag_shard`, also for lengths that do not divide.

        Args:
            length, world, unit: see `even`.
        """
        chunks = list(pairwise(_edges(length, 2 * world, unit)))
        last = 2 * world - 1
        return Shards(tuple(_joined([chunks[r], chunks[last - r]]) for r in range(world)))

    @staticmethod
    def balanced(
        weights: Sequence[float], length: int, world: int, *, unit: int, chunks: int | None = None
    ) -> Shards:
        """Spreads chunks of the sequence so that the ranks have about the same weight.

        Every rank gets the same number of chunks, which are equally long up to one unit. Chunks are
        given out from the heaviest on, each to the rank with the least weight so far that still
        takes one.

        Args:
            weights: of each unit of tokens, such as `row_weights(mask)`.
            length, world: see `even`.
            unit: tokens of a weight, such as the mask's block_q; the last may be shorter.
            chunks: of each rank. Default: the first of 1, 2, 4, 8 and 16 with which the heaviest
                rank has at most 1.02 times the mean weight, else the best of these.

        Raises:
            ValueError: the number of weights is not that of units.
        """
        units = -(-length // unit)
        if len(weights) != units:
            raise ValueError(
                f"weights must have one entry for each of the {units} units, got {len(weights)}"
            )
        numbers = (1, 2, 4, 8, 16) if chunks is None else (chunks,)
        best, least = None, float("inf")
        for number in numbers:
            found = _spread(weights, length, world, unit, number)
            most = max(found.weights(weights, unit))
            if most < least:
                best, least = found, most
            if most * world <= 1.02 * sum(weights):
                break
        assert best is not None, "weights are numbers"
        return best

    def split(self, parts: int) -> Shards:
        """Shards of `parts` times as many ranks, which have the tokens of each in even parts."""
        found: list[tuple[Span, ...]] = []
        for spans, length in zip(self.spans, self.lengths, strict=True):
            for first, last in pairwise(_edges(length, parts, 1)):
                found.append(_within(spans, first, last))
        return Shards(tuple(found))

    def weights(self, weights: Sequence[float], unit: int) -> list[float]:
        """The weight of each rank; `weights` are those of units, as in `balanced`."""
        sums = [0.0, *accumulate(weights)]
        return [
            sum(sums[-(-stop // unit)] - sums[start // unit] for start, stop in spans)
            for spans in self.spans
        ]


def _edges(length: int, parts: int, unit: int) -> list[int]:
    """Where parts start and end: multiples of the unit, and the length."""
    units = -(-length // unit)
    return [min(units * i // parts * unit, length) for i in range(parts + 1)]


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorts spans, leaves out empty ones and joins neighbors."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def _within(spans: Sequence[Span], first: int, last: int) -> tuple[Span, ...]:
    """The positions of a rank's tokens `[first, last)`."""
    found, place = [], 0
    for start, stop in spans:
        begin = start + max(first - place, 0)
        end = min(stop, start + last - place)
        found.append((begin, max(begin, end)))
        place += stop - start
    return _joined(found)


def _spread(weights: Sequence[float], length: int, world: int, unit: int, chunks: int) -> Shards:
    spans = list(pairwise(_edges(length, world * chunks, unit)))
    sums = [0.0, *accumulate(weights)]
    heavy = [sums[-(-stop // unit)] - sums[start // unit] for start, stop in spans]
    return Shards(
        tuple(_joined(spans[i] for i in own) for own in _deal.dealt(heavy, world, chunks))
    )
