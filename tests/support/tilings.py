"""Drawn neighborhoods, and what the kernel's walks and the reference's masks say of them."""

import itertools
import math

from hypothesis import strategies as st

from sparse_fmha import _C, reference


@st.composite
def problems(draw, longest=((1, 90), (2, 14), (3, 7))):
    """(grid, window, stride, dilation, causal) with three axes, and how many of them are used."""
    rank, length = draw(st.sampled_from(longest))
    axes = [(1, 1, 1, 1, 0)] * (3 - rank)
    for _ in range(rank):
        tokens = draw(st.integers(1, length))
        dilation = draw(st.integers(1, tokens))
        window = draw(st.integers(1, tokens // dilation))
        stride = draw(st.integers(1, window))
        axes.append((tokens, window, stride, dilation, draw(st.integers(0, 1))))
    return tuple(zip(*axes, strict=True)), rank


def extents(largest=9):
    return st.tuples(*[st.integers(1, largest)] * 3)


def walks(problem, shape):
    """(partial, full) of every query tile, as the kernel walks."""
    bound = _C.walks.Neighborhood(*problem, *shape)
    return [bound.walk(i)[:2] for i in range(bound.num_query_tiles())]


def token_mask(problem, rank):
    grid, window, stride, dilation, causal = (values[3 - rank :] for values in problem)
    mask = reference.neighborhood_mask(grid, window, stride, dilation, list(map(bool, causal)))
    return mask.reshape(math.prod(grid), -1).numpy()


def powers(rows, limits):
    sides = [1 << n for n in range(rows.bit_length())]
    boxes = itertools.product(*[[s for s in sides if s <= limit] for limit in limits])
    return [box for box in boxes if math.prod(box) == rows]
