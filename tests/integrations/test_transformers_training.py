"""Training of tiny models of transformers: as with torch's SDPA."""

import pytest
import torch

pytest.importorskip("transformers")

from low_rank import adapt, assert_trains_alike, train
from tiny_text import MODELS, ids, model

from sparse_fmha.integrations import transformers as sparse

pytestmark = pytest.mark.usefixtures("registered")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DECODERS = [name for name in MODELS if name != "bert"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_low_rank_adapters(name, padded):
    net, tokens = model(name).train(), ids(100)
    parameters = adapt(net, PROJECTIONS)
    seen = torch.ones_like(tokens)
    if padded:
        seen[1, 70:] = 0
    labels = tokens.masked_fill(seen == 0, -100)

    def loss():
        return net(input_ids=tokens, attention_mask=seen, labels=labels).loss

    results = []
    for implementation in ("sdpa", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        results.append(train(parameters, loss))
    assert_trains_alike(results[1], results[0])


def test_all_parameters_of_an_encoder():
    net, tokens = model("bert").eval(), ids(100)
    parameters = [x for n, x in net.named_parameters() if "pooler" not in n]
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(2, 100, 64, generator=generator)

    def loss():
        return (net(input_ids=tokens)[0] - target).square().mean()

    results = []
    for implementation in ("sdpa", "sparse_fmha"):
        net.set_attn_implementation(implementation)
        results.append(train([x for x in parameters if x.requires_grad], loss))
    (losses, grads), (wanted_losses, wanted) = results[1], results[0]
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing():
    """The forward pass that is repeated is the same, to the bit."""
    net, tokens = model("llama").train(), ids(100)
    parameters = adapt(net, PROJECTIONS)
    net.set_attn_implementation("sparse_fmha")

    def loss():
        return net(input_ids=tokens, labels=tokens, use_cache=False).loss

    plain = train(parameters, loss, steps=1)[1]
    net.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(train(parameters, loss, steps=1)[1], plain, strict=True):
        assert a.equal(b)


def test_a_sparse_layer_trains():
    """Block lists that are chosen by scores, which have no derivative themselves."""
    net, tokens = model("llama").train(), ids(500, batch=1)
    parameters = adapt(net, PROJECTIONS)
    sparse.register("sparse_blocks", {"default": {"method": "block_topk", "blocks": 2}})
    net.set_attn_implementation("sparse_blocks")
    losses, grads = train(parameters, lambda: net(input_ids=tokens, labels=tokens).loss)
    assert losses[-1] < losses[0]
    assert all(x.isfinite().all() and x.any() for x in grads)
