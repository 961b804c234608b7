"""Scores that rise or fall from key tile to key tile, by little or by more than a float can hold.

Where no mask is needed the kernels weigh scores against a reference that lags behind the maximum.
A rise of 2^10 makes them move it, a rise out of the range of the weights' type makes them compute
scores again, and rows that have seen no key yet have no reference at all.
"""

import pairwise
import pytest
import torch

import sparse_fmha
from sparse_fmha import BlockMask, reference

pytestmark = pytest.mark.gpu

LENGTH = 1024
# Natural-log units for each 128 keys: below the limit, above it, beyond fp16, beyond fp32.
RISES = (2.0, 6.5, 12.0, 70.0, 600.0, -9.0, -300.0)


@pytest.fixture(scope="session")
def rising(make_qkv):
    """rising(rise, dim, dtype): q, k and v whose scores rise by that much every 128 keys."""

    def make(rise, dim, dtype):
        q, k, v = make_qkv(2, LENGTH, LENGTH, 4, 2, dim, dtype)
        steps = torch.arange(LENGTH, device=q.device) // 128
        q[..., 0] = 16
        k[..., 0] = (rise * steps * dim**0.5 / 16)[:, None].to(dtype)
        q[:, 5::7, :, 0] = 0  # rows beside them that do not rise
        return q, k, v

    return make


@pairwise.parametrize(
    causal=(False, True), dtype=(torch.float16, torch.bfloat16), dim=(64, 96, 128, 256), rise=RISES
)
def test_attention(rising, attend, agrees, causal, dtype, dim, rise):
    q, k, v = rising(rise, dim, dtype)
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("dim", [96, 128])
def test_negative_scale(rising, attend, agrees, dim, rise):
    q, k, v = rising(rise, dim, torch.bfloat16)
    agrees(*attend(q, k, v, scale=-0.05), q, k, v, scale=-0.05)


@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("stride", [1, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighborhood(rising, attend, agrees, dim, dtype, stride, rise):
    q, k, v = rising(rise, dim, dtype)
    visible = reference.neighborhood_mask((LENGTH,), 640, stride=stride).to(q.device)
    agrees(*attend(q, k, v, window=640, stride=stride), q, k, v, visible=visible)


@pytest.mark.parametrize("level", [0.0, 400.0, -400.0])
@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("grid", [(32, 32), (16, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighborhood_rows_that_see_nothing_at_first(
    rising, attend, agrees, dim, dtype, grid, rise, level
):
    """Of a box many rows see no key of the first tiles; their first scores may be anything."""
    q, k, v = rising(rise, dim, dtype)
    k[..., 0] += level * dim**0.5 / 16
    q, k, v = (x.unflatten(1, grid) for x in (q, k, v))
    window = (5, 7, 5)[-len(grid) :]
    visible = reference.neighborhood_mask(grid, window).to(q.device)
    agrees(*attend(q, k, v, window=window), q, k, v, visible=visible)


@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_block_sparse(rising, agrees, dim, dtype, block_q, rise):
    q, k, v = rising(rise, dim, dtype)
    shape = 2, 4, LENGTH // block_q, LENGTH // 128
    generator = torch.Generator(q.device).manual_seed(7)
    blocks = torch.rand(shape, generator=generator, device=q.device) < 0.6
    mask = BlockMask.from_blocks(blocks, LENGTH, LENGTH, block_q, 128)
    out, lse = sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True)
    visible = blocks.repeat_interleave(block_q, 2).repeat_interleave(128, 3)
    agrees(out, lse, q, k, v, visible=visible)


@pytest.mark.parametrize("rise", [0.0, 12.0, 600.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_that_see_nothing_at_first(rising, agrees, dim, dtype, rise):
    q, k, v = rising(rise, dim, dtype)
    row = torch.arange(LENGTH, device=q.device)[:, None]
    key = torch.arange(LENGTH, device=q.device)
    # Masked blocks come first: of some rows every key is masked there.
    masked = (key < 256) & (row % 3 == 0)
    visible = masked | ((key >= 512) & (row % 1024 < 960))
    mask = BlockMask.from_dense(visible[None, None])
    out, lse = sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True)
    agrees(out, lse, q, k, v, visible=visible)
