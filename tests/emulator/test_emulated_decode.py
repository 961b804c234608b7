"""Decode kernels on the emulator against their definition, key by key."""

import decode_cases
import pytest
import torch
from decode_oracle import assert_as_good_as_eager, expected, tanh_error

from sparse_fmha import decode_attention

BF16 = torch.bfloat16
CAPS = (0.7, 5.0, 50.0)
# Forms of keys with pages, groups of heads, layouts and splits that take turns.
CALLS = [
    {"form": "all", "heads": (4, 2)},
    {"form": "all", "page": 16, "len_q": 3, "heads": (8, 1), "layout": "heads first"},
    {"form": "all", "page": 64, "by_head": True, "window": 70, "split_tokens": 64},
    {"form": "blocks", "heads": (4, 2), "len_q": 2},
    {"form": "blocks", "page": 16, "layout": "halves", "split_tokens": 128},
    {"form": "tokens", "page": 1},
    {"form": "tokens by query", "page": 16, "len_q": 3, "heads": (3, 3)},
    {"form": "spans", "page": 128, "len_q": 5, "heads": (16, 1), "causal": False},
    {"form": "spans", "heads": (4, 2), "scale": -0.3},
]
ids = [" ".join(f"{k}={v}" for k, v in call.items()) for call in CALLS]


def check(call):
    __tracebackhide__ = True
    given = {**call, "out": torch.full_like(call["q"], torch.nan)}
    out, lse = decode_attention(**given, return_lse=True)
    assert_as_good_as_eager(call, out, lse, 1e-4 + tanh_error(call))


@pytest.mark.parametrize("call", CALLS, ids=ids)
def test_drawn(arch, call):
    for seed in range(2):
        check(decode_cases.draw(seed, rows=200, dim=64, dtype=BF16, **call))


@pytest.mark.parametrize("place", range(len(CALLS)), ids=ids)
def test_capped(arch, place):
    """Caps that change scores much, some and hardly, in both kernels of Hopper."""
    softcap = CAPS[place % 3]
    call = decode_cases.draw(place, rows=200, dim=64, dtype=BF16, **CALLS[place])
    for factor in (1, 4):
        check(call | {"q": call["q"] * factor, "softcap": softcap})


@pytest.mark.parametrize("dim", [40, 128, 256])
def test_capped_at_other_head_dims(arch, dim):
    for softcap, len_q in ((5.0, 1), (0.7, 9)):
        call = decode_cases.draw(3, "blocks", 16, len_q, rows=200, dim=dim, dtype=BF16)
        check(call | {"softcap": softcap})


def test_any_scale_and_cap(arch):
    """Caps far above all scores change nothing, and those far below leave no differences."""
    call = decode_cases.draw(4, "all", rows=100, dim=64, dtype=BF16, lengths=[100, 1, 65, 40])
    for scale, softcap in ((0.0, 1e38), (1e-30, 1.0), (0.1, 1e-40), (0.1, 1e38), (1e20, 3.0)):
        check(call | {"scale": scale, "softcap": softcap})


def test_a_dtype_without_kernels_is_named_with_a_cap_too(arch):
    call = decode_cases.draw(4, "all", dim=64)
    with pytest.raises(NotImplementedError, match=r"no kernel for .*pass=decode.* dtype=float32"):
        decode_attention(**call, softcap=5.0)


@pytest.mark.parametrize("form", ["all", "blocks", "spans"])
def test_many_keys_and_few_rows(arch, form):
    """On Hopper up to eight blocks of a cluster share a head; one may have no keys."""
    for heads, len_q, window in (((4, 2), 1, None), ((3, 3), 2, 70)):
        call = decode_cases.draw(
            7, form, 16 if form != "spans" else None, len_q, heads=heads, window=window,
            rows=1100, dim=64, dtype=BF16,
        )  # fmt: skip
        check(call)
        check(call | {"softcap": 2.0})


def test_other_head_dims(arch):
    for dim in (40, 128):
        check(decode_cases.draw(3, "blocks", 16, rows=200, dim=dim, dtype=BF16))


@pytest.mark.parametrize("options", [{}, {"skip_threshold": 0.0}], ids=["all", "skipping"])
@pytest.mark.parametrize("page", [None, 16])
def test_values_that_lie_in_another_order_than_keys(arch, page, options):
    call = decode_cases.draw(6, "all", page, rows=200, dim=64, dtype=BF16)
    call["v_cache"] = call["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    assert call["v_cache"].stride() != call["k_cache"].stride()
    check(call | options)


def test_tree_and_sink(arch):
    call = decode_cases.draw(5, "all", 16, len_q=4, rows=200, dim=64, dtype=BF16, lengths=[90] * 4)
    bits = [0b0001, 0b0011, 0b0101, 0b1011]  # each new key sees itself and its ancestors
    call["tree_mask"] = torch.tensor(bits, dtype=torch.int32).expand(4, 4)[..., None].contiguous()
    sink = torch.randn(4, generator=torch.Generator().manual_seed(5))
    check({**call, "causal": True, "sink": sink})


@pytest.mark.parametrize(("page", "softcap"), [(None, 0.0), (16, 0.0), (16, 15.0)])
@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_skipping(arch, form, page, softcap):
    """The same tiles are skipped as in the definition."""
    options = {"lengths": [700, 690, 699, 500], "scale": 0.6, "split_tokens": 192}
    options["softcap"] = softcap
    call = decode_cases.draw(1, form, page, rows=700, dim=64, dtype=BF16, **options)
    call["skip_threshold"] = torch.tensor([0.0, 0.02, 0.2, 0.9])
    given = {**call, "out": torch.full_like(call["q"], torch.nan)}
    out, lse, stats = decode_attention(**given, return_lse=True, return_stats=True)
    exact = expected(call)
    assert stats.visited.equal(exact.visited)
    assert stats.skipped.equal(exact.skipped)
    error = 1e-4 + tanh_error(call)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=2e-6, atol=error)
    assert (out.double() - exact.out).abs().max() <= 8 * 2**-8 * exact.out.abs().max()
