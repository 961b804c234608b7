"""Capped scores of decode attention; drawn calls with a cap are in test_decode."""

import bias_oracle
import decode_cases
import pytest
import torch
from decode_oracle import expected
from softcap_cases import BAD

import sparse_fmha
from sparse_fmha import decode_attention

OPS = torch.ops.sparse_fmha
INF = float("inf")


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-8, 0.7, -25.0])
@pytest.mark.parametrize("softcap", [1e-40, 1e-3, 4.0, 1e6, 1e38])
def test_any_scale_and_cap_in_fp32(scale, softcap):
    """A large cap changes nothing, so small scores keep their digits."""
    call = decode_cases.draw(1, "all", 16, len_q=2, scale=scale, softcap=softcap)
    out, lse = decode_attention(**call, return_lse=True)
    exact = expected(call)
    torch.testing.assert_close(out.double(), exact.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-5, atol=1e-5)


def test_lse_of_one_key_is_its_capped_score():
    q = torch.linspace(-6, 6, 101, dtype=torch.float64)[:, None, None, None].repeat(1, 1, 1, 8)
    k = torch.ones(101, 1, 1, 8, dtype=torch.float64)
    ones = torch.ones(101, dtype=torch.int32)
    _, lse = decode_attention(q, k, k, ones, scale=0.25, softcap=3.0, return_lse=True)
    grown = (2 * (2 * q[:, 0, :, 0] / 3)).exp()
    torch.testing.assert_close(lse[:, 0].double(), 3 * (grown - 1) / (grown + 1))


def test_against_attention_over_all_keys():
    """Of the same cap; the last queries of a causal sequence."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16, dtype=torch.float64) for n, h in ((3, 4), (90, 2), (90, 2)))
    lengths = decode_cases.int32([90, 90])
    whole = sparse_fmha.attention(q, k, v, causal=True, softcap=1.0, return_lse=True)
    found = decode_attention(q, k, v, lengths, softcap=1.0, return_lse=True)
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [2.0, 3, 0])
def test_a_sink_is_not_capped(softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 16) for n, h in ((1, 4), (70, 2), (70, 2)))
    sink = torch.tensor([0.5, 8.0, -torch.inf, 30.0])
    found = decode_attention(
        q, k, v, decode_cases.int32([70, 70]), softcap=softcap, sink=sink, return_lse=True
    )
    mask = torch.ones(1, 70, dtype=torch.bool)
    wanted = bias_oracle.attend(q, k, v, mask, sink=sink, softcap=softcap)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_without_a_cap_nothing_changes(form):
    call = decode_cases.draw(2, form, 16, len_q=2)
    wanted = decode_attention(**call)
    assert decode_attention(**call, softcap=0.0).equal(wanted)
    assert decode_attention(**call, softcap=0).equal(wanted)
    assert not decode_attention(**call, softcap=0.5).equal(wanted)


@pytest.mark.parametrize("page", [None, 16])
def test_votes_are_over_capped_scores(page):
    """Tiles far below the largest score are kept if a narrow cap brings them near it."""
    call = decode_cases.loud_tiles(page, dtype=torch.float64)
    skipped = []
    for softcap in (0.0, 0.5, 1e6):
        given = {**call, "softcap": softcap}
        out, stats = decode_attention(**given, return_stats=True)
        exact = expected(given)
        torch.testing.assert_close(out, exact.out)
        assert stats.skipped.equal(exact.skipped)
        skipped.append(stats.skipped.sum().item())
    assert skipped == [48, 0, 48]  # six tiles of ten, of four requests' two heads


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("into_out", [False, True])
def test_bad_caps_are_named(bad, into_out):
    value, kind, message = BAD[bad]
    call = decode_cases.draw(3, "all")
    call |= {"out": torch.empty_like(call["q"])} if into_out else {}
    with pytest.raises(kind, match=message) as error:
        decode_attention(**call, softcap=value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("value", [-1.0, INF])
def test_the_raw_op_names_bad_caps(value):
    call = decode_cases.draw(3, "all")
    with pytest.raises(RuntimeError, match="sparse_fmha: softcap must be finite and at least 0"):
        OPS.decode(**call, softcap=value)


def test_a_scale_that_is_symbolic():
    """The op's version for such scales takes the cap, too."""
    torch._dynamo.reset()
    call = decode_cases.draw(4, "all", 16)
    compiled = torch.compile(
        lambda scale: decode_attention(**call, scale=scale, softcap=0.5),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for scale in (0.3, 1.7):
        assert compiled(scale).equal(decode_attention(**call, scale=scale, softcap=0.5))
