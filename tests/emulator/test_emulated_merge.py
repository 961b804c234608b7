"""The merge of parts on the emulator, against its definition in fp64."""

import pytest
import torch

from sparse_fmha import merge


def parts_of(count, shape, dtype):
    """A row without keys in any part, and rows without keys in some, which hold NaN."""
    generator = torch.Generator().manual_seed(count)
    outs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    lses = [3 * torch.randn(shape[:-1], generator=generator) for _ in range(count)]
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        none = torch.zeros(shape[:-1], dtype=torch.bool)
        none[:, 0], none[:, n % shape[1]] = True, True
        lse.masked_fill_(none, -torch.inf)
        out.masked_fill_(none[..., None], torch.nan)
    return outs, lses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 32])
@pytest.mark.parametrize(
    ("dim", "heads"), [(128, slice(None)), (128, slice(1, 3)), (72, slice(None)), (13, slice(1, 3))]
)
def test_parts(count, dim, heads, dtype):
    outs, lses = parts_of(count, (2, 5, 4, dim), dtype)
    outs, lses = [x[:, :, heads] for x in outs], [x[:, :, heads] for x in lses]
    weights = torch.stack(lses).double().exp()
    share = (weights / weights.sum(0)).nan_to_num(0)
    exact = sum(w[..., None] * x.double().nan_to_num(0) for w, x in zip(share, outs, strict=True))
    out, lse = merge(outs, lses)
    first = outs[0].clone()
    lse_too = torch.ops.sparse_fmha.merge_into(first, outs[1:], lses)
    eps = max(2 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=eps)
    torch.testing.assert_close(lse.double(), weights.sum(0).log(), rtol=1e-6, atol=1e-6)
    assert first.equal(out)
    assert lse_too.equal(lse)


def test_dtypes_without_a_kernel():
    part = torch.zeros(1, 3, 2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"float16, bfloat16 or float32 on CUDA, got float64"):
        torch.ops.sparse_fmha.merge([part], [torch.zeros(1, 3, 2)])
