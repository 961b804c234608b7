"""flash_attn_with_kvcache against SDPA of each request."""

import inspect

import bias_oracle
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparse_fmha import reference
from sparse_fmha.integrations import flash_attn
from sparse_fmha.integrations.flash_attn import flash_attn_with_kvcache

# As published with version 2 of flash_attn.
SIGNATURE = (
    "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
    "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False)"
)
LENGTHS = [30, 0, 17]  # before the new keys
ROWS, PAGE = 48, 16


def problem(layout, new=3, seed=0):
    """The arguments, and the keys and values of each request with the new ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, (k, v) = normal(3, new, 4, 16), normal(2, 3, new, 2, 16)
    whole = [normal(2, n, 2, 16) for n in LENGTHS]
    given = {"q": q, "k": k, "v": v}
    given["cache_seqlens"] = torch.tensor(LENGTHS, dtype=torch.int32)
    caches = torch.full((2, 3, ROWS, 2, 16), torch.nan, dtype=torch.float64)
    for b, keys in enumerate(whole):
        caches[:, b, : LENGTHS[b]] = keys
    if layout == "entries":  # those of a larger batch, in another order
        order = torch.tensor([4, 0, 2])
        larger = torch.full((2, 5, ROWS, 2, 16), torch.nan, dtype=torch.float64)
        larger[:, order] = caches
        caches, given["cache_batch_idx"] = larger, order.int()
    elif layout == "pages":
        table = torch.randperm(11, generator=generator)[:9].view(3, 3)
        pages = torch.full((2, 11, PAGE, 2, 16), torch.nan, dtype=torch.float64)
        pages[:, table] = caches.unflatten(2, (3, PAGE))
        caches, given["block_table"] = pages, table.int()
    given["k_cache"], given["v_cache"] = caches.unbind()
    expected = [torch.cat([x, torch.stack([k[b], v[b]])], 1) for b, x in enumerate(whole)]
    return given, expected


def by_sdpa(q, expected, seen):
    """seen(distance, key) says whether a query sees a key."""
    outs = []
    for rows, (k, v) in zip(q, expected, strict=True):
        at = torch.arange(len(k))
        apart = at - torch.arange(len(rows))[:, None] - (len(k) - len(rows))
        mask = seen(apart, at)
        heads_first = (x.transpose(0, 1) for x in (rows, k, v))
        outs.append(sdpa(*heads_first, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(0, 1))
    return torch.stack(outs)


@pytest.mark.parametrize("layout", ["contiguous", "entries", "pages"])
@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, lambda apart, at: apart < 99),
        ({"causal": True}, lambda apart, at: apart <= 0),
        ({"causal": True, "window_size": (5, 4)}, lambda apart, at: (apart <= 0) & (apart >= -5)),
        ({"window_size": (5, -1)}, lambda apart, at: apart >= -5),
        ({"window_size": (-1, 0), "num_splits": 1}, lambda apart, at: apart <= 0),
    ],
)
def test_against_sdpa(layout, options, seen):
    given, expected = problem(layout)
    out, lse = flash_attn_with_kvcache(
        **given, **options, softmax_scale=0.3, return_softmax_lse=True
    )
    torch.testing.assert_close(out, by_sdpa(given["q"], expected, seen))
    assert lse.shape == (3, 4, 3)
    # The new keys are in the caches: a call without them agrees.
    del given["k"], given["v"]
    given["cache_seqlens"] = given["cache_seqlens"] + 3
    assert flash_attn_with_kvcache(**given, **options, softmax_scale=0.3).equal(out)


@pytest.mark.parametrize("layout", ["contiguous", "pages"])
def test_capped_scores(layout):
    given, expected = problem(layout)
    out = flash_attn_with_kvcache(**given, softmax_scale=0.3, causal=True, softcap=0.5)
    for b, (k, v) in enumerate(expected):
        mask = reference.causal_mask(3, len(k))
        wanted, _ = bias_oracle.attend(
            given["q"][b : b + 1], k[None], v[None], mask, 0.3, softcap=0.5
        )
        torch.testing.assert_close(out[b : b + 1], wanted)


def test_keys_that_are_padding():
    given, expected = problem("contiguous")
    pad = torch.tensor([7, 0, 3], dtype=torch.int32)
    out = flash_attn_with_kvcache(**given, causal=True, softmax_scale=0.3, cache_leftpad=pad)
    parts = [x[:, int(n) :] for x, n in zip(expected, pad, strict=True)]
    torch.testing.assert_close(out, by_sdpa(given["q"], parts, lambda apart, at: apart <= 0))


def test_lengths_that_are_a_number_or_all_rows():
    q, (k, v) = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 20, 2, 16)
    whole = flash_attn_with_kvcache(q, k, v)
    assert whole.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=20))
    part = flash_attn_with_kvcache(q, k, v, cache_seqlens=9)
    assert part.equal(flash_attn_with_kvcache(q, k[:, :9], v[:, :9]))


def test_a_new_key_without_a_page():
    given, _ = problem("pages")
    given["block_table"][1] = -1
    with pytest.raises(IndexError):
        flash_attn_with_kvcache(**given)


def test_the_signature_is_that_of_flash_attn():
    found = inspect.signature(flash_attn_with_kvcache)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    assert text == SIGNATURE
    assert set(flash_attn.__all__) == {"flash_attn_varlen_func", "flash_attn_with_kvcache"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": -30.0}, "softcap must be at least 0, got -30.0"),
        ({"rotary_cos": torch.zeros(1)}, "rotary_cos must be None, got Tensor"),
        ({"alibi_slopes": torch.zeros(1)}, "alibi_slopes must be None, got Tensor"),
        ({"num_splits": 4}, "num_splits must be 0 or 1, got 4"),
        ({"v": None}, "k and v must be given together"),
        ({"cache_seqlens": None}, "cache_seqlens must be given with k and v"),
        ({"window_size": (3, 2)}, "window_size must have a right bound of -1 or 0"),
        ({"block_table": torch.zeros(1), "cache_batch_idx": torch.zeros(1)}, "must be None with"),
    ],
)
def test_what_is_refused(options, message):
    given, _ = problem("contiguous")
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**{**given, **options})
