"""An enabled model beside others, in pipelines, compiled, offloaded and moved."""

import copy
import itertools
import types

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend
from diffusion_state import NAME, image, windowed
from tiny_diffusion import make

import sparse_fmha
from sparse_fmha.integrations import _diffusion_beside, _diffusion_methods, _diffusion_table
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.patterns import sol

pytestmark = pytest.mark.usefixtures("default")


def test_a_model_that_calls_another():
    outer, inner = make("wan"), make("ltx")
    dense = inner()
    windowed(outer)
    expected = outer()
    outer.model.blocks[0].ffn.register_forward_pre_hook(lambda *_: results.append(inner()))
    results = []
    with attention_backend(NAME):
        assert outer().equal(expected)
        windowed(inner)
        assert outer().equal(expected)
        within = inner()
    assert results[0].equal(dense)
    assert results[1].equal(within)
    assert not within.equal(dense)


def test_other_models_compile_to_one_graph():
    """Where the backend is the default, and another model is enabled."""
    tiny, other = make("wan"), make("ltx")
    expected = other()
    windowed(tiny)
    tiny()
    with attention_backend(NAME):
        other.model = torch.compile(other.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(other(), expected)
    torch.compiler.reset()


def test_an_enabled_model_counts_steps_when_compiled():
    tiny, times = make("wan"), (900, 900, 700, 400, 900, 700)
    windowed(tiny, first_dense_steps=2)
    expected = [tiny(t) for t in times]
    model = tiny.model
    sparse.disable(model)
    windowed(tiny, first_dense_steps=2)
    tiny.model = torch.compile(model, backend="eager")
    for t, out in zip(times, expected, strict=True):
        torch.testing.assert_close(tiny(t), out)
    torch.compiler.reset()


def test_pipelines_that_share_a_transformer():
    one, two = make("wan"), make("wan")
    dense = one()
    first = types.SimpleNamespace(transformer=one.model)
    second = types.SimpleNamespace(transformer=one.model, transformer_2=two.model)
    sparse.enable(first, "neighborhood", window=one.window)
    expected = one()
    assert sparse.is_enabled(first)
    assert not sparse.is_enabled(second)  # not as a whole
    sparse.disable(second)
    assert one().equal(dense)
    sparse.enable(second, "neighborhood", window=one.window)
    assert one().equal(expected)
    sparse.disable(first)
    assert one().equal(dense)
    sparse.disable(second)
    assert not sparse.is_enabled(two.model)
    with pytest.raises(RuntimeError, match=r"must be enabled before disable\(\); call"):
        sparse.disable(second)


def test_a_pipeline_with_one_transformer_twice():
    tiny = make("wan")
    dense = tiny()
    pipe = types.SimpleNamespace(transformer=tiny.model, transformer_2=tiny.model)
    sparse.enable(pipe, "neighborhood", window=tiny.window)
    sparse.disable(pipe)
    assert tiny().equal(dense)
    assert not sparse.is_enabled(pipe)


def test_offloading_hooks_of_accelerate():
    """They replace `forward`; ours are around it, whichever came first and leaves first."""
    hooks = pytest.importorskip("accelerate.hooks")
    for first, leaves in itertools.product(("ours", "theirs"), repeat=2):
        tiny = make("wan")
        dense, before = tiny(), image(tiny.model)

        def enter(kind, tiny=tiny):
            if kind == "ours":
                return windowed(tiny)
            for module in (tiny.model, *tiny.model.blocks, tiny.model.blocks[0].attn1):
                hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
            return None

        def leave(kind, tiny=tiny):
            if kind == "ours":
                return sparse.disable(tiny.model)
            return hooks.remove_hook_from_module(tiny.model, recurse=True)

        others = {"ours": "theirs", "theirs": "ours"}
        enter(first)
        enter(others[first])
        expected = tiny()
        assert not expected.equal(dense)
        copied = copy.deepcopy(tiny.model)
        leave(leaves)
        assert tiny().equal(dense if leaves == "ours" else expected)
        leave(others[leaves])
        assert tiny().equal(dense)
        del before  # accelerate leaves `forward` behind
        sparse.disable(copied)
        tiny.model = copied
        assert tiny().equal(dense)


def test_a_mask_follows_the_model(monkeypatch):
    """Its copy is made once for each device."""
    seen = []

    def watched(q, k, v, mask, **options):
        seen.append(mask)
        return q, q[..., 0]

    monkeypatch.setattr(_diffusion_beside, "block_sparse_attention", watched)
    blocks = torch.ones(1, 1, 2, 8, dtype=torch.bool)
    mask = sparse_fmha.BlockMask.from_blocks(blocks, 120, 120, 64, 16)
    method = _diffusion_table.make("block_sparse", {"mask": mask})
    layout = _diffusion_methods.Layout((4, 5, 6))
    for device in ("cpu", "meta", "cpu", "meta"):
        q = torch.ones(1, 120, 2, 16, device=device)
        method(q, q, q, layout, [()], None)
        assert seen[-1].device == q.device
    assert seen[0] is seen[2] is mask
    assert seen[1] is seen[3]


def test_to_another_dtype_and_back():
    tiny = make("wan")
    windowed(tiny)
    expected = tiny()
    tiny.model.to(torch.float64).to(torch.float32)
    assert tiny().equal(expected)
    sparse.disable(tiny.model)
    assert not sparse.is_enabled(tiny.model)


@pytest.mark.parametrize("kind", ["runs", "visible", "biases"])
def test_routed_blocks_beside_other_tokens(kind):
    """Some of them keys alone. The grid's are those of the pattern, which has tests of its own."""
    torch.manual_seed(0)
    layout = Layout((4, 8, 8), 5, 3, cached=2)
    method = _diffusion_table.make("sol", {"tau": 0.5})
    k, v = (torch.randn(2, layout.tokens, 2, 16) for _ in range(2))
    q = torch.randn(2, layout.queries.tokens, 4, 16)
    seen = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0], [1] * 8]).bool()
    bias = torch.where(seen, 0.0, -torch.inf)
    given = {
        "runs": [((0, 2), (3, 4), (5, 7)), layout.all_runs()],
        "visible": seen,
        "biases": torch.where(seen, 0.0, -1.0),
    }[kind]
    if kind == "biases":
        bias = given
    out = method(q, k, v, layout, given, 0.3)
    grid, text = slice(3, 259), [0, 1, 2, 259, 260, 261]
    own = [x[:, 5:261] for x in (k, v)]
    found, lse = sol.with_lse(q[:, grid], *own, tau=0.5, scale=0.3)
    k, v = (x.repeat_interleave(2, 2).double() for x in (k, v))
    others = [0, 1, 2, 3, 4, 261, 262, 263]
    scores = 0.3 * torch.einsum("bihd,bjhd->bhij", q.double(), k)
    scores[..., others] += bias[:, None, None]
    beside = scores[:, :, grid][..., others]
    both = torch.cat([lse.double().transpose(1, 2)[..., None], beside], -1).softmax(-1)
    expected = both[..., :1].transpose(1, 2) * found + torch.einsum(
        "bhij,bjhd->bihd", both[..., 1:], v[:, others]
    )
    torch.testing.assert_close(out[:, grid].double(), expected, rtol=1e-4, atol=1e-5)
    dense = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    torch.testing.assert_close(out[:, text].double(), dense[:, text], rtol=1e-4, atol=1e-5)
