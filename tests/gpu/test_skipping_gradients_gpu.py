"""Gradients of calls that skip tiles on the GPU: those of attention to what was kept."""

import pytest
import torch
from gradient_rule import output_gradients
from poison import poisoned
from test_skipping_gpu import calls, inputs

import sparse_fmha

pytestmark = pytest.mark.gpu
OPS = torch.ops.sparse_fmha
names = pytest.mark.parametrize("name", ["dense", "causal"])


def differentiated(call, given, threshold):
    """out, lse, statistics and the gradients of q, k and v, through out and lse."""
    leaves = [x.detach().requires_grad_() for x in given]
    options = dict(skip_threshold=threshold, return_lse=True, return_stats=True)
    out, lse, stats = call(*leaves, **options)
    dout, dlse = output_gradients(out.detach().cpu(), lse.detach().cpu())
    with poisoned():
        found = torch.autograd.grad((out, lse), leaves, (dout.to(out.device), dlse.to(out.device)))
    return out.detach(), lse.detach(), stats, found


@names
@pytest.mark.parametrize("dim", [40, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_on_the_cpu(cuda, name, dim, dtype):
    call = calls(1000)[name]
    given = inputs(1000, heads=2, dim=dim, dtype=dtype)
    compared = 0
    for threshold in (1e-3, 0.05, 0.5):
        _, _, stats, found = differentiated(call, [x.to(cuda) for x in given], threshold)
        _, _, wanted_stats, wanted = differentiated(call, given, threshold)
        same = stats.skipped.cpu() == wanted_stats.skipped
        for b, h in same.nonzero().tolist():
            compared += wanted_stats.skipped[b, h].item() > 0
            for ours, theirs in zip(found, wanted, strict=True):
                ours, theirs = ours[b, ..., h, :].cpu().float(), theirs[b, ..., h, :].float()
                size = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=2e-2 * size)
    assert compared > 3


@names
def test_what_is_skipped_has_no_gradient(cuda, name):
    """A key in a tile that every group skips, and ragged lengths with more keys than queries."""
    q, k, v = (x.to(cuda) for x in inputs(700, heads=2, batch=1))
    q = q[:, 300:]
    k[:, 330:420] = 0  # far below the others' scores, but for rows whose scores are all small
    k[:, 100] = 1.5 * q.float().mean(1).to(k.dtype)
    _, _, stats, found = differentiated(calls(700)[name], (q, k, v), 0.5)
    assert stats.skipped.sum() > 0
    _, _, _, dense = differentiated(calls(700)[name], (q, k, v), 0.0)
    untouched = [x.flatten(2).eq(0).all(-1).sum() for x in found[1:]]
    assert all(u >= 64 for u in untouched)
    assert all(x.flatten(2).eq(0).all(-1).sum() < 16 for x in dense[1:])


@names
def test_two_runs_give_the_same_bits(cuda, name):
    given = [x.to(cuda) for x in inputs(1000)]
    first = differentiated(calls(1000)[name], given, 0.05)
    for _ in range(5):
        again = differentiated(calls(1000)[name], given, 0.05)
        assert all(a.equal(b) for a, b in zip(again[3], first[3], strict=True))


@names
def test_graph_with_another_threshold(cuda, name):
    q, k, v = (x.to(cuda) for x in inputs(1000))
    causal = name == "causal"
    threshold = torch.zeros(2, device=cuda)

    def step():
        out, lse, _ = OPS.fmha_fwd(q, k, v, causal, None, threshold)
        dout = torch.ones_like(out)
        return OPS.fmha_bwd(dout, None, q, k, v, out, lse, causal, skip_threshold=threshold)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for values in ((0.0, 0.5), (1e-3, 0.05)):
        threshold.copy_(torch.tensor(values))
        graph.replay()
        assert all(a.equal(b) for a, b in zip(replayed, step(), strict=True))


def test_only_what_is_wanted(cuda):
    q, k, v = (x.to(cuda) for x in inputs(500))
    threshold = torch.full((2,), 0.1, device=cuda)
    out, lse, _ = OPS.fmha_fwd(q, k, v, True, None, threshold)
    given = torch.ones_like(out), None, q, k, v, out, lse, True
    whole = OPS.fmha_bwd(*given, skip_threshold=threshold)
    dq = OPS.fmha_bwd(*given, need_dkv=False, skip_threshold=threshold)
    dkv = OPS.fmha_bwd(*given, need_dq=False, skip_threshold=threshold)
    assert dq[0].equal(whole[0])
    assert dkv[1].equal(whole[1])
    assert dkv[2].equal(whole[2])
    assert dq[1].numel() == dq[2].numel() == dkv[0].numel() == 0


@pytest.mark.parametrize("lengths", [(0, 10), (10, 0)])
def test_no_pairs(cuda, lengths):
    q, k = (torch.randn(2, n, 2, 64, device=cuda, dtype=torch.bfloat16) for n in lengths)
    leaves = [x.requires_grad_() for x in (q, k, k.detach().clone())]
    sparse_fmha.attention(*leaves, skip_threshold=0.1).sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@pytest.mark.parametrize("name", ["grid", "blocks", "stripes"])
def test_other_mechanisms_raise(cuda, name):
    given = [x.to(cuda).requires_grad_() for x in inputs(1000)]
    out = calls(1000)[name](*given, skip_threshold=0.1)
    with pytest.raises(NotImplementedError, match="with skip_threshold run on the CPU only"):
        out.sum().backward()


def test_large_heads_raise(cuda):
    given = [x.to(cuda).requires_grad_() for x in inputs(100, dim=136)]
    out = sparse_fmha.attention(*given, skip_threshold=0.1)
    with pytest.raises(NotImplementedError, match="for head dims up to 128, got 136"):
        out.sum().backward()
