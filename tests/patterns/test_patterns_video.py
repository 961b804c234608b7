"""What all methods for images and video have in common: devices, tracing, low precision."""

import pytest
import torch
from dispatch_watch import Watch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from sparse_fmha import block_sparse_attention, patterns

FRAMES, HEIGHT, WIDTH, TEXT = 3, 16, 16, 64
VIDEO = FRAMES * HEIGHT * WIDTH
LENGTH = VIDEO + TEXT
CUBES = patterns.CubeOrder((FRAMES, HEIGHT, WIDTH), (1, 8, 8), after=TEXT)
CHUNK = patterns.LightForcingLayout(192, 832, 64)
BAND = patterns.svg_mask(FRAMES, HEIGHT * WIDTH, text=TEXT, keep=0.5, block=64)
PREDICTORS = {
    (device, dtype): patterns.SparsifinerPredictor(LENGTH, 4, 16, device=device, dtype=dtype)
    for device, dtype in [("cpu", torch.float32), ("cpu", torch.bfloat16)]
}


def in_cubes(q, k, v, mask):
    permuted = CUBES.permute(q), CUBES.permute(k), CUBES.permute(v)
    return CUBES.undo(block_sparse_attention(*permuted, mask))


def chunk_of(q):
    return q[:, -192:]


def sparsifiner_mask(q, k):
    return PREDICTORS[q.device.type, q.dtype].mask(q, k)


CHOICES = {
    "rectified": lambda q, k: patterns.rectified(q, k, text=TEXT, block=64).rest,
    "psa": patterns.psa_levels,
    "light_forcing": lambda q, k: patterns.light_forcing(chunk_of(q), k, CHUNK.to(q.device)),
    "sparsifiner": sparsifiner_mask,
    "nabla": lambda q, k: patterns.nabla(q, k, CUBES.to(q.device)),
    "draft": lambda q, k: patterns.draft(q, k, CUBES.to(q.device)),
    "cube_top_k": lambda q, k: patterns.cube_top_k(q, k, CUBES.to(q.device)),
    "subblock": patterns.subblock,
    "sol": patterns.sol_blocks,
}
METHODS = {
    "rectified": lambda q, k, v: patterns.rectified_attention(q, k, v, text=TEXT, block=64),
    "psa": lambda q, k, v: patterns.psa_attention(q, k, v, patterns.psa_levels(q, k)),
    "light_forcing": lambda q, k, v: block_sparse_attention(
        chunk_of(q), k, v, patterns.light_forcing(chunk_of(q), k, CHUNK, frames=2)
    ),
    "sparsifiner": lambda q, k, v: block_sparse_attention(q, k, v, sparsifiner_mask(q, k)),
    "pka": lambda q, k, v: patterns.pka_attention(
        q, k, v, (26, 32), spatial=[(k, v)], window=3, subject=(k, v),
        rows=patterns.keyword_rows(q[:, :1], k),
    ),
    "nabla": lambda q, k, v: in_cubes(q, k, v, patterns.nabla(q, k, CUBES, p=0.5)),
    "draft": lambda q, k, v: in_cubes(q, k, v, patterns.draft(q, k, CUBES)),
    "cube_top_k": lambda q, k, v: in_cubes(q, k, v, patterns.cube_top_k(q, k, CUBES)),
    "subblock": lambda q, k, v: block_sparse_attention(q, k, v, patterns.subblock(q, k)),
    "vsa": lambda q, k, v: patterns.vsa_attention(q, k, v, CUBES, gate=q),
    "sol": patterns.sol_attention,
    "sol_block": lambda q, k, v: patterns.sol_attention(q, k, v, rest="block"),
    "svg": lambda q, k, v: patterns.svg_attention(q, k, v, BAND, FRAMES, HEIGHT * WIDTH),
}  # fmt: skip
methods = pytest.mark.parametrize("name", METHODS)


def inputs(device="cpu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, h, 16, generator=draw) for h in (4, 2, 2))
    return [x.to(device, dtype) for x in (q + 0.5, k + 0.5, v)]


@methods
def test_nothing_asks_the_host(name):
    tensors = inputs()
    with Watch():
        out = METHODS[name](*tensors)
    assert out.isfinite().all()


@methods
def test_an_empty_batch(name):
    out = METHODS[name](*(x[:0] for x in inputs()))
    assert out.shape[0] == 0


@pytest.mark.parametrize("name", CHOICES)
def test_shapes_do_not_depend_on_data(name):
    """Fake tensors have no data."""
    real = CHOICES[name](*inputs()[:2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = CHOICES[name](*(mode.from_tensor(x) for x in inputs()[:2]))
    for found, expected in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert isinstance(found, FakeTensor)
        assert found.shape == expected.shape


@methods
def test_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        out = METHODS[name](*inputs())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@methods
def test_bfloat16(name):
    out = METHODS[name](*inputs(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["vsa", "sol_block", "svg"])
def test_it_can_be_traced_in_one_graph(name):
    traced = torch.compile(METHODS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*inputs()), METHODS[name](*inputs()))
