"""Cases of the sequence parallel functions; each rank compares its part with one process's."""

from unittest import mock

import torch
import torch.distributed as dist
from block_masks import Drawn
from distributed_ranks import case
from torch.distributed.device_mesh import init_device_mesh

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import BlockGrid, BlockMask, StripeMask

LENGTH = 512


def qkv(heads=8, heads_kv=4, *, batch=2, length=LENGTH, length_kv=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads)
    length_kv = length_kv or length
    shapes = (length, heads), (length_kv, heads_kv), (length_kv, heads_kv)
    return [
        torch.randn(batch, tokens, n, 16, generator=generator).to(dtype) for tokens, n in shapes
    ]


def skipped_qkv():
    """The last keys outweigh others, so that a threshold leaves tiles out."""
    q, k, v = qkv(batch=4)
    q[..., 0] = k[:, -64:, :, 0] = 8
    assert (
        sparse_fmha.attention(q, k, v, skip_threshold=0.3, return_stats=True)[1].skipped > 0
    ).all()
    return q, k, v


def block_mask(batch=1, heads=8, *, causal=False, block_q=64, block_kv=32, length_kv=LENGTH):
    sizes = LENGTH, length_kv, block_q, block_kv
    return Drawn(*sizes, batch=batch, heads=heads, causal=causal, seed=heads).mask()


def stripe_mask(batch=1, heads=8, *, causal=False):
    generator = torch.Generator().manual_seed(heads)
    groups = LENGTH // 64
    seen = torch.rand(batch, heads, groups, LENGTH, generator=generator) < 0.2
    seen[..., 128:192] = False  # there the runs may be
    listed = StripeMask.from_columns(seen, LENGTH, 64)
    starts = torch.randint(128, 129, (batch, heads, groups, 1), generator=generator).int()
    counts = torch.randint(0, 2, (batch, heads, groups), generator=generator).int()
    mask = StripeMask(
        listed.columns, listed.counts, LENGTH, LENGTH, 64, starts, counts, causal=causal
    )
    mask.validate()
    return mask


def top_blocks(q, k):
    """A causal mask that depends on the values."""
    grid = BlockGrid.of(q, k, 64, 64, causal=True)
    scores = sparse_fmha.selection.block_scores(q, k, grid)
    return grid.mask(sparse_fmha.selection.top_k_blocks(scores, 2) | grid.diagonal())


def agrees(ranks, call, function, tensors, mask=None, shard=None, tolerance=(1e-5, 1e-6), **kw):
    """call on this rank's parts gives this rank's parts of function on the whole."""
    shard = shard or ranks.part
    arguments = () if mask is None else (mask,)
    whole = function(*tensors, *arguments, return_lse=True, **kw.pop("whole", kw))
    parts = call(*(shard(x) for x in tensors), mask=mask, return_lse=True, **kw)
    for part, expected in zip(parts, whole, strict=True):
        assert part.dtype == expected.dtype
        assert part.is_contiguous()
        rtol, atol = tolerance
        torch.testing.assert_close(part, shard(expected), rtol=rtol, atol=atol)
        assert expected.isfinite().any()


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
def masks_made_from_scores(ranks):
    for heads_kv in (8, 4):
        q, k, v = qkv(heads_kv=heads_kv)
        mask = top_blocks(q, k)
        assert 0 < mask.block_density < 0.5
        expected = sparse_fmha.block_sparse_attention(q, k, v, mask)
        parts = [ranks.part(x) for x in (q, k, v)]
        ranks.same(sd.ulysses(*parts, mask=top_blocks), expected)
        ranks.same(sd.all_gather_kv(*parts, mask=top_blocks, causal=True), expected)
        parts = [sd.zigzag_shard(x) for x in (q, k, v)]
        out = sd.all_gather_kv(*parts, mask=top_blocks, causal=True, zigzag=True)
        torch.testing.assert_close(out, sd.zigzag_shard(expected))


@case(2, 4)
def ulysses_mask_of_the_heads_of_a_rank(ranks):
    mask = block_mask(2, 8)
    local = 8 // ranks.world
    blocks = mask.blocks()[:, ranks.rank * local :][:, :local]
    own = BlockMask.from_blocks(blocks, LENGTH, LENGTH, 64, 32)
    whole = BlockMask.from_blocks(mask.blocks(), LENGTH, LENGTH, 64, 32)
    out = sd.ulysses(*(ranks.part(x) for x in qkv()), mask=own)
    ranks.same(out, sparse_fmha.block_sparse_attention(*qkv(), whole))


