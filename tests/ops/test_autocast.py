"""The raw ops follow torch.autocast as the public functions do."""

import pytest
import torch

OPS = torch.ops.sparse_fmha


def attention(q, k, v):
    return OPS.fmha_fwd(q, k, v, causal=True)


def neighborhood(q, k, v):
    return OPS.neighborhood_fwd(q, k, v, [5], [2], [1], [0], extra_k=k[:, :3], extra_v=v[:, :3])


both = pytest.mark.parametrize("op", [attention, neighborhood])


@pytest.fixture
def qkv(randn):
    return [randn(2, 40, heads, 16, seed=heads) for heads in (4, 2, 2)]


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_result_is_that_of_the_cast_inputs(qkv, op, dtype):
    q, k, v = qkv[0], qkv[1].half(), qkv[2].bfloat16()
    expected = op(*(x.to(dtype) for x in (q, k, v)))
    with torch.autocast("cpu", dtype):
        results = op(q, k, v)
        assert torch.is_autocast_enabled("cpu"), "the caller's autocast goes on"
        assert (q @ q.mT).dtype == dtype
    assert results[0].dtype == dtype
    assert results[1].dtype == torch.float32
    for result, wanted in zip(results, expected, strict=True):
        assert result.equal(wanted)


@both
def test_fp64_stays(qkv, op):
    wide = [x.double() for x in qkv]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = op(*wide)
    assert out.equal(op(*wide)[0])


@both
def test_disabled_autocast_changes_nothing(qkv, op):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        out, _ = op(*qkv)
    assert out.equal(op(*qkv)[0])
