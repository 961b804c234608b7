"""Whole methods on the GPU, outputs and gradients: as in fp64 under the same choice of keys."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from output_rule import assert_as_good_as

from sparse_fmha import block_sparse_attention, patterns

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LENGTH = 784  # 28 x 28
SHARES = {1: 0.2, 2: 0.4, 4: 0.6, 8: 0.8}
FRAMES = {"frame": 98, "block_q": 64, "block_kv": 64}  # eight frames, which cut blocks
SMALL = patterns.image_regions(28, 28, 7)  # regions of 16 tokens
LARGE = patterns.image_regions(28, 28, 4)  # of 49


@dataclass(frozen=True)
class Method:
    """`attend(q, k, v, choice)` is differentiable, `choose(q, k)` is not; queries are the last."""

    choose: Callable
    attend: Callable
    queries: int = LENGTH


def masked(choose, queries=LENGTH):
    """A method that is attention under a mask."""
    return Method(choose, block_sparse_attention, queries)


def psa(causal, block):
    options = {"causal": causal, "block_q": 64, "block_kv": block}
    return Method(
        lambda q, k: patterns.psa_levels(q, k, SHARES, **options),
        lambda q, k, v, levels: patterns.psa_attention(q, k, v, levels, **options),
    )


def light_forcing(q, k):
    layout = patterns.LightForcingLayout(q.shape[1], k.shape[1], **FRAMES, device=q.device)
    return patterns.light_forcing(q, k, layout, sparsity=0.5, frames=3)


def rectified(text):
    options = {"text": text, "keep": 0.3, "block": 64}
    return Method(
        lambda q, k: patterns.rectified(q, k, **options),
        lambda q, k, v, plan: patterns.rectified_attention(q, k, v, plan=plan),
    )


def predicted(q, k):
    """A mask of Sparsifiner; all arithmetic of its choice is in fp32."""
    torch.manual_seed(0)
    made = patterns.SparsifinerPredictor(q.shape[1], q.shape[2], q.shape[3], device="cpu")
    return made.to(q.device).mask(q.float(), k.float())


def in_regions(q, k, v, choice):
    layout, mask = choice
    queries, keys = (
        (layout.order, layout.order)
        if isinstance(layout, patterns.BiFormerPacking)
        else (layout.queries, layout.keys)
    )
    permuted = queries.permute(q), keys.permute(k), keys.permute(v)
    return queries.undo(block_sparse_attention(*permuted, mask))


def biformer(q, k):
    layout = patterns.BiFormerLayout(LARGE, block_kv=16, device=q.device)
    return layout, patterns.biformer(q, k, layout, top_k=3)


def biformer_packed(q, k):
    layout = patterns.BiFormerPacking(SMALL, device=q.device)
    return layout, patterns.biformer_packed(q, k, layout, top_k=4)


METHODS = {
    "psa": psa(False, 128),
    "psa, causal": psa(True, 128),
    "psa, granules of 8": psa(False, 64),
    "psa, causal, granules of 8": psa(True, 64),
    "rectified": rectified(0),
    "rectified, text": rectified(100),
    "light forcing": masked(light_forcing, 2 * FRAMES["frame"]),
    "sparsifiner": masked(predicted),
    "biformer": Method(biformer, in_regions),
    "biformer, packed": Method(biformer_packed, in_regions),
    "ssa": masked(lambda q, k: patterns.ssa(q, k, blocks=4)),
}


def moved(choice, device):
    """The same choice on another device: a tensor, a mask, a layout, or a tuple of them."""
    if isinstance(choice, tuple):
        parts = [moved(part, device) for part in choice]
        return type(choice)(*parts) if hasattr(choice, "_fields") else tuple(parts)
    return choice.to(device)


def inputs(device, queries, seed=0):
    """q, k and v, near each other in runs of 49 tokens: some blocks matter more than others."""
    rng = torch.Generator().manual_seed(seed)

    def made(heads):
        near = torch.randn(1, LENGTH // 49, heads, 64, generator=rng).repeat_interleave(49, 1)
        return (near + 0.5 * torch.randn(1, LENGTH, heads, 64, generator=rng)).to(device, BF16)

    q, k, v = made(4), made(2), made(2)
    return q[:, LENGTH - queries :].contiguous(), k, v


def results(method, tensors, choice, by):
    """out and the gradients of q, k and v, in fp64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = method.attend(*leaves, choice)
    assert out.dtype == leaves[0].dtype
    found = torch.autograd.grad(out, leaves, by.to(out))
    return [x.detach().cpu().double() for x in (out, *found)]


