"""Attention of packed sequences against its definition, sequence by sequence and token by token."""

from unittest import mock

import pytest
import torch
from drawn_packed import PACKED
from gradient_oracle import gradients
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_cases import NAN, Packed, clean, in_pages

import sparse_fmha
from sparse_fmha import reference, varlen_attention

EMPTY = Packed(lengths=())
NO_TOKENS = Packed(lengths=((0, 0, 0), (0, 0, 0)))
NO_KEYS = Packed(lengths=((5, 0, 0), (70, 3, 0)), counts_used=True, after=2)
# Blocks of keys that all queries of a block see which are in a sequence.
FULL = Packed(lengths=((70, 400, 400),), before=5, after=20)
MANY = Packed(lengths=((1, 1, 1),) * 150, causal=True)


def by_lists(**given):
    """The way of CUDA tensors, on the CPU."""
    with mock.patch.object(sparse_fmha.varlen.sequences, "_runs_over_lists", return_value=True):
        return attend(**given)


def attend(**given):
    return varlen_attention(**given, return_lse=True)


WAYS = {"the op": attend, "block lists": by_lists}
ways = pytest.mark.parametrize("way", WAYS)


@ways
@settings(max_examples=40)
@given(case=PACKED, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@example(EMPTY, torch.float32)
@example(NO_TOKENS, torch.float32)
@example(NO_KEYS, torch.float32)
@example(MANY, torch.float32)
@example(FULL, torch.float32)
def test_every_sequence_is_attention(agrees, poisoned, way, case, dtype):
    given, mask = case.arguments(dtype)
    with poisoned():
        out, lse = WAYS[way](**given)
    agrees(out[None], lse[None], *clean(given["q"], given["k"], given["v"]), mask, case.scale)
    assert out[~case.held()].eq(0).all()
    assert lse[~case.held()].eq(-torch.inf).all()


@ways
@settings(max_examples=25)
@given(case=PACKED, parts=st.sampled_from(["out", "lse", "both"]))
@example(EMPTY, "both")
@example(NO_KEYS, "both")
@example(MANY, "both")
@example(FULL, "both")
def test_gradients(poisoned, way, case, parts):
    given, mask = case.arguments(torch.float64)
    inputs = [given[x].requires_grad_() for x in "qkv"]
    with poisoned():
        out, lse = WAYS[way](**given)
        dout = None if parts == "lse" else torch.randn_like(out)
        dlse = None if parts == "out" else torch.randn_like(lse)
        if dout is not None:
            dout[~case.held()] = NAN  # where nothing was computed
        if dlse is not None:
            dlse[lse == -torch.inf] = 0
            dlse[~case.held()] = NAN
        pairs = [(x, d) for x, d in ((out, dout), (lse, dlse)) if d is not None]
        outputs, of_outputs = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, inputs, of_outputs)
    if not mask.any():
        assert not any(x.any() for x in found)
        return
    known = {x: given[x].detach().nan_to_num(0) for x in "qkv"}
    clear = (None if x is None else x.nan_to_num(0) for x in (dout, dlse))
    expected = gradients("varlen", {**given, **known}, *clear)
    for name, gradient in zip("qkv", found, strict=True):
        # Summed with weights from a lse in fp32.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert found[0][~case.held()].eq(0).all()
    for gradient in found[1:]:
        assert gradient[~case.used_keys(given["seqused_k"])].eq(0).all()


@ways
@settings(max_examples=30)
@given(case=PACKED, page=st.sampled_from([1, 3, 16, 64]), missing=st.booleans())
@example(NO_KEYS, 4, False)
@example(EMPTY, 4, False)
@example(Packed(counts_used=True, causal=True), 16, True)
@example(Packed(lengths=((300, 700, 700), (1, 260, 250)), causal=True, counts_used=True), 64, True)
def test_pages(agrees, way, case, page, missing):
    given, mask = case.arguments()
    paged = in_pages(given, page)
    if missing:  # the second page of every sequence
        for b, first in enumerate(case.starts(1)[:-1].tolist()):
            if paged["page_table"].shape[1] > 1:
                paged["page_table"][b, 1] = 10**6
                # As many as there are; the keys of the next sequence have other queries.
                own = slice(int(case.starts(0)[b]), int(case.starts(0)[b + 1]))
                mask[own, first + page : first + 2 * page] = False
    out, lse = WAYS[way](**paged)
    agrees(out[None], lse[None], *clean(given["q"], given["k"], given["v"]), mask, case.scale)
    skipping, _ = WAYS[way](**paged, skip_threshold=1e-30)
    torch.testing.assert_close(skipping, out)


@ways
def test_pages_with_lengths_by_cu_k(way):
    given, _ = Packed().arguments()
    paged = in_pages(given, 16)
    paged |= {"cu_k": given["cu_k"], "seqused_k": None}
    torch.testing.assert_close(WAYS[way](**paged)[0], attend(**given)[0])


def test_thresholds_of_sequences_in_pages():
    given, _ = Packed(lengths=((70, 400, 400),) * 2).arguments()
    paged = in_pages(given, 16)
    plain = by_lists(**paged)[0]
    none_skipped = by_lists(**paged, skip_threshold=torch.zeros(2))[0]
    torch.testing.assert_close(none_skipped, plain)
    first = by_lists(**paged, skip_threshold=torch.tensor([0.99, 0.0]))[0]
    assert not first[:70].equal(plain[:70])
    torch.testing.assert_close(first[70:], plain[70:])


