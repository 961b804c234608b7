"""Cases of `ulysses`; each rank compares its part with one process's."""

import torch
from distributed_backward import agree
from distributed_inputs import LENGTH, agrees, block_mask, qkv, skipped_qkv, stripe_mask
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import BlockMask


@case(2, 4)
def ulysses_dense_and_causal(ranks):
    for causal in (False, True):
        for heads_kv in (8, 4):
            tensors = qkv(heads_kv=heads_kv)
            agrees(ranks, sd.ulysses, sparse_fmha.attention, tensors, causal=causal, scale=0.3)


@case(2, 4)
def ulysses_replicates_key_heads(ranks):
    for heads, heads_kv in ((8, 1), (12, 2), (4, 1)):
        agrees(ranks, sd.ulysses, sparse_fmha.attention, qkv(heads, heads_kv), causal=True)


@case(2, 4)
def ulysses_dtypes(ranks):
    # The same heads in the same kernel: no rounding but that of other strides.
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        eps = torch.finfo(dtype).eps
        agrees(
            ranks, sd.ulysses, sparse_fmha.attention, qkv(dtype=dtype), tolerance=(2 * eps, 2 * eps)
        )


@case(2, 4)
def ulysses_other_number_of_keys(ranks):
    tensors = qkv(length_kv=96)
    agrees(ranks, sd.ulysses, sparse_fmha.attention, tensors, causal=True)


@case(2, 4)
def ulysses_uneven_and_empty(ranks):
    """Windows on a grid that no number of ranks divides; other keys; a rank without tokens."""
    lengths = {2: [125, 0], 4: [40, 0, 0, 85]}[ranks.world]
    uneven = sd.Shards.of_lengths(lengths)
    whole = {"grid": (5, 5, 5), "window": (3, 2, 5)}
    for batch, slices in ((1, 1), (2, 2)):
        tensors = qkv(8, 8, batch=batch, length=125)
        common = {"attention": sparse_fmha.neighborhood_attention, "slices": slices} | whole
        agree(
            ranks, sd.ulysses, windows, tensors, shard=lambda x: sd.shard(x, uneven), whole=whole,
            **common,
        )  # fmt: skip
        agrees(
            ranks, sd.ulysses, windows, tensors, shard=lambda x: sd.shard(x, uneven),
            whole=dict(whole), **common,
        )  # fmt: skip
    q, k, v = qkv(8, 1, length=125, length_kv=77)
    keys = sd.Shards.of_lengths([0] * (ranks.world - 1) + [77])
    parts = sd.shard(q, uneven), sd.shard(k, keys), sd.shard(v, keys)
    for slices in (1, 2):
        out = sd.ulysses(*parts, slices=slices)
        right = sd.shard(sparse_fmha.attention(q, k, v), uneven)
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-6)


def windows(q, k, v, *, grid, window, return_lse):
    results = sparse_fmha.neighborhood_attention(
        *(x.unflatten(1, grid) for x in (q, k, v)), window, return_lse=return_lse
    )
    return [x.flatten(1, 3) for x in results]


@case(2, 4)
def ulysses_without_validate_returns_out_alone(ranks):
    q, k, v = qkv(batch=1)
    out = sd.ulysses(*(ranks.part(x) for x in (q, k, v)), validate=False)
    ranks.same(out, sparse_fmha.attention(q, k, v))


@case(2, 4)
def ulysses_neighborhood(ranks):
    tensors = qkv(length=4 * 8 * 16)
    grids = [x.unflatten(1, (4, 8, 16)) for x in tensors]
    for heads_kv in (4, 1):
        grids = [grids[0], *(x[..., :heads_kv, :] for x in grids[1:])]
        extra_k, extra_v = (x[:, :5] for x in qkv(heads_kv=heads_kv)[1:])
        options = {"window": (3, 4, 5), "causal": (True, False, False)}
        options |= {"extra_k": extra_k, "extra_v": extra_v}
        out, lse = sparse_fmha.neighborhood_attention(*grids, return_lse=True, **options)
        local = (ranks.part(x.flatten(1, 3)) for x in grids)
        function = sparse_fmha.neighborhood_attention
        results = sd.ulysses(*local, function, grid=(4, 8, 16), return_lse=True, **options)
        ranks.same(results[0], out.flatten(1, 3))
        ranks.same(results[1], lse.flatten(1, 3))


@case(2, 4)
def ulysses_neighborhood_on_one_axis(ranks):
    agrees(
        ranks, sd.ulysses, sparse_fmha.neighborhood_attention, qkv(), whole={"window": 33},
        attention=sparse_fmha.neighborhood_attention, window=33,
    )  # fmt: skip


@case(2, 4)
def ulysses_masks(ranks):
    for causal in (False, True):
        for batch, heads in ((1, 1), (2, 8), (1, 8)):
            mask = block_mask(batch, heads, causal=causal)
            agrees(ranks, sd.ulysses, sparse_fmha.block_sparse_attention, qkv(), mask)
            mask = stripe_mask(batch, heads, causal=causal)
            agrees(ranks, sd.ulysses, sparse_fmha.stripe_attention, qkv(), mask)


@case(2, 4)
def ulysses_mask_of_the_heads_of_a_rank(ranks):
    mask = block_mask(2, 8)
    local = 8 // ranks.world
    blocks = mask.blocks()[:, ranks.rank * local :][:, :local]
    own = BlockMask.from_blocks(blocks, LENGTH, LENGTH, 64, 32)
    whole = BlockMask.from_blocks(mask.blocks(), LENGTH, LENGTH, 64, 32)
    out = sd.ulysses(*(ranks.part(x) for x in qkv()), mask=own)
    ranks.same(out, sparse_fmha.block_sparse_attention(*qkv(), whole))


@case(2, 4)
def ulysses_skipping(ranks):
    for value in (0.3, torch.tensor([0.3, 0.0, 0.1, 0.9])):
        agrees(ranks, sd.ulysses, sparse_fmha.attention, skipped_qkv(), skip_threshold=value)
