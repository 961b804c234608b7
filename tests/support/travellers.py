"""Objects that follow their tensors, drawn for the tests: masks, grids, layouts, plans."""

import block_masks
import stripe_masks
import torch
from hypothesis import strategies as st

from sparse_fmha import BlockGrid
from sparse_fmha.patterns import (
    AnchorResult,
    BiFormerLayout,
    BiFormerPacking,
    CubeOrder,
    LightForcingLayout,
    ModalityOrder,
    RegionOrder,
)

try:
    from transformers import masking_utils

    from sparse_fmha.integrations.transformers import plan
except ImportError:
    plan = None

regions = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(torch.tensor)


@st.composite
def grids(draw):
    lengths = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    blocks = draw(st.sampled_from([64, 128])), draw(st.sampled_from([16, 32, 64, 128]))
    return BlockGrid(*lengths, *blocks, causal=draw(st.booleans()))


@st.composite
def anchor_results(draw):
    batch, length, heads = (draw(st.integers(1, 3)) for _ in range(3))
    lse = torch.randn(batch, length, heads)
    kept = torch.ones(batch, heads, 1, dtype=torch.int32)
    recall = lse.exp() if draw(st.booleans()) else None
    return AnchorResult(torch.randn(batch, length, heads, 8), lse, kept, recall)


@st.composite
def plans(draw):
    """What `plan` makes of causal masks, sliding windows, and padding of any kind."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(2, 300))
    function = masking_utils.causal_mask_function
    if draw(st.booleans()):
        function = masking_utils.sliding_window_causal_mask_function(draw(st.integers(1, 300)))
    real = torch.ones(batch, length, dtype=torch.bool)
    start, stop = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
    real[draw(st.integers(0, batch - 1)), start:stop] = False
    return plan(batch, length, length, mask_function=function, attention_mask=real)


KINDS = {
    "block mask": block_masks.drawn().map(lambda drawn: drawn.mask()),
    "stripe mask": stripe_masks.drawn().map(lambda drawn: drawn.mask()),
    "block grid": grids(),
    "region order": st.builds(RegionOrder, regions, st.integers(1, 9)),
    "BiFormer's layout": st.builds(BiFormerLayout, regions),
    "BiFormer's packing": st.builds(BiFormerPacking, regions),
    "cube order": st.builds(
        CubeOrder,
        st.tuples(*[st.integers(1, 9)] * 3),
        st.just((4, 4, 4)),
        before=st.integers(0, 70),
        after=st.integers(0, 70),
    ),
    "Light Forcing's layout": st.builds(
        lambda own, before, frame: LightForcingLayout(own * frame, (own + before) * frame, frame),
        st.integers(1, 3),
        st.integers(0, 4),
        st.integers(1, 200),
    ),
    "modality order": st.builds(ModalityOrder, regions, keys_too=st.booleans()),
    "anchor's result": anchor_results(),
}
if plan is not None:
    KINDS["plan"] = plans()


def assert_same(found, wanted):
    """Equal in all that they hold, whatever that is."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.device) == (wanted.dtype, wanted.device)
        assert found.equal(wanted)
    elif hasattr(wanted, "__dict__"):
        assert vars(found).keys() == vars(wanted).keys()
        for name, value in vars(wanted).items():
            assert_same(getattr(found, name), value)
    else:
        assert found == wanted


def tensors(value):
    """All tensors that an object holds, at any depth."""
    if isinstance(value, torch.Tensor):
        return [value]
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for each in held for tensor in tensors(each)]
