"""Decode attention against its definition, on drawn calls, lengths and lists."""

import decode_cases
import pytest
import torch
from decode_oracle import expected
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha import decode_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def run(call, poison=True, **changes):
    """out and lse, over an `out` that holds NaN."""
    call = {**call, **changes}
    if poison:
        call["out"] = torch.full_like(call["q"], torch.nan)
    return decode_attention(**call, return_lse=True)


def check(call, **changes):
    """At most twice the error of plain torch in the same dtype, and what rounding makes of it."""
    __tracebackhide__ = True
    out, lse = run(call, **changes)
    call = {**call, **changes}
    exact, eager = expected(call), expected(call, call["q"].dtype)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=2e-6, atol=1e-5)
    assert out.isfinite().all()
    accumulator = torch.promote_types(out.dtype, torch.float32)
    largest = exact.out.abs().max().item() if out.numel() else 0
    size = 1 + exact.lse.nan_to_num(0, 0, 0).abs().max().item() if out.numel() else 0
    floor = 2 * torch.finfo(out.dtype).eps * largest + 4 * torch.finfo(accumulator).eps * size
    error = (out.double() - exact.out).abs()
    allowed = 2 * (eager.out.double() - exact.out).abs().max() + floor if out.numel() else 0
    assert error.le(allowed).all(), (error.max(), allowed)
    empty = exact.lse == -torch.inf
    assert out[empty].eq(0).all()


@settings(max_examples=100, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    form=st.sampled_from(decode_cases.FORMS),
    page=st.sampled_from([None, 1, 2, 7, 16, 33, 64, 128]),
    len_q=st.sampled_from([1, 1, 2, 3, 5, 16]),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (5, 1), (8, 2)]),
    dim=st.sampled_from([8, 24, 64]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(decode_cases.LAYOUTS),
    by_head=st.booleans(),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 5, 70]),
    scale=st.sampled_from([None, -0.3]),
    softcap=st.sampled_from([0.0, 0.0, 0.3, 2.0, 30.0]),
    split_tokens=st.sampled_from([None, 64, 128]),
)
def test_drawn(seed, **options):
    check(decode_cases.draw(seed, **options))


