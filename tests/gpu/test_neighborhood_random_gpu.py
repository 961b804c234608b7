"""neighborhood_attention on the GPU: drawn configurations, all options mixed."""

import pytest

pytest.importorskip("hypothesis")

import torch  # noqa: F401  a configuration is repeated by evaluating what was printed
from hypothesis import given, settings
from hypothesis import strategies as st
from neighborhoods import (
    DTYPES,
    Case,
    axes_reversed,
    contiguous,
    crop,
    every_other_head,
    heads_first,
    laid_out,
    unaligned,
    wide_head_dim,
)

pytestmark = pytest.mark.gpu

LAYOUTS = [contiguous, heads_first, axes_reversed, every_other_head, wide_head_dim, crop, unaligned]
LONGEST = {1: 2000, 2: 50, 3: 13}


@st.composite
def cases(draw, rank):
    grid, window, stride, dilation = [], [], [], []
    for _ in range(rank):
        grid.append(draw(st.integers(1, LONGEST[rank])))
        fits = [
            d
            for d in (1, 1, 1, 2, 3, 4, 7, 8, 9, 11, 16, grid[-1] // 2, grid[-1])
            if 0 < d <= grid[-1]
        ]
        dilation.append(draw(st.sampled_from(fits)))
        window.append(draw(st.integers(1, grid[-1] // dilation[-1])))
        stride.append(draw(st.just(1) | st.integers(1, window[-1])))
    heads_kv = draw(st.integers(1, 3))
    return Case(
        tuple(grid),
        tuple(window),
        tuple(stride),
        tuple(dilation),
        tuple(draw(st.booleans()) for _ in range(rank)),
        extra=draw(st.just(0) | st.integers(1, 300)),
        batch=draw(st.integers(1, 4)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        dim=8 * draw(st.integers(1, 32)),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.none() | st.floats(-1, 1, width=32)),
    )


# Other configurations in every run; what fails is printed, with the command that repeats it where
# tests/conftest.py is loaded.
@settings(max_examples=200, deadline=None, derandomize=False, print_blob=True)
@given(case=st.integers(1, 3).flatmap(cases), layout=st.sampled_from(LAYOUTS))
def test_drawn(tensors, check, case, layout):
    check(case, laid_out(layout, tensors(case)))