@case(2)
def autocast(ranks):
    parts = [ranks.part(x) for x in qkv()]
    for call in (sd.ulysses, sd.all_gather_kv):
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*parts)
            expected = sparse_fmha.attention(*qkv())
        assert out.dtype == torch.bfloat16
        ranks.same(out, expected, rtol=2e-2, atol=2e-2)


@case(2, 4)
def ulysses_skipping(ranks):
    for value in (0.3, torch.tensor([0.3, 0.0, 0.1, 0.9])):
        agrees(ranks, sd.ulysses, sparse_fmha.attention, skipped_qkv(), skip_threshold=value)


@case(2, 4)
def all_gather_dense_and_causal(ranks):
    for heads, heads_kv in ((8, 4), (3, 1), (5, 5)):
        for causal in (False, True):
            tensors = qkv(heads, heads_kv)
            agrees(ranks, sd.all_gather_kv, sparse_fmha.attention, tensors, causal=causal)


@case(2, 4)
def all_gather_other_number_of_keys(ranks):
    # With fewer keys than queries the first ones see nothing, on some ranks all.
    for length_kv in (64, 768):
        for zigzag in (False, True):
            tensors = qkv(batch=1, length_kv=length_kv)
            agrees(
                ranks, sd.all_gather_kv, sparse_fmha.attention, tensors, causal=True,
                shard=sd.zigzag_shard if zigzag else None, whole={"causal": True}, zigzag=zigzag,
            )  # fmt: skip


@case(2, 4)
def all_gather_dtypes(ranks):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        eps = torch.finfo(dtype).eps
        agrees(
            ranks, sd.all_gather_kv, sparse_fmha.attention, qkv(dtype=dtype),
            tolerance=(4 * eps, 4 * eps), causal=True,
        )  # fmt: skip


@case(2, 4)
def all_gather_zigzag(ranks):
    for causal in (False, True):
        for batch in (1, 2):
            agrees(
                ranks, sd.all_gather_kv, sparse_fmha.attention, qkv(batch=batch), causal=causal,
                shard=sd.zigzag_shard, zigzag=True, whole={"causal": causal},
            )  # fmt: skip


@case(2, 4)
def all_gather_masks(ranks):
    for causal in (False, True):
        for batch, heads in ((1, 1), (2, 8)):
            # On 4 ranks a chunk of the zig-zag order is one block of queries.
            mask = block_mask(batch, heads, causal=causal)
            stripes = stripe_mask(batch, heads, causal=causal)
            functions = sparse_fmha.block_sparse_attention, sparse_fmha.stripe_attention
            for function, of in zip(functions, (mask, stripes), strict=True):
                for zigzag in (False, True):
                    agrees(
                        ranks, sd.all_gather_kv, function, qkv(), of, whole={}, zigzag=zigzag,
                        shard=sd.zigzag_shard if zigzag else None,
                    )  # fmt: skip


@case(2, 4)
def all_gather_masks_with_ragged_keys(ranks):
    # Key blocks of 128 where chunks have 64 queries, and other numbers of keys than of queries.
    for length_kv in (LENGTH, 320, 1024):
        mask = block_mask(block_kv=128, causal=True, length_kv=length_kv)
        agrees(
            ranks, sd.all_gather_kv, sparse_fmha.block_sparse_attention, qkv(length_kv=length_kv),
            mask, whole={}, zigzag=True, shard=sd.zigzag_shard,
        )  # fmt: skip


@case(2, 4)
def all_gather_skipping_where_chunks_are_groups_of_rows(ranks):
    agrees(
        ranks, sd.all_gather_kv, sparse_fmha.attention, skipped_qkv(), skip_threshold=0.3
    )  # fmt: skip


@case(2, 4)
def zigzag_order(ranks):
    x = torch.arange(3 * 16).view(3, 16)
    part = sd.zigzag_shard(x)
    chunks = x.chunk(2 * ranks.world, 1)
    expected = torch.cat([chunks[ranks.rank], chunks[2 * ranks.world - 1 - ranks.rank]], 1)
    assert part.equal(expected)
    assert sd.zigzag_unshard(part).equal(x)
    assert sd.zigzag_unshard(sd.zigzag_shard(x.t(), 0), 0).equal(x.t())
    assert sd.zigzag_unshard(sd.zigzag_shard(x, -1), -1).equal(x)
    assert sd.zigzag_unshard(sd.zigzag_shard(x[:, :0])).shape == (3, 0)