@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_gradients(cuda, name):
    method = METHODS[name]
    tensors = inputs(cuda, method.queries)
    choice = method.choose(*tensors[:2])
    by = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    found = results(method, tensors, choice, by)
    there = moved(choice, "cpu")
    exact = results(method, [x.cpu().double() for x in tensors], there, by)
    theirs = results(method, [x.cpu() for x in tensors], there, by)
    for what, *three in zip(("out", "q", "k", "v"), found, exact, theirs, strict=True):
        assert three[1].any()
        assert_as_good_as(*three, BF16, what)


def test_the_bias_of_dma_trains(cuda):
    """Gradients of the module's weights, through the bias of the keys."""
    q, k, v = inputs(cuda, LENGTH)
    by = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    module = patterns.DMABias(2, 64, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        module.decay.copy_(torch.tensor([0.3, -0.2]))
    bias = module.to(cuda)(v.float()).detach()  # one choice for all, in fp32

    def weights(tensors, dtype, device):
        own = patterns.DMABias(2, 64, device=device, dtype=dtype)
        own.load_state_dict(module.state_dict())
        q, k, v = (x.to(device) for x in tensors)
        made = own(v.to(dtype))
        # The module's bias has the value that keys were chosen by, and a gradient of its own.
        made = made + (bias.to(device) - made.detach())
        out = patterns.dma_attention(q, k, v, made, keep=100)
        grads = torch.autograd.grad(out, list(own.parameters()), by.to(out))
        return [x.cpu().double() for x in grads]

    found = weights((q, k, v), torch.float32, cuda)
    exact = weights([x.double() for x in (q, k, v)], torch.float64, "cpu")
    theirs = weights((q, k, v), torch.float32, "cpu")
    for what, *three in zip(("weight", "decay"), found, exact, theirs, strict=True):
        assert three[1].any()
        assert_as_good_as(*three, BF16, what)


def test_the_losses_of_sparsifiner_train(cuda):
    """In fp32, beside fp64 on the CPU."""
    q, k, _ = inputs(cuda, LENGTH)
    target = q.float().transpose(1, 2) @ k.float().repeat_interleave(2, 2).permute(0, 2, 3, 1)
    target = (target / 8).softmax(-1)
    torch.manual_seed(0)
    made = patterns.SparsifinerPredictor(LENGTH, 4, 64, device="cpu", dtype=torch.float64)

    def gradients(device, dtype):
        own = made.to(device, dtype)
        loss = own.reconstruction_loss(*(x.to(device, dtype) for x in (q, k, target)))
        return [x.cpu().double() for x in torch.autograd.grad(loss, list(own.parameters()))]

    exact = gradients("cpu", torch.float64)
    for found, wanted in zip(gradients(cuda, torch.float32), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_both_streams_of_ssa_train(cuda):
    q, k, v = inputs(cuda, LENGTH)
    mask = patterns.ssa(q, k, blocks=4)

    def alignment(tensors, mask):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss = patterns.ssa_streams(*leaves, mask).alignment
        return [x.cpu().double() for x in torch.autograd.grad(loss * 1000, leaves)]

    there = mask.to("cpu")
    found = alignment((q, k, v), mask)
    exact = alignment([x.cpu().double() for x in (q, k, v)], there)
    theirs = alignment([x.cpu() for x in (q, k, v)], there)
    for what, *three in zip("qkv", found, exact, theirs, strict=True):
        assert_as_good_as(*three, BF16, what)


def test_attention_of_ssa_by_key_heads(cuda):
    """Outputs and gradients are those under the mask, which has a list for each query head."""
    q, k, v = inputs(cuda, LENGTH)
    by = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(cuda, BF16)

    def found(attend):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, by)

    mask = patterns.ssa(q, k, blocks=4)
    made = found(lambda q, k, v: patterns.ssa_attention(q, k, v, blocks=4))
    expected = found(lambda q, k, v: block_sparse_attention(q, k, v, mask))
    for ours, theirs in zip(made, expected, strict=True):
        size = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * size)
