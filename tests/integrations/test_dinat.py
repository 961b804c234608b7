"""DiNAT of transformers on fused attention, against attention maps made by definition."""

import copy
import importlib
import pickle
import sys

import pytest
import torch

pytest.importorskip("transformers")

from sparse_fmha import reference
from sparse_fmha.integrations import natten


@pytest.fixture
def installed(monkeypatch):
    from transformers.utils import import_utils

    for name in ("natten", "natten.functional"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    natten.install()
    yield
    for name in ("natten", "natten.functional"):
        sys.modules.pop(name)
    import_utils.is_natten_available.cache_clear()


@pytest.fixture
def dinat(installed):
    return importlib.import_module("sparse_fmha.integrations.dinat")


def made(kernel_size=3, **options):
    """Two stages, of 8x10 and 4x5 tokens, the second smaller than its windows."""
    from transformers import DinatConfig, DinatModel

    torch.manual_seed(0)
    config = DinatConfig(
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        kernel_size=kernel_size,
        dilations=[[1, 2], [2]],
        drop_path_rate=0.0,
        **options,
    )
    model = DinatModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "rpb" in name else 0.3)
    return model


def by_definition(self, hidden_states, output_attentions=False):
    """The biases are of NATTEN: of the steps from a query to a key."""
    batch, *grid, channels = hidden_states.shape
    heads, window, dilation = self.num_attention_heads, self.kernel_size, self.dilation
    q, k, v = (
        project(hidden_states).view(batch, -1, heads, channels // heads).transpose(1, 2)
        for project in (self.query, self.key, self.value)
    )
    visible = reference.neighborhood_mask(grid, window, 1, dilation)
    places = torch.cartesian_prod(*map(torch.arange, grid))
    steps = (places[None] - places[:, None]).div(dilation, rounding_mode="floor")
    steps = (steps + window - 1).clamp(0, 2 * window - 2)  # what is beyond is not visible
    scores = q @ k.transpose(-1, -2) / (channels // heads) ** 0.5
    scores = scores + self.rpb[:, steps[..., 0], steps[..., 1]]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return ((weights @ v).transpose(1, 2).reshape(hidden_states.shape),)


def images(rows=32, columns=40):
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "rpb")]


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_it_is_the_definition(dinat, kernel_size, monkeypatch):
    """Results, and gradients of the biases and of a projection in every block."""
    model = made(kernel_size)
    with monkeypatch.context() as patch:
        patch.setattr(type(attentions(model)[0]), "forward", by_definition)
        expected = model(images()).last_hidden_state
        expected.square().sum().backward()
        gradients = [(m.rpb.grad, m.key.weight.grad) for m in attentions(model)]
    model.zero_grad()
    dinat.enable(model)
    out = model(images()).last_hidden_state
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for module, both in zip(attentions(model), gradients, strict=True):
        for got, right in zip((module.rpb.grad, module.key.weight.grad), both, strict=True):
            assert right.norm() > 0
            torch.testing.assert_close(got / right.norm(), right / right.norm(), rtol=0, atol=1e-4)


def test_biases_matter(dinat):
    model = made()
    dinat.enable(model)
    with torch.no_grad():
        expected = model(images()).last_hidden_state
        attentions(model)[0].rpb[0, 0, 0] += 4
        assert (model(images()).last_hidden_state - expected).abs().max() > 1e-2


def test_state_and_copies(dinat):
    model = made()
    before, kinds = model.state_dict(), [type(m) for m in attentions(model)]
    dinat.enable(model)
    assert list(model.state_dict()) == list(before)
    with torch.no_grad():
        expected = model(images()).last_hidden_state
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied(images()).last_hidden_state.equal(expected)
    dinat.disable(model)
    assert [type(m) for m in attentions(model)] == kinds
    with pytest.raises(TypeError, match="a FusedNeighborhoodAttention of DiNAT, got DinatModel"):
        dinat.disable(model)
    with pytest.raises(TypeError, match="a NeighborhoodAttention of DiNAT, got Linear"):
        dinat.enable(torch.nn.Linear(2, 2))


def test_what_is_refused(dinat):
    model = made(attention_probs_dropout_prob=0.1)
    dinat.enable(model)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(images(), output_attentions=True)
    with pytest.raises(
        NotImplementedError, match=r"attention_probs_dropout_prob must be 0 .* 0\.1"
    ):
        model.train()(images())
    model.eval()
    attentions(model)[0].kernel_size = 9
    with pytest.raises(
        NotImplementedError, match=r"kernel_size - 1\)\*\*2 must be .*, got 8 \+ 17"
    ):
        model(images(36, 40))


def test_the_name_natten(installed):
    functional = importlib.import_module("natten.functional")
    assert importlib.import_module("natten") is natten
    assert functional.na2d is natten.na2d
    for name in ("natten2dqkrpb", "natten2dav"):
        with pytest.raises(NotImplementedError, match=f"{name} is for attention maps"):
            getattr(functional, name)(1, 2)
    natten.install()  # again
    sys.modules["natten"] = sys
    with pytest.raises(RuntimeError, match="natten must not be imported before install"):
        natten.install()
