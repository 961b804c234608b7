"""Calibration of a running model: which calls are measured, and which are passed over."""

import math

import pytest
import torch

import sparse_fmha
from sparse_fmha.calibration import Calibration
from sparse_fmha.integrations._layers import skip


class Layer(torch.nn.Module):
    """One head of each kind of call."""

    def forward(self, x):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        y = sdpa(x, x, x, is_causal=True)
        y = y + sdpa(x, x, x, attn_mask=torch.ones(x.shape[-2], x.shape[-2]).bool())
        y = y + sdpa(x[:, :, -1:], x, x)
        x = x.transpose(1, 2)
        return y.transpose(1, 2) + sparse_fmha.attention(x, x, x, causal=True, skip_threshold=0.1)


def test_collecting_from_a_model():
    model, found = Layer(), Calibration()
    inputs = [
        torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (90, 200)
    ]
    plain = [model(x) for x in inputs]
    collector = found.collect(lambda x: plain.append(model(x)), inputs)
    for a, b in zip(plain[:2], plain[2:], strict=True):
        assert a.equal(b)
    assert collector.measured == 6
    assert collector.passed_over == {"a mask tensor": 2}
    assert {(p.phase, p.length) for p in found.points} == {
        (phase, n) for phase in ("prefill", "decode") for n in (90, 200)
    }
    direct = Calibration()
    q = inputs[1].transpose(1, 2)
    direct.add(q, q, causal=True)
    assert [p for p in found.points if p.length == 200][:20] == direct.points
    model(inputs[0])
    assert collector.measured == 6  # outside, nothing is seen


def test_a_model_without_calls():
    with pytest.raises(ValueError, match=r"no attention call was measured$"):
        Calibration().collect(torch.nn.Identity(), [torch.zeros(1)], progress=False)
    x = torch.zeros(1, 1, 8, 16)
    with pytest.raises(
        ValueError, match="no attention call was measured; passed over: 1 with a mask"
    ):
        Calibration().collect(
            lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, x.new_zeros(8, 8)),
            [x],
            progress=False,
        )


PASSED_OVER = [
    ((2, 50, 12), {}, "head dim of q must be a multiple of 8 from 8 to 256, got 12"),
    ((2, 50, 512), {}, "head dim of q must be a multiple of 8 from 8 to 256, got 512"),
    ((2, 50, 16), {"attn_mask": torch.zeros(50, 50)}, "a mask tensor"),
    ((5, 2, 50, 16), {}, "query must have 3 or 4 dimensions, as many as query, got 5"),
    ((2, 50, 16), {"scale": math.inf}, "scale must be a finite number, got inf"),
]


@pytest.mark.parametrize(("shape", "options", "reason"), PASSED_OVER)
def test_calls_that_are_passed_over(shape, options, reason):
    """They return what they do without."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    found = Calibration()
    with found.collecting() as collector:
        out = sdpa(x, x, x, **options)
    torch.testing.assert_close(out, sdpa(x, x, x, **options), rtol=0, atol=0, equal_nan=True)
    assert (collector.measured, collector.passed_over) == (0, {reason: 1})
    assert not found.points


def test_calls_that_raise_are_not_measured():
    x, found = torch.randn(1, 2, 20, 16), Calibration()
    with found.collecting() as collector:
        with pytest.raises(RuntimeError, match="dropout probability has to be between 0 and 1"):
            torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=1.5)
        with pytest.raises(ValueError, match="k must have q's head dim, 16, got 8"):
            sparse_fmha.attention(x, x[..., :8], x)
    assert (collector.measured, found.points) == (0, [])


def test_dropout_and_gradients_do_not_change_scores():
    x, found = torch.randn(1, 2, 20, 16, requires_grad=True), Calibration()
    with found.collecting() as collector:
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        out.sum().backward()
    assert collector.measured == 1
    assert x.grad.ne(0).any()


def test_compiled_calls_are_reported():
    torch.compiler.reset()
    x, found = torch.randn(1, 2, 20, 16), Calibration()
    model = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    with found.collecting() as collector:
        model(x)
        model(x)
    torch.compiler.reset()
    assert collector.measured == 0
    assert collector.passed_over == {"inside torch.compile, counted when it was compiled": 4}


@pytest.mark.parametrize("found", [Calibration(), Calibration([("prefill", 9, 0.1, 0.05, 0)])])
def test_no_usable_point(found, tmp_path):
    """Each use says so; what is saved can be read and collected into."""
    for use in (
        lambda: found.fit(),
        lambda: found.threshold_for(0.5, 1000),
        lambda: skip(sparsity=0.5, calibration=found),
    ):
        with pytest.raises(
            ValueError,
            match="a fit needs at least two different points of prefill with 10% to 90% of",
        ):
            use()
    found.save(tmp_path / "empty.json")
    again = Calibration.load(tmp_path / "empty.json")
    assert again.points == found.points
    again.collect(Layer(), [torch.randn(1, 2, 90, 16)], progress=False)
    assert len(again.points) > len(found.points)
