"""Masks as inputs of compiled, exported and checkpointed functions."""

import functools
import io

import pytest
import torch
import torch._dynamo.config
import torch.fx.experimental._config
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from sparse_fmha import (
    BlockGrid,
    BlockMask,
    StripeMask,
    attention,
    block_sparse_attention,
    stripe_attention,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def bools(*shape, share=0.5, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def full(q_len, kv_len, seed=0, heads=4, causal=True):
    blocks = bools(1, heads, -(-q_len // 64), -(-kv_len // 32), seed=seed)
    return BlockMask.from_blocks(blocks, q_len, kv_len, 64, 32, causal=causal)


def partial(q_len, kv_len, seed=0, batch=1):
    visible = bools(batch, 1, q_len, kv_len, share=0.01, seed=seed)
    return BlockMask.from_dense(visible, 64, 32, partial_width=6)


def columns(q_len, kv_len, seed=0, causal=True):
    seen = bools(1, 4, -(-q_len // 64), kv_len, share=0.2, seed=seed)
    return StripeMask.from_columns(seen, q_len, 64, causal=causal, width=90)


def runs(q_len, kv_len, seed=0):
    """Columns before key 32, and a run from there on."""
    listed = columns(q_len, 32, seed)
    starts = torch.full((1, 4, listed.groups, 1), 32, dtype=torch.int32)
    counts = torch.ones(1, 4, listed.groups, dtype=torch.int32)
    return StripeMask(listed.columns, listed.counts, q_len, kv_len, 64, starts, counts)


MASKS = {
    "full": full,
    "full, shared heads": functools.partial(full, heads=1),
    "full, not causal": functools.partial(full, causal=False),
    "partial": partial,
    "partial, own entries": functools.partial(partial, batch=2),
    "columns": columns,
    "columns, not causal": functools.partial(columns, causal=False),
    "columns and runs": runs,
}
masks = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)


def inputs(q_len=100, kv_len=150):
    generator = torch.Generator().manual_seed(q_len)
    shapes = (2, q_len, 4, 16), (2, kv_len, 2, 16), (2, kv_len, 2, 16)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def attend(q, k, v, mask):
    attention = block_sparse_attention if isinstance(mask, BlockMask) else stripe_attention
    return attention(q, k, v, mask)


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return attend(q, k, v, mask)


def through_a_tree(q, k, v, mask):
    return attend(q, k, v, pytree.tree_map(torch.clone, mask).to(q.device, copy=True))


@masks
@pytest.mark.parametrize("function", [attend, through_a_tree])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_graph_serves_masks_of_the_same_shapes(make, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, k, v = inputs()
    for seed in range(3):
        mask = make(100, 150, seed)
        torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask))


@masks
@torch._dynamo.config.patch(error_on_recompile=True)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes may be equal by chance
def test_one_graph_serves_masks_of_all_lengths(make):
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for q_len, kv_len in ((100, 150), (160, 260), (300, 430)):
        q, k, v = inputs(q_len, kv_len)
        mask = make(q_len, kv_len)
        torch.testing.assert_close(compiled(q, k, v, mask), attend(q, k, v, mask))


@masks
def test_a_compiled_function_returns_a_mask(make):
    mask = make(100, 150)
    moved = torch.compile(lambda mask: mask.to("meta"), fullgraph=True, backend="eager")(mask)
    assert type(moved) is type(mask)
    assert moved.device.type == "meta"


@masks
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_saved_and_takes_other_masks(make, strict):
    q, k, v = inputs()
    file = io.BytesIO()
    program = torch.export.export(Attend(), (q, k, v, make(100, 150)), strict=strict)
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for seed in range(2):
        mask = make(100, 150, seed)
        torch.testing.assert_close(module(q, k, v, mask), attend(q, k, v, mask))
    with pytest.raises(Exception, match=r"(?i)tree"):
        module(*inputs(101, 150), make(101, 150))


def test_an_exported_program_takes_lists_of_any_width():
    q, k, v = inputs()
    mask = full(100, 150)
    shapes = ShapesCollection()
    shapes[mask.indices] = {3: Dim.DYNAMIC}
    program = torch.export.export(Attend(), (q, k, v, mask), dynamic_shapes=shapes)
    for width in (2, 4):
        blocks = bools(1, 4, 2, 5)
        mask = BlockMask.from_blocks(blocks, 100, 150, 64, 32, causal=True, width=width)
        torch.testing.assert_close(program.module()(q, k, v, mask), attend(q, k, v, mask))


@pytest.mark.parametrize("strict", [True, False])
def test_a_grid_is_an_input_of_an_exported_program(strict):
    class Count(torch.nn.Module):
        def forward(self, x, grid):
            return x + (grid.local(40) | grid.sink(3)).sum()

    file = io.BytesIO()
    grid = BlockGrid(100, 150, 64, 32, causal=True)
    torch.export.save(torch.export.export(Count(), (torch.ones(2), grid), strict=strict), file)
    file.seek(0)
    module = torch.export.load(file).module()
    assert module(torch.ones(2), grid).equal(Count()(torch.ones(2), grid))


def test_stats_are_outputs_of_an_exported_program():
    class Skip(torch.nn.Module):
        def forward(self, q):
            return attention(q, q, q, skip_threshold=0.5, return_stats=True)

    file = io.BytesIO()
    q, *_ = inputs()
    torch.export.save(torch.export.export(Skip(), (q,)), file)
    file.seek(0)
    _, stats = torch.export.load(file).module()(q)
    _, wanted = Skip()(q)
    assert stats.visited.equal(wanted.visited)
    assert stats.sparsity.equal(wanted.sparsity)


@masks
def test_make_fx(make):
    q, k, v = inputs()
    graph = make_fx(attend)(q, k, v, make(100, 150))
    mask = make(100, 150, 1)
    torch.testing.assert_close(graph(q, k, v, mask), attend(q, k, v, mask))


@masks
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "compiled"])
def test_checkpoint(make, way):
    """The function has a gradient whatever attention has."""

    def weigh(x, mask):
        return (x * mask.to_dense()).square().sum()

    def run(x, mask):
        return checkpoint(weigh, x, mask, use_reentrant=way == "reentrant")

    if way == "compiled":
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    mask = make(100, 150)
    x = torch.randn(2, 4, 100, 150, requires_grad=True)
    run(x, mask).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * mask.to_dense())
