"""CPU code of every instruction set that this machine has: attention, gradients and votes.

The other tests of the CPU run the best set alone.
"""

from contextlib import contextmanager

import pytest
import torch
from gradient_cases import LARGE
from gradient_rule import assert_as_good_as_torch, output_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from skip_cases import inputs

import sparse_fmha
from sparse_fmha import reference

_C = pytest.importorskip("sparse_fmha._C")
ISAS = _C.cpu_isas()
isas = pytest.mark.parametrize("isa", ISAS)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextmanager
def limited_to(isa):
    before = _C.set_cpu_isa(isa)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


def test_sets_of_this_cpu():
    assert ISAS[0] == "baseline"
    assert set(ISAS) <= set(sparse_fmha.build_info()["cpu_isas"])
    with limited_to("baseline"):
        assert _C.set_cpu_isa("baseline") == "baseline"
    with pytest.raises(ValueError, match=r"name must be .*baseline.*, got avx9"):
        _C.set_cpu_isa("avx9")


@isas
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_drawn(isa, data, poisoned, agrees):
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    dim = 8 * data.draw(st.integers(1, 32), label="dim / 8")
    len_q, len_kv = (data.draw(st.integers(1, 200), label=of) for of in ("len_q", "len_kv"))
    causal = data.draw(st.booleans(), label="causal")
    scale = data.draw(st.sampled_from([None, 0.3, -0.2]), label="scale")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))

    def randn(length, heads):
        shape = 1, length, heads, dim
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    q, k, v = randn(len_q, 2), randn(len_kv, 1), randn(len_kv, 1)
    with limited_to(isa), poisoned():
        out, lse = sparse_fmha.attention(q, k, v, causal=causal, scale=scale, return_lse=True)
    visible = reference.causal_mask(len_q, len_kv) if causal else torch.tensor(True)
    agrees(out, lse, q, k, v, visible, scale)


@isas
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_every_mechanism(name, dtype, isa, poisoned):
    """Gradients, which the outputs' errors reach as well."""
    case = LARGE[name]
    arguments = case.arguments(dtype, dim=72)
    with limited_to(isa), poisoned():
        out, lse = case.forward(arguments)
        dout, _ = output_gradients(out, lse)
        found = case.backward(arguments, out, lse, dout)
    assert_as_good_as_torch(case, arguments, found, dout, lse)
    with limited_to("baseline"):
        plain, plain_lse = case.forward(arguments)
    torch.testing.assert_close(lse, plain_lse, rtol=2e-6, atol=1e-5)
    # The weights are rounded too where products have 16 bits.
    unit = torch.finfo(dtype).eps
    values = arguments["v"].abs().max().item()
    torch.testing.assert_close(out, plain, rtol=4 * unit, atol=max(1e-5, unit * values))


@isas
@dtypes
def test_results_do_not_depend_on_threads(dtype, isa):
    case = LARGE["causal"]
    arguments = case.arguments(dtype, dim=72)
    threads = torch.get_num_threads()
    found = []
    try:
        with limited_to(isa):
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                out, lse = case.forward(arguments)
                dout, dlse = output_gradients(out, lse)
                found.append(case.backward(arguments, out, lse, dout, dlse))
    finally:
        torch.set_num_threads(threads)
    for gradients in found[1:]:
        assert all(gradients[of].equal(found[0][of]) for of in "qkv")


@isas
@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_tiles_are_skipped(causal, dtype, isa):
    q, k, v = (x.to(dtype) for x in inputs(dim=72))

    def run(isa):
        with limited_to(isa):
            return sparse_fmha.attention(
                q, k, v, causal=causal, skip_threshold=0.1, return_stats=True
            )[1]

    found, plain = run(isa), run("baseline")
    assert found.visited.equal(plain.visited)
    assert found.skipped.equal(plain.skipped)
    assert found.skipped.sum() > 0


@isas
@dtypes
def test_gradients_leave_out_what_the_forward_pass_skipped(dtype, isa):
    """Votes that rounding decides: each batch entry has its threshold where the second of its two
    tiles, which is that of the first keys, is as large as it."""
    batch, rows, tile, dim = 64, 64, 80, 64
    generator = torch.Generator().manual_seed(3)

    def randn(length):
        shape = batch, length, 1, dim
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    q, k, v = randn(rows).to(dtype), randn(2 * tile), randn(2 * tile).to(dtype)
    k[:, :tile] *= 0.25
    k = k.to(dtype)
    scores = torch.einsum("bqhd,bkhd->bqk", q.double(), k.double()) * dim**-0.5
    above = (scores[..., :tile].amax(-1) - scores[..., tile:].amax(-1)).amax(-1)
    assert (above < 0).all()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with limited_to(isa):
        out, stats = sparse_fmha.attention(
            q, k, v, skip_threshold=above.exp().float(), return_stats=True
        )
        out.sum().backward()
    skipped = stats.skipped[:, 0] > 0
    assert skipped.any()
    assert not skipped.all()
    gone = v.grad[:, :tile].abs().amax((1, 2, 3)) == 0
    assert gone.equal(skipped)
