"""Self-attention modules against their projections and the reference, spelled out."""

import copy
import io

import pytest
import torch

import sparse_fmha
from sparse_fmha import BlockGrid, BlockMask, StripeMask, patterns, reference, selection
from sparse_fmha.nn import NeighborhoodAttention, SparseSelfAttention


@pytest.fixture(autouse=True)
def no_derivatives():
    with torch.no_grad():
        yield


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(layer, x, visible):
    """The module's formula on tokens in a row, in fp64."""
    tokens = x.flatten(1, -2)
    weights = layer.qkv.weight.double(), layer.qkv.bias
    qkv = tokens.double() @ weights[0].T
    if weights[1] is not None:
        qkv += weights[1]
    own, shared = layer.num_heads * layer.head_dim, layer.num_heads_kv * layer.head_dim
    parts = qkv.split([own, shared, shared], -1)
    q, k, v = (part.unflatten(-1, (-1, layer.head_dim)) for part in parts)
    out, _ = reference.attention(q, k, v, visible, layer.scale)
    out = out.flatten(-2) @ layer.proj.weight.double().T
    return (out if layer.proj.bias is None else out + layer.proj.bias).view(x.shape)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((40,), {"window": 7}),
        ((40,), {"window": 64, "causal": True}),
        ((9, 12), {"window": (3, 5), "stride": (2, 1), "dilation": 2}),
        ((9, 12), {"window": 5, "causal": (True, False), "scale": -0.3, "qkv_bias": False}),
        ((4, 5, 6), {"window": 3, "proj_bias": False}),
    ],
)
def test_neighborhoods(grid, options):
    layer = NeighborhoodAttention(32, 2, **options)
    names = ("window", "stride", "dilation", "causal")
    given = {name: options[name] for name in names if name in options}
    visible = reference.neighborhood_mask(grid, **given)
    x = normal(2, *grid, 32)
    torch.testing.assert_close(layer(x).double(), expected(layer, x, visible), rtol=0, atol=1e-5)


