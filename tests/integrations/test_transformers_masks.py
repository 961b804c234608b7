"""Plans, pair by pair, against the dense masks that transformers makes of the same functions."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MistralConfig,
    MistralModel,
)
from transformers import masking_utils as hf
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_fmha.integrations import _transformers_masks as masks
from sparse_fmha.masks.block_lists import block_map


def dense(plan, batch, q_len, kv_len):
    """Bool `[batch, 1, q_len, kv_len]` of a plan."""
    keys = kv_len if plan.keys is None else plan.keys
    if plan.mask is not None:
        plan.mask.validate()
        seen = plan.mask.to_dense()
    else:
        q = torch.arange(q_len)[:, None] + keys - q_len
        k = torch.arange(keys)
        seen = torch.ones(1, 1, q_len, keys, dtype=torch.bool)
        if plan.causal or plan.window:
            seen = seen & (k <= q)
        if plan.window:
            seen = seen & (k > q - plan.window)
    seen = torch.nn.functional.pad(seen, (0, kv_len - keys))
    return seen.expand(batch, 1, q_len, kv_len)


def wanted(batch, q_len, kv_len, q_offset, kv_offset, function, padding):
    return hf.sdpa_mask(
        batch_size=batch,
        q_length=q_len,
        kv_length=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=padding,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=True,
        device="cpu",
    ).expand(batch, 1, q_len, kv_len)


def left_and_right(tokens):
    seen = torch.ones(3, tokens, dtype=torch.bool)
    seen[0, : tokens // 3] = False
    seen[1, tokens - tokens // 4 :] = False
    return seen


def holes(tokens):
    return torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)) < 0.7


def a_row_of_nothing(tokens):
    seen = left_and_right(tokens)
    seen[2] = False
    return seen


FUNCTIONS = {
    "causal": hf.causal_mask_function,
    "bidirectional": hf.bidirectional_mask_function,
    "window 40": hf.sliding_window_causal_mask_function(40),
    "window 1": hf.sliding_window_causal_mask_function(1),
    "window of all": hf.sliding_window_causal_mask_function(999),
    "bidirectional window": hf.sliding_window_bidirectional_mask_function(40),
    "two windows": hf.and_masks(
        hf.sliding_window_causal_mask_function(90), hf.sliding_window_causal_mask_function(50)
    ),
    "own": hf.or_masks(hf.causal_mask_function, lambda b, h, q, k: k < 30),
}
# Three entries: images of different lengths, one over several blocks; two with text between; none.
IMAGES = torch.full((3, 400), -1)
for place, image in {(0, 5, 20): 0, (0, 20, 295): 1, (1, 100, 140): 0, (1, 250, 299): 1}.items():
    IMAGES[place[0], place[1] : place[2]] = image
OVERLAY = getattr(hf, "blockwise_overlay", None)  # older versions have none
if OVERLAY:
    FUNCTIONS["images"] = hf.or_masks(hf.causal_mask_function, OVERLAY(IMAGES))
    FUNCTIONS["window or images"] = hf.or_masks(
        hf.sliding_window_causal_mask_function(40), OVERLAY(IMAGES)
    )
    FUNCTIONS["images in a window"] = hf.and_masks(
        FUNCTIONS["images"], hf.sliding_window_overlay(40)
    )
    FUNCTIONS["both windows"] = hf.and_masks(
        hf.sliding_window_overlay(150), FUNCTIONS["window or images"]
    )
LENGTHS = {  # q_len, kv_len, q_offset, kv_offset
    "prompt": (300, 300, 0, 0),
    "whole blocks": (256, 256, 0, 0),
    "behind a cache": (130, 300, 170, 0),
    "static cache": (150, 400, 0, 0),
    "static cache, second part": (150, 400, 70, 0),
    "sliding cache": (130, 200, 170, 100),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("padding", [None, left_and_right, holes, a_row_of_nothing])
def test_pairs(lengths, function, padding):
    q_len, kv_len, q_offset, kv_offset = LENGTHS[lengths]
    seen = padding and padding(q_offset + q_len)
    # The mask has what has been seen; behind it a cache is empty. sdpa_mask takes it as it is.
    arguments = (3, q_len, kv_len, q_offset, kv_offset, FUNCTIONS[function])
    plan = masks.plan(*arguments, attention_mask=seen)
    assert dense(plan, 3, q_len, kv_len).equal(wanted(*arguments, seen))


def packed(window=None):
    """The mask function that transformers makes in a model's call, other ones in other versions."""
    positions = torch.cat([torch.arange(50), torch.arange(140), torch.arange(110)])
    positions = torch.stack([positions, torch.arange(300)])
    made = []
    AttentionMaskInterface.register("captured", lambda **given: made.append(given["mask_function"]))
    AttentionInterface.register("captured", sdpa_attention_forward)
    config = MistralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=window,
        attn_implementation="captured",
    )
    tokens = torch.zeros(2, 300, dtype=torch.int64)
    MistralModel(config).eval()(tokens, position_ids=positions, use_cache=False)
    (function,) = made
    return function