def test_block_lists_over_pages_have_no_gradient():
    paged = in_pages(Packed().arguments()[0], 16)
    paged["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward pass for keys in pages; call it"):
        by_lists(**paged)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_does_not_depend_on_others(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Packed(lengths=((40, 60, 60),) * 9 + ((200, 300, 300),), causal=True)
        given, _ = case.arguments()
        inputs = [given[x].requires_grad_() for x in "qkv"]
        together = attend(**given)
        found = torch.autograd.grad(together[0].sum(), inputs)
        for b in range(len(case.lengths)):
            rows, keys = (slice(*given[x][b : b + 2].tolist()) for x in ("cu_q", "cu_k"))
            alone = {
                **given,
                **{
                    x: given[x][own].detach()
                    for x, own in zip("qkv", (rows, keys, keys), strict=True)
                },
                **{f"cu_{x}": given[f"cu_{x}"][b : b + 2] - given[f"cu_{x}"][b] for x in "qk"},
            }
            own = [alone[x].requires_grad_() for x in "qkv"]
            out, lse = attend(**alone)
            assert out.equal(together[0][rows])
            assert lse.equal(together[1][rows])
            of_own = torch.autograd.grad(out.sum(), own)
            for x, y, part in zip(found, of_own, (rows, keys, keys), strict=True):
                assert x[part].equal(y)
    finally:
        torch.set_num_threads(before)


def test_starts_out_of_order_and_range():
    """A start below an earlier one counts as that one, and none lies outside."""
    given, _ = Packed(lengths=((10, 20, 20), (0, 0, 0), (30, 25, 25))).arguments()
    expected = attend(**given)
    given["cu_q"] = torch.tensor([-5, 10, 3, 90], dtype=torch.int32)
    given["cu_k"] = torch.tensor([-(2**31), 20, 20, 2**31 - 1], dtype=torch.int32)
    for way in WAYS.values():
        for a, b in zip(way(**given), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_keys_in_use_are_clamped():
    given, _ = Packed(lengths=((10, 20, 20), (30, 25, 0))).arguments()
    given["seqused_k"] = torch.tensor([1000, -7], dtype=torch.int32)
    for way in WAYS.values():
        out, lse = way(**given)
        assert out[:10].ne(0).all()
        assert out[10:].eq(0).all()
        assert lse[10:].eq(-torch.inf).all()


def with_sink(out, lse, sink):
    """By the definition: one more key of this score and the value 0, for all but empty rows."""
    total = torch.logsumexp(torch.stack(torch.broadcast_tensors(lse, sink.double())), 0)
    return out * (lse - total).exp()[..., None], total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sink(dtype):
    case = Packed(after=3, counts_used=True, causal=True)
    given, mask = case.arguments(dtype)
    sink = torch.tensor([0.5, -100, 30, -torch.inf])
    out, lse = attend(**given, sink=sink)
    q, k, v = clean(given["q"], given["k"], given["v"])
    exact = with_sink(*(x[0] for x in reference.attention(q, k, v, mask)), sink)
    held = case.held()
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    assert out.dtype == dtype
    torch.testing.assert_close(out[held], exact[0].nan_to_num(0)[held].to(dtype), **tolerance)
    torch.testing.assert_close(lse[held], exact[1].float()[held], rtol=1e-5, atol=1e-5)
    assert lse[~held].eq(-torch.inf).all()
    assert out[~held].eq(0).all()


def test_gradients_with_a_sink():
    case = Packed(after=3, causal=True)  # with queries that see no key
    given, mask = case.arguments(torch.float64)
    sink = torch.tensor([0.5, -2, 3, -torch.inf]).requires_grad_()
    inputs = [*(given[x].requires_grad_() for x in "qkv"), sink]
    out, lse = attend(**given, sink=sink)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    found = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    q, k, v = (x.detach().requires_grad_() for x in clean(*inputs[:3]))
    own = sink.detach().double().requires_grad_()
    plain, sums = (x[0] for x in reference.attention(q, k, v, mask))
    sees = (mask.any(-1) & case.held())[:, None]
    exact = with_sink(plain, sums.masked_fill(~sees, 0), own)
    total = torch.where(sees, exact[1], torch.where(case.held()[:, None], own, 0))
    loss = (exact[0] * dout).masked_fill(~sees[..., None], 0).sum()
    loss = loss + (total * dlse).masked_fill(lse == -torch.inf, 0).sum()
    expected = torch.autograd.grad(loss, (q, k, v, own))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.view(a.shape).to(a.dtype), rtol=1e-5, atol=1e-6)


def test_skipping():
    """Nothing at 0, and by thresholds of each sequence."""
    given, _ = Packed(lengths=((70, 400, 400),) * 2).arguments()
    given["k"][:200] *= 0.01  # far less than the keys that are visited first
    given["k"][200:400] *= 3
    given["k"][400:] = given["k"][:400]
    given["v"][400:] = given["v"][:400]
    given["q"][70:] = given["q"][:70]
    plain = attend(**given)
    several = torch.tensor([0.0, 0.5])
    out, lse = attend(**given, skip_threshold=several)
    assert not out[70:].equal(out[:70])
    torch.testing.assert_close(out[:70], plain[0][:70])
    one = attend(**given, skip_threshold=0.5)[0]
    assert one[70:].equal(out[70:])
    assert lse[70:].le(plain[1][70:] + 1e-5).all()


def test_results_go_to_out():
    case = Packed(after=2)
    given, _ = case.arguments()
    expected, lse = attend(**given)
    out = torch.full_like(expected, NAN)
    found = varlen_attention(**given, out=out, return_lse=True)
    assert found[0] is out
    assert out.equal(expected)
    assert found[1].equal(lse)


def test_strided_views():
    given, _ = Packed().arguments()
    expected = attend(**given)
    for name in "qkv":
        given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(attend(**given), expected, strict=True):
        assert a.equal(b)