@pytest.mark.parametrize("dim", [8, 40, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(dim, dtype):
    check(decode_cases.draw(3, "all", page=16, heads=(6, 2), dim=dim, dtype=dtype, len_q=2))


@pytest.mark.parametrize("heads", [(16, 1), (7, 1), (12, 4), (70, 1)], ids=str)
@pytest.mark.parametrize("len_q", [1, 4, 33])
def test_packed_rows(heads, len_q):
    call = decode_cases.draw(4, "all", page=32, heads=heads, len_q=len_q, rows=130, batch=2)
    check(call, split_tokens=64)
    group = heads[0] // heads[1]
    wide = {name: call[name].repeat_interleave(group, 2) for name in ("k_cache", "v_cache")}
    torch.testing.assert_close(run(call), run({**call, **wide}))


@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_lengths_around_pages(form):
    page = 16
    lengths = [0, 1, page - 1, page, page + 1, 3 * page - 1, 3 * page, 1000]
    batch = len(lengths)
    check(decode_cases.draw(5, form, page, batch=batch, rows=48, len_q=2, lengths=lengths))


@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_no_keys_and_no_requests(form):
    call = decode_cases.draw(7, form, page=8, len_q=2)
    none = torch.zeros_like(call["seq_lens"])
    out, lse = run(call, seq_lens=none)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    out, lse = run(call, page_table=torch.full_like(call["page_table"], -1))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    call = {name: call[name] for name in ("q", "k_cache", "v_cache", "page_table", "seq_lens")}
    nobody = {name: call[name][:0] for name in ("q", "page_table", "seq_lens")}
    assert run({**call, **nobody})[0].shape == (0, *call["q"].shape[1:])
    nothing = {name: call[name][:, :0] for name in ("k_cache", "v_cache")}
    assert run({**call, **nothing})[0].eq(0).all()


@pytest.mark.parametrize("entry", [-1, 5])
def test_pages_beside_the_cache_are_not_its_own(entry):
    memory = torch.randn(2, 7, 16, 2, 16)
    k_cache, v_cache = memory[:, 1:6].unbind()
    q, lengths = torch.randn(1, 1, 4, 16), decode_cases.int32([48])
    table = decode_cases.int32([[3, entry, 0]])
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "seq_lens": lengths}
    check({**call, "page_table": table})
    tokens = decode_cases.int32([*range(16), *range(32, 48)]).reshape(1, 1, 1, 32)
    without = run({**call, "page_table": table.clamp(0, 4), "tokens": (tokens, None)})
    for got, wanted in zip(run({**call, "page_table": table}), without, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("len_q", [1, 3, 16, 40])
def test_trees(len_q):
    generator = torch.Generator().manual_seed(len_q)
    call = decode_cases.draw(8, "all", page=16, len_q=len_q, rows=100)
    call["tree_mask"] = decode_cases.bits_of_trees(generator, 4, len_q)
    decode_cases.fill(call, generator)
    check(call)
    check(call, split_tokens=64)
    line = torch.ones(len_q, len_q).tril().bool().expand(4, -1, -1)
    words = torch.nn.functional.pad(line, (0, -len_q % 32)).unflatten(-1, (-1, 32)).long()
    packed = (words << torch.arange(32)).sum(-1)
    packed = packed - (packed >= 2**31).long() * 2**32
    causal = run(call, tree_mask=None)
    for got, wanted in zip(run(call, tree_mask=packed.to(torch.int32)), causal, strict=True):
        assert got.equal(wanted)


def test_drafts_that_nobody_sees_may_hold_nan():
    call = decode_cases.draw(12, "all", page=16, len_q=5, rows=100, lengths=[100, 5, 66, 40])
    tree = decode_cases.int32([0b00001, 0b00011, 0b00101, 0b00001, 0b00001]).reshape(1, 5, 1)
    decode_cases.clear(call)
    call["tree_mask"] = tree.repeat(4, 1, 1)
    decode_cases.fill(call, torch.Generator().manual_seed(5))
    check(call)


@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_sinks(form):
    call = decode_cases.draw(9, form, heads=(4, 2), len_q=3)
    sink = torch.tensor([0.5, -2.0, -torch.inf, 30.0])
    check(call, sink=sink)
    check(call, sink=torch.stack((sink, sink), 1)[:, 0])
    out, lse = run(call, sink=sink, seq_lens=torch.zeros_like(call["seq_lens"]))
    assert out.eq(0).all()
    assert lse.equal(sink.expand_as(lse))
    plain, lse = run(call)
    weight = torch.sigmoid(lse - sink).where(lse.isfinite(), 0)
    torch.testing.assert_close(run(call, sink=sink)[0], plain * weight[..., None])


def test_new_keys_of_later_queries_are_hidden():
    call = decode_cases.draw(10, "all", len_q=4, rows=90, lengths=[90, 64, 4, 65])
    together = run(call)
    for i in range(4):
        one = {**call, "q": call["q"][:, i : i + 1], "seq_lens": call["seq_lens"] - 3 + i}
        for got, wanted in zip(run(one), together, strict=True):
            torch.testing.assert_close(got, wanted[:, i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["blocks", "tokens"])
def test_an_entry_that_is_there_twice_counts_twice(form):
    call = decode_cases.draw(11, "all", rows=64, batch=1, lengths=[64])
    if form == "blocks":
        call["blocks"] = decode_cases.int32([[[3, 1, 3]]]), decode_cases.int32([[3]]), 16
    else:
        call["tokens"] = decode_cases.int32([[[[5, 60, 5, 5]]]]), None
    check(call)