@case(2)
def no_tokens(ranks):
    parts = [x[:, :0] for x in qkv()]
    for call, options in (
        (sd.ulysses, {}),
        (sd.all_gather_kv, {}),
        (sd.all_gather_kv, {"causal": True, "zigzag": True}),
    ):
        out, lse = call(*parts, return_lse=True, **options)
        assert (out.shape, lse.shape) == ((2, 0, 8, 16), (2, 0, 8))


@case(2, 4)
def zigzag_balances_the_pairs(ranks):
    """The same number of pairs on each rank; in the plain order the last has most."""
    pairs = {}
    for zigzag in (False, True):
        counted = 0

        def count(q, k, v, **options):
            nonlocal counted
            rows, keys = q.shape[1], k.shape[1]
            counted += int(sparse_fmha.reference.causal_mask(rows, keys).sum())
            return sparse_fmha.attention(q, k, v, **options)

        shard = sd.zigzag_shard if zigzag else ranks.part
        parts = [shard(x) for x in qkv()]
        sd.all_gather_kv(*parts, count, causal=True, zigzag=zigzag)
        found = [None] * ranks.world
        dist.all_gather_object(found, counted)
        assert sum(found) == LENGTH * (LENGTH + 1) // 2
        pairs[zigzag] = found
    assert len(set(pairs[True])) == 1
    assert max(pairs[False]) > 1.4 * max(pairs[True])


@case(4)
def meshes_and_groups(ranks):
    """The sequence over one dimension of a mesh, other sequences over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    q, k, v = (x[mesh.get_local_rank("dp")][None] for x in qkv())
    expected = sparse_fmha.attention(q, k, v, causal=True)
    here = mesh.get_local_rank("cp")
    for group in (mesh["cp"], mesh.get_group("cp")):
        parts = [x.chunk(2, 1)[here] for x in (q, k, v)]
        for call in (sd.ulysses, sd.all_gather_kv):
            out = call(*parts, causal=True, group=group)
            torch.testing.assert_close(out, expected.chunk(2, 1)[here])
        parts = [sd.zigzag_shard(x, group=group) for x in (q, k, v)]
        out = sd.all_gather_kv(*parts, causal=True, zigzag=True, group=group)
        torch.testing.assert_close(sd.zigzag_unshard(out, group=group), expected)


@case(2, 4)
def bytes_sent(ranks):
    """What docs/distributed.md says each rank sends to the others."""
    sent = 0
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_to_all, all_gather = dist.all_to_all_single, getattr(dist, gather)

    def counting_all_to_all(output, tensor, **kwargs):
        nonlocal sent
        sent += tensor.nbytes * (ranks.world - 1) // ranks.world
        return all_to_all(output, tensor, **kwargs)

    def counting_all_gather(output, tensor, **kwargs):
        nonlocal sent
        sent += tensor.nbytes * (ranks.world - 1)
        return all_gather(output, tensor, **kwargs)

    share = LENGTH * 16 * 4 // ranks.world  # bytes of a head on a rank
    others = ranks.world - 1
    with (
        mock.patch.object(dist, "all_to_all_single", counting_all_to_all),
        mock.patch.object(dist, gather, counting_all_gather),
    ):
        for heads_kv in (8, 4, 1):
            parts = [ranks.part(x) for x in qkv(heads_kv=heads_kv, batch=1)]
            sent = 0
            sd.ulysses(*parts, validate=False)
            moved = 2 * 8 + 2 * max(heads_kv, ranks.world)
            assert sent == share * moved * others // ranks.world
            sent = 0
            sd.all_gather_kv(*parts, validate=False)
            assert sent == share * 2 * heads_kv * others


@case(2)
def full_mask_object_is_left_alone(ranks):
    mask = BlockMask.from_blocks(torch.ones(1, 1, 8, 8, dtype=torch.bool), LENGTH, LENGTH, 64, 64)
    before = mask.counts.clone()
    parts = [ranks.part(x) for x in qkv()]
    out = sd.all_gather_kv(*parts, mask=mask)
    ranks.same(out, sparse_fmha.attention(*qkv()))
    assert (mask.q_len, mask.counts.equal(before)) == (LENGTH, True)
