"""Derivatives and vmap of CUDA tensors; tests/ops/test_derivatives.py has the rest."""

import pytest
import torch
from derivative_ways import WAYS, lacking
from op_calls import INTEGER_OPS, op_calls

pytestmark = pytest.mark.gpu

REAL_OPS = [name for name in op_calls() if name not in INTEGER_OPS]


@pytest.fixture(scope="module")
def calls(cuda):
    return op_calls(cuda, torch.bfloat16)


@pytest.mark.parametrize("name", REAL_OPS)
@pytest.mark.parametrize("way", ["jvp", "forward_ad", "grad", "backward", "vmap of grad"])
def test_what_is_lacking_raises(calls, way, name):
    if lacking(way, name) is None:
        pytest.skip("supported; test_backward_gpu.py and test_skipping_gradients_gpu.py test it")
    for argument, value in calls[name].tensors().items():
        if not value.is_floating_point():
            continue
        with pytest.raises(NotImplementedError, match=lacking(way, name, argument)):
            WAYS[way](lambda x, a=argument: calls[name](**{a: x})[0], value.clone())


@pytest.mark.parametrize("name", REAL_OPS)
def test_vmap(calls, name):
    call = calls[name]
    q = call.arguments["q"]
    several = torch.stack([q, q.flip(1), -q])
    found = torch.vmap(lambda q: call(q=q))(several)
    for i, one in enumerate(several):
        for a, b in zip(found, call(q=one), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-2, atol=1e-2)