def test_one_class_serves_all_ranks():
    layer = NeighborhoodAttention(16, 2, 3)
    for rank in (1, 2, 3):
        assert layer(normal(1, *[5] * rank, 16)).shape == (1, *[5] * rank, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = normal(1, 6, 7, 16)
    assert compiled(x).equal(layer(x))


def test_parameters_are_named_as_natten_has_them():
    """So that its checkpoints load: rows of q, then of k, then of v, head by head."""
    layer = NeighborhoodAttention(32, 4, (3, 3))
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    assert str(layer).startswith("NeighborhoodAttention(\n  dim=32, num_heads=4, window=(3, 3)\n")
    more = NeighborhoodAttention(32, 4, 3, 2, 3, True).extra_repr()
    assert more == "dim=32, num_heads=4, window=3, stride=2, dilation=3, causal=True"


@pytest.fixture
def masks():
    block = patterns.streaming_llm(200, 200, window=50, sink=3, block_q=64, block_kv=32)
    lists = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    stripe = StripeMask(lists, torch.full((1, 1, 4), 4, dtype=torch.int32), 200, 200, 64)
    return block, stripe


@pytest.mark.parametrize("heads_kv", [None, 2, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_masks(masks, which, heads_kv):
    mask = masks[which]
    layer = SparseSelfAttention(32, 4, mask, num_heads_kv=heads_kv)
    x = normal(2, 200, 32)
    wanted = expected(layer, x, mask.to_dense())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=1e-5)
    without = SparseSelfAttention(32, 4, num_heads_kv=heads_kv)
    without.load_state_dict(layer.state_dict())
    assert without(x, mask).equal(layer(x))


def test_a_mask_chosen_from_q_and_k():
    def choose(q, k):
        grid = BlockGrid.of(q, k, 64, 64, causal=True)
        scores = selection.block_scores(q, k, grid)
        return grid.mask(selection.top_k_blocks(scores, density=0.3) | grid.diagonal())

    layer = SparseSelfAttention(32, 2, choose)
    x = normal(1, 400, 32)
    q, k, _ = layer._project(x)
    torch.testing.assert_close(
        layer(x).double(), expected(layer, x, choose(q, k).to_dense()), rtol=0, atol=1e-5
    )


def test_the_mask_moves_with_the_module(masks):
    layer = SparseSelfAttention(32, 4, masks[0])
    assert set(layer.state_dict()) == {
        f"{a}.{b}" for a in ("qkv", "proj") for b in ("weight", "bias")
    }
    assert layer.half().mask is masks[0]
    assert layer.to("meta").mask.device.type == "meta"
    image = SparseSelfAttention(32, 4, masks[0]).to(memory_format=torch.channels_last)
    assert image.mask.indices.is_contiguous()
    assert copy.deepcopy(layer).mask.q_len == 200
    assert "mask=BlockMask(q_len=200" in str(layer)


def test_dropout_and_dtype():
    layer = NeighborhoodAttention(16, 2, 3, proj_drop=1.0, dtype=torch.bfloat16)
    x = normal(1, 5, 16).bfloat16()
    assert not layer(x).any()
    assert layer.eval()(x).any()
    assert layer(x).dtype == torch.bfloat16


BAD_MODULES = {
    "dim": (
        lambda: NeighborhoodAttention(30, 4, 3),
        ValueError,
        "dim / num_heads must be a multiple of 8 from 8 to 256, got 30 / 4",
    ),
    "head dim": (
        lambda: NeighborhoodAttention(48, 4, 3),
        ValueError,
        "multiple of 8 from 8 to 256",
    ),
    "large": (lambda: NeighborhoodAttention(1024, 2, 3), ValueError, "from 8 to 256"),
    "heads": (
        lambda: NeighborhoodAttention(32, 0, 3),
        ValueError,
        "num_heads must be at least 1, got 0",
    ),
    "window": (
        lambda: NeighborhoodAttention(32, 2, (3, 0)),
        ValueError,
        r"window must be at least 1 on every axis, got \(3, 0\)",
    ),
    "type": (
        lambda: NeighborhoodAttention(32, 2, 3.5),
        TypeError,
        "window must be an int or a tuple of them, got 3.5",
    ),
    "causal": (
        lambda: NeighborhoodAttention(32, 2, 3, causal=1),
        TypeError,
        "causal must be a bool or a tuple of them, got 1",
    ),
    "stride": (
        lambda: NeighborhoodAttention(32, 2, 3, stride=4),
        ValueError,
        "stride must be from 1 to window = 3, got 4",
    ),
    "stride of an axis": (
        lambda: NeighborhoodAttention(32, 2, (3, 5), stride=(3, 6)),
        ValueError,
        r"stride\[1\] must be from 1 to window\[1\] = 5, got 6",
    ),
    "tuples": (
        lambda: NeighborhoodAttention(32, 2, (3, 3), stride=(1, 1, 1)),
        ValueError,
        "tuples of window, stride, dilation and causal must have the same",
    ),
    "axes": (
        lambda: NeighborhoodAttention(32, 2, (3,) * 4),
        ValueError,
        "tuples of window, stride, dilation and causal must have the same",
    ),
    "drop": (
        lambda: SparseSelfAttention(32, 2, proj_drop=2),
        ValueError,
        "proj_drop must be from 0 to 1, got 2",
    ),
    "bias": (
        lambda: SparseSelfAttention(32, 2, qkv_bias=1),
        TypeError,
        "qkv_bias must be True or False, got 1",
    ),
    "scale": (
        lambda: SparseSelfAttention(32, 2, scale=1e999),
        ValueError,
        "scale must be a finite number, got inf",
    ),
    "groups": (
        lambda: SparseSelfAttention(32, 4, num_heads_kv=3),
        ValueError,
        "num_heads must be a multiple of num_heads_kv = 3, got 4",
    ),
    "mask": (
        lambda: SparseSelfAttention(32, 4, torch.ones(2)),
        TypeError,
        "mask must be a BlockMask, a StripeMask, a function of q and k or None,",
    ),
}


@pytest.mark.parametrize("name", BAD_MODULES)
def test_bad_modules(name):
    make, error, words = BAD_MODULES[name]
    with pytest.raises(error, match=words):
        make()


def test_bad_inputs(masks):
    layer = NeighborhoodAttention(32, 2, (3, 3))
    with pytest.raises(
        ValueError, match=r"x must have shape \[batch, \*tokens, 32\] with 2 token axes, got \[1,"
    ):
        layer(normal(1, 8, 32))
    with pytest.raises(
        ValueError, match=r"x must have shape \[batch, ..., 32\], got \[1, 8, 8, 16\]"
    ):
        layer(normal(1, 8, 8, 16))
    with pytest.raises(ValueError, match=r"window\[1\] \* dilation\[1\] must be .*, got 3 \* 1"):
        layer(normal(1, 8, 2, 32))
    with pytest.raises(TypeError, match=r"x must have .*dtype.*, got torch\.int64"):
        layer(normal(1, 8, 8, 32).long())
    masked = SparseSelfAttention(32, 2)
    with pytest.raises(ValueError, match="mask must be given, to the module or to this call"):
        masked(normal(1, 200, 32))
    with pytest.raises(ValueError, match=r"x must have .*, got .*\[1, 4, 4, 32\]"):
        masked(normal(1, 4, 4, 32), masks[0])
    with pytest.raises(ValueError, match="200"):
        masked(normal(1, 100, 32), masks[0])
    with pytest.raises(TypeError, match="mask must be a BlockMask or a StripeMask, got int"):
        SparseSelfAttention(32, 2, lambda q, k: 3)(normal(1, 200, 32))


def test_saved_and_loaded(masks):
    layer = SparseSelfAttention(32, 4, masks[0])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = normal(1, 200, 32)
    assert again(x).equal(layer(x))
    assert isinstance(again.mask, BlockMask)
    assert sparse_fmha.nn.SparseSelfAttention is SparseSelfAttention


def test_training_reaches_the_parameters():
    """Also where a causal window passes the start of the sequence."""
    layer = NeighborhoodAttention(16, 2, 50, causal=True, dtype=torch.float64)
    x = normal(1, 30, 16).double()
    visible = reference.causal_mask(30, 30)
    with torch.enable_grad():
        layer(x).square().sum().backward()
        found = [parameter.grad.clone() for parameter in layer.parameters()]
        layer.zero_grad()
        expected(layer, x, visible).square().sum().backward()
    for grad, parameter in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-6, atol=1e-9)
