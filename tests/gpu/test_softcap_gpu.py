"""Capped scores on the GPU: every mechanism, with and without a bias of keys, and what raises."""

from dataclasses import replace

import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import CASES, LARGE
from softcap_cases import CAPS, check
from threshold_cases import LISTS, limited

import sparse_fmha

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# One of each way to find and load keys.
MECHANISMS = ["dense", "causal", "1-D", "2-D, dilation", "blocks 64x64, causal", "stripes"]
mechanisms = pytest.mark.parametrize("name", MECHANISMS)
dims = pytest.mark.parametrize("dim", [64, 128, 256])


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_errors_are_at_most_twice_those_of_torch(cuda, name, dtype, dim):
    """out, lse and gradients; caps take turns."""
    softcap = CAPS[(list(LARGE).index(name) + dim // 32) % len(CAPS)]
    check(LARGE[name], LARGE[name].arguments(dtype, cuda, dim) | {"softcap": softcap})


@dims
@pytest.mark.parametrize("softcap", CAPS)
@mechanisms
def test_with_a_bias_of_keys(cuda, name, softcap, dim):
    """And its gradient, which is that of the capped scores."""
    form = FORMS[(MECHANISMS.index(name) + dim // 64) % 4]
    case, arguments = biased(LARGE[name], form, BF16, device=cuda, dim=dim)
    assert "key_bias" in check(case, arguments | {"softcap": softcap})


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("name", LISTS)
def test_with_thresholds_of_rows(cuda, name, softcap):
    case, arguments = limited(CASES[name], dtype=BF16, device=cuda, dim=128)
    check(case, arguments | {"softcap": softcap})


@dims
@mechanisms
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-8, 0.7, -2.5])
def test_any_scale(cuda, name, scale, dim):
    case = replace(LARGE[name], scale=scale)
    check(case, case.arguments(BF16, cuda, dim) | {"softcap": 5.0})


@dims
@mechanisms
def test_caps_of_any_size_are_finite(cuda, name, dim):
    arguments = LARGE[name].arguments(BF16, cuda, dim)
    plain = LARGE[name].forward(arguments)
    for softcap in (1e-40, 1e-3, 1e4, 1e38):
        out, lse = LARGE[name].forward(arguments | {"softcap": softcap})
        assert out.isfinite().all()
        assert lse.isnan().sum() == 0
        if softcap > 1:  # it changes nothing but the last digits of a score
            torch.testing.assert_close(out, plain[0], rtol=2e-2, atol=2e-2)


@dims
@mechanisms
def test_runs_give_the_same_bits(cuda, name, dim):
    arguments = LARGE[name].arguments(BF16, cuda, dim) | {"softcap": 5.0}
    out, lse = LARGE[name].forward(arguments)
    first = LARGE[name].backward(arguments, out, lse, torch.ones_like(out))
    for _ in range(5):
        assert LARGE[name].forward(arguments)[0].equal(out)
        again = LARGE[name].backward(arguments, out, lse, torch.ones_like(out))
        assert all(again[n].equal(x) for n, x in first.items())


def test_what_raises(cuda, make_qkv):
    q, k, v = make_qkv(1, 128, 128, 2, 2, 64)
    message = "softcap runs on the CPU and where key_bias does: .* with skipping, with key_bias"
    with pytest.raises(NotImplementedError, match=message):
        sparse_fmha.attention(q, k, v, softcap=5.0, skip_threshold=0.1)
    for arch in {row["arch"] for row in sparse_fmha.kernels()} & {"sm80", "sm86"}:
        with (
            sparse_fmha.arch_override(arch),
            pytest.raises(NotImplementedError, match=f"softcap runs on .* arch={arch}"),
        ):
            sparse_fmha.attention(q, k, v, softcap=5.0)
