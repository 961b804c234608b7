"""Drawn packed sequences, for Hypothesis."""

from hypothesis import strategies as st
from packed_cases import Packed

_sizes = st.integers(0, 4) | st.integers(0, 200)


@st.composite
def _lengths(draw):
    keys = draw(_sizes)
    return draw(_sizes), keys, draw(st.integers(0, keys))


PACKED = st.builds(
    lambda heads, **rest: Packed(heads=heads[0], heads_kv=heads[1], **rest),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    lengths=st.lists(_lengths(), max_size=5).map(tuple),
    before=st.integers(0, 3),
    after=st.sampled_from([0, 1, 70]),
    dim=st.sampled_from([8, 24]),
    causal=st.booleans(),
    counts_used=st.booleans(),
    scale=st.sampled_from([None, -0.4]),
)
