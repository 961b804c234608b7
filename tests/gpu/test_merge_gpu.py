"""`merge` on GPUs: one kernel, against the definition in fp64."""

import importlib

import pytest
import torch

from sparse_fmha import merge

pytestmark = pytest.mark.gpu
merging = importlib.import_module("sparse_fmha.merge")  # the package's name is the function's
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6}


def draw(device, parts, shape, dtype):
    """Rows without keys in some parts, which hold NaN there, and in all."""
    generator = torch.Generator(device).manual_seed(parts)
    options = {"generator": generator, "device": device}
    outs = [torch.randn(shape, **options).to(dtype) for _ in range(parts)]
    lses = [3 * torch.randn(shape[:-1], **options) for _ in range(parts)]
    for out, lse in zip(outs, lses, strict=True):
        none = torch.rand(shape[:-1], **options) < 0.2
        none[:, 0] = True
        lse.masked_fill_(none, -torch.inf)
        out.masked_fill_(none[..., None], torch.nan)
    return outs, lses


def assert_merged(found, outs, lses):
    weights = torch.stack(lses).double().exp()
    share = (weights / weights.sum(0)).nan_to_num(0)
    exact = sum(w[..., None] * x.double().nan_to_num(0) for w, x in zip(share, outs, strict=True))
    eps = EPS[outs[0].dtype]
    torch.testing.assert_close(found[0].double(), exact, rtol=eps, atol=eps)
    torch.testing.assert_close(found[1].double(), weights.sum(0).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("parts", [1, 2, 3, 32])
@pytest.mark.parametrize("shape", [(2, 333, 6, 128), (1, 7, 9, 5, 3, 72), (3, 100, 4, 13)], ids=str)
def test_one_pass(cuda, shape, parts, dtype):
    outs, lses = draw(cuda, parts, shape, dtype)
    for heads in (slice(None), slice(1, 3)):
        some = [x[..., heads, :] for x in outs], [x[..., heads] for x in lses]
        found = merge(*some)
        assert_merged(found, *some)
        first = [some[0][0].clone(), *some[0][1:]]
        inside = merging.merge_into_first(first, some[1])
        assert inside[0].data_ptr() == first[0].data_ptr()
        assert inside[0].equal(found[0])
        assert inside[1].equal(found[1])


def test_in_a_graph(cuda):
    outs, lses = draw(cuda, 2, (1, 500, 4, 64), torch.bfloat16)
    merge(outs, lses)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = merge(outs, lses)
    outs[0].nan_to_num_(0).mul_(2)
    lses[1].add_(1)
    graph.replay()
    assert_merged(found, outs, lses)


def test_compiled(cuda):
    outs, lses = draw(cuda, 2, (1, 500, 4, 64), torch.bfloat16)
    outs = [x.nan_to_num(0) for x in outs]
    expected = merge(outs, lses)
    first = outs[0].clone()
    found = torch.compile(merging.merge_into_first, fullgraph=True)([first, outs[1]], lses)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_more_than_2_31_elements(cuda):
    rows, heads, dim = 140000, 128, 128
    outs = [torch.empty(1, rows, heads, dim, dtype=torch.bfloat16, device=cuda) for _ in range(2)]
    lses = [torch.zeros(1, rows, heads, device=cuda) for _ in range(2)]
    assert outs[0].numel() > 2**31
    for x in outs:
        x.normal_()
    last = slice(-300, None)
    wanted = (outs[0][:, last].float() + outs[1][:, last].float()) / 2
    found, lse = merging.merge_into_first(outs, lses)
    torch.testing.assert_close(found[:, last].float(), wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(lse, torch.full_like(lse, 2.0).log_())
