"""Pictures of masks: what they say and that nothing that is listed is lost in them."""

import numpy as np
import pytest
import torch

from sparse_fmha import BlockMask, StripeMask
from sparse_fmha.plotting import blocks


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that a mask draws: left and right axes, and the figure."""

    def draw(mask, **place):
        figures = []
        make = blocks.figure
        monkeypatch.setattr(blocks, "figure", lambda *a: figures.append(make(*a)) or figures[0])
        mask.plot(tmp_path / "a.png", **place)
        (figure,) = figures
        return *figure.axes, figure

    return draw


def bars(axes):
    found = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in axes.patches}
    return {round(place): height for place, height in found.items() if height}


def test_block_mask(drawn):
    blocks_seen = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    blocks_seen[0, 1, :, 1:] = False
    mask = BlockMask.from_blocks(blocks_seen, 512, 512, causal=True)
    left, right, figure = drawn(mask, head=1)
    assert figure.get_suptitle() == "BlockMask: 512 queries, 512 keys, causal"
    assert left.get_title() == (
        "batch 0, head 1: 25.0% of key blocks listed\n(40.0% of those that causality leaves)"
    )
    assert (right.get_xlabel(), right.get_ylabel()) == ("key blocks listed", "query blocks")
    assert right.get_title() == "lengths of the lists of all heads"
    assert bars(right) == {1: 5, 2: 1, 3: 1, 4: 1}
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "not listed",
        "full",
        "partial",
    ]


def test_stripe_mask(drawn):
    columns = torch.arange(0, 3000, 3, dtype=torch.int32)
    lone = torch.tensor([7], dtype=torch.int32)
    indices = torch.stack([columns, torch.cat([lone, columns[1:]])])[None, None]
    counts = torch.tensor([[[1000, 1]]], dtype=torch.int32)
    mask = StripeMask(indices, counts, 128, 3000, 64)
    left, right, figure = drawn(mask)
    assert figure.get_suptitle() == "StripeMask: 128 queries, 3000 keys"
    assert right.get_xlabel() == "keys listed"
    assert [text.get_text() for text in figure.legends[0].texts] == ["not listed", "listed"]
    picture = np.asarray(left.images[0].get_array())
    assert picture.shape == (2, 375)  # 8 keys in a pixel
    assert picture[0].all()
    assert picture[1].nonzero()[0].tolist() == [0]
    assert list(left.images[0].get_extent()) == [-0.5, 2999.5, 1.5, -0.5]


def test_one_length_is_a_narrow_bar(drawn):
    mask = BlockMask.from_blocks(torch.ones(1, 1, 4, 1, dtype=torch.bool), 512, 128)
    _, right, _ = drawn(mask)
    first, last = right.get_xlim()
    assert bars(right) == {1: 4}
    assert all(bar.get_width() <= (last - first) / 10 for bar in right.patches)


@pytest.mark.parametrize("length", [1, 400, 401, 999, 5000])
def test_nothing_is_lost_where_entries_are_joined(length):
    kinds = torch.zeros(1, length, dtype=torch.int32)
    for place in (0, length // 3, length - 1):
        one = kinds.clone()
        one[0, place] = 2
        joined = blocks._joined(one, 1)
        assert joined.shape[1] <= 400
        (pixel,) = joined[0].nonzero()[:, 0].tolist()
        size = length / joined.shape[1]
        assert pixel * size <= place < (pixel + 1) * size