@pytest.mark.parametrize("window", [None, 40, 130])
def test_packed_sequences(window, monkeypatch):
    monkeypatch.setattr(masks, "_evaluated", None)  # it is known, so all pairs are not evaluated
    arguments = (2, 300, 300, 0, 0, packed(window))
    plan = masks.plan(*arguments)
    assert dense(plan, 2, 300, 300).equal(wanted(*arguments, None))
    assert plan.special == ("packed sequences" if window is None else "a sliding window")


@pytest.mark.parametrize(
    "function",
    [name for name in FUNCTIONS if name not in ("own", "bidirectional window")],
)
def test_known_functions_are_not_evaluated(function, monkeypatch):
    """Another version of transformers may make them in another way, which this would show."""
    monkeypatch.setattr(masks, "_evaluated", None)
    masks.plan(3, 300, 300, mask_function=FUNCTIONS[function], attention_mask=holes(300))


UNREAD = ["own", "bidirectional window"]
if OVERLAY:
    FUNCTIONS["images and images"] = hf.and_masks(FUNCTIONS["images"], FUNCTIONS["images"])
    FUNCTIONS["images of padding"] = hf.or_masks(
        hf.padding_mask_function(holes(400)), OVERLAY(IMAGES)
    )
    UNREAD += ["images and images", "images of padding"]


@pytest.mark.parametrize("function", UNREAD)
def test_other_functions_are_not_read(function):
    assert masks.read(FUNCTIONS[function]) is None


def test_a_function_that_looks_like_one_of_theirs():
    def sliding_window_overlay(sliding_window):
        def inner_mask(b, h, q, k):
            return k >= q - sliding_window

        return inner_mask

    assert masks.read(sliding_window_overlay(4)) is None


@pytest.mark.skipif(OVERLAY is None, reason="this version of transformers has no such masks")
def test_blocks_of_images():
    """Blocks of other images are not listed, and those of one image are full."""
    images = torch.full((1, 640), -1)
    images[:, :100], images[:, 130:520] = 0, 1
    function = hf.or_masks(hf.causal_mask_function, OVERLAY(images))
    plan = masks.plan(1, 640, 640, mask_function=function)
    above = torch.zeros(5, 5, dtype=torch.bool)
    above[1:5, 1:5] = True
    assert plan.mask.blocks()[0, 0].equal(above | torch.ones(5, 5, dtype=torch.bool).tril())
    full = block_map(plan.mask.counts, plan.mask.indices, 5)[0, 0]
    assert full[2:4, 2:4].all()
    assert plan.special == "image tokens that see each other"
    text = hf.or_masks(hf.causal_mask_function, OVERLAY(torch.full((1, 640), -1)))
    assert masks.plan(1, 640, 640, mask_function=text) == masks.Plan(causal=True, keys=640)


def test_blocks_without_a_visible_pair_are_not_listed():
    seen = torch.ones(2, 512, dtype=torch.bool)
    seen[0, :256] = False
    mask = masks.plan(2, 512, 512, attention_mask=seen).mask
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    listed = mask.blocks()
    assert listed[1, 0].equal(lower)
    assert listed[0, 0].equal(lower & (torch.arange(4) >= 2))
    assert mask.partial_counts is None  # padding ends at a block's edge, and causal is the flag's


@pytest.mark.parametrize(
    ("padding", "runs", "special"),
    [
        (left_and_right, ((20, 60), (0, 45), (0, 60)), None),
        (a_row_of_nothing, ((20, 60), (0, 45), (0, 0)), None),
        (holes, None, "padding between tokens"),
    ],
)
def test_runs(padding, runs, special):
    plan = masks.plan(3, 60, 60, attention_mask=padding(60))
    assert (plan.runs, plan.special) == (runs, special)


def test_an_offset_that_is_a_tensor():
    """As of a static cache."""
    plan = masks.plan(1, 20, 60, q_offset=torch.tensor(30))
    assert plan == masks.Plan(causal=True, keys=50)
