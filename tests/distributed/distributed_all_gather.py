"""Cases of `all_gather_kv` and the zig-zag order."""

import torch
import torch.distributed as dist
from distributed_backward import agree
from distributed_inputs import LENGTH, agrees, block_mask, qkv, skipped_qkv, stripe_mask
from distributed_ranks import case

import sparse_fmha
import sparse_fmha.distributed as sd
from sparse_fmha import BlockMask


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
def all_gather_uneven_and_empty(ranks):
    """Also where a rank has queries and no keys, and the lists of rows that are not as many."""
    world = ranks.world
    layouts = [64] + [0] * (world - 2) + [37], [0] * (world - 1) + [101], [101] + [0] * (world - 1)
    for lengths, keys in zip(layouts, reversed(layouts), strict=True):
        queries, of_keys = sd.Shards.of_lengths(lengths), sd.Shards.of_lengths(keys)
        tensors = qkv(length=101)
        for options in ({}, {"causal": True, "slices": 2}):
            causal = options.get("causal", False)
            parts = [
                sd.shard(x, s) for x, s in zip(tensors, (queries, of_keys, of_keys), strict=True)
            ]
            out = sd.all_gather_kv(*parts, **options)
            expected = sparse_fmha.attention(*tensors, causal=causal)
            torch.testing.assert_close(out, sd.shard(expected, queries), rtol=1e-5, atol=1e-6)
            agree(
                ranks, sd.all_gather_kv, sparse_fmha.attention, tensors,
                shard=lambda x, s=queries: sd.shard(x, s), whole={"causal": causal}, **options,
            )  # fmt: skip
    lengths = [64] + [0] * (world - 2) + [LENGTH - 64]
    agrees(
        ranks, sd.all_gather_kv, sparse_fmha.block_sparse_attention, qkv(),
        block_mask(1, 8, causal=True), whole={}, slices=2,
        shard=lambda x: sd.shard(x, sd.Shards.of_lengths(lengths)),
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


@case(2)
def full_mask_object_is_left_alone(ranks):
    mask = BlockMask.from_blocks(torch.ones(1, 1, 8, 8, dtype=torch.bool), LENGTH, LENGTH, 64, 64)
    before = mask.counts.clone()
    parts = [ranks.part(x) for x in qkv()]
    out = sd.all_gather_kv(*parts, mask=mask)
    ranks.same(out, sparse_fmha.attention(*qkv()))
    assert (mask.q_len, mask.counts.equal(before)) == (LENGTH, True)
