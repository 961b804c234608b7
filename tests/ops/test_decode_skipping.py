"""Decode attention that skips tiles of keys, against a walk over the tiles in Python."""

import decode_cases
import pytest
import torch
from decode_oracle import expected

from sparse_fmha import decode_attention

FORMS = pytest.mark.parametrize("form", decode_cases.FORMS)


def run(call, **changes):
    return decode_attention(**{**call, **changes}, return_lse=True, return_stats=True)


@FORMS
@pytest.mark.parametrize("split_tokens", [None, 64, 192])
@pytest.mark.parametrize(("page", "softcap"), [(None, 0.0), (16, 0.0), (16, 20.0)])
def test_the_same_tiles_are_skipped(form, page, softcap, split_tokens):
    call = decode_cases.draw(
        *(20, form, page),
        **dict(len_q=2, rows=700, dtype=torch.float64, lengths=[700, 690, 699, 1000]),
        **dict(scale=1.2, window=600, softcap=softcap),
    )
    threshold = torch.tensor([0.0, 0.02, 0.2, 0.9])
    call |= {"skip_threshold": threshold, "split_tokens": split_tokens}
    out, lse, stats = run(call)
    wanted = expected(call)
    assert stats.visited.equal(wanted.visited)
    assert stats.skipped.equal(wanted.skipped)
    torch.testing.assert_close(out, wanted.out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=2e-6, atol=1e-5)
    if split_tokens == 64:
        assert stats.skipped.eq(0).all()
    elif form == "all":
        assert stats.skipped.sum() > 0


def test_rows_of_64_vote_together():
    call = decode_cases.draw(21, "all", len_q=12, heads=(16, 2), rows=700, dtype=torch.float64)
    call |= {"scale": 2.0, "skip_threshold": 0.9}
    wanted = expected(call)
    out, _, stats = run(call)
    assert wanted.visited.sum() > wanted.skipped.sum() > 0
    assert stats.skipped.equal(wanted.skipped)
    assert stats.visited.equal(wanted.visited)
    torch.testing.assert_close(out, wanted.out, rtol=1e-10, atol=1e-10)


def loud_first_tile(rows=256):
    """Keys whose first tile outweighs the others; one request, one head."""
    call = decode_cases.draw(22, "all", rows=rows, heads=(2, 1), batch=1, lengths=[rows])
    call["k_cache"][:, :64] = 9 * call["q"][:, :, :1].sign()
    call["k_cache"][:, 64:] *= 0.01
    call["q"][:, :, 1] = call["q"][:, :, 0]
    return call


def test_values_of_skipped_tiles_are_not_read():
    call = loud_first_tile()
    first = run(call, seq_lens=decode_cases.int32([64]))
    call["v_cache"][:, 64:] = torch.nan
    out, lse, stats = run(call, skip_threshold=0.01)
    assert stats.visited.tolist() == [[4]]
    assert stats.skipped.tolist() == [[3]]
    assert stats.sparsity.tolist() == [[0.75]]
    assert out.equal(first[0])
    assert lse.equal(first[1])


def test_the_first_tile_of_a_split_is_kept():
    call = loud_first_tile(rows=512)
    counts = {n: run(call, skip_threshold=0.01, split_tokens=n)[2].skipped.item()
              for n in (64, 128, 256, 512, 1024)}  # fmt: skip
    assert counts == {64: 0, 128: 1, 256: 3, 512: 7, 1024: 7}


@FORMS
def test_a_threshold_of_0_is_dense(form):
    call = decode_cases.draw(23, form, page=16, len_q=2)
    out, lse = decode_attention(**call, return_lse=True)
    counted, counted_lse, stats = run(call)
    assert counted.equal(out)
    assert counted_lse.equal(lse)
    assert stats.skipped.eq(0).all()
    assert stats.visited.equal(expected(call).visited)


def test_thresholds_of_requests_are_clamped():
    call = decode_cases.draw(24, "all", rows=700, lengths=[700] * 4, scale=1.5)
    odd = torch.tensor([torch.nan, -1.0, 1.0, 5.0])
    plain = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24])
    results = [run(call, skip_threshold=threshold) for threshold in (odd, plain)]
    assert results[0][0].equal(results[1][0])
    assert results[0][2].skipped.equal(results[1][2].skipped)
    assert results[0][2].skipped[2:].sum() > 0
