"""Stages of lists of blocks and stripes, in the order in which 64 rows visit them."""

import torch


def block_tiles(mask, b, h, tile_k):
    """Stages of `tile_k` keys for each 64 rows of one head, [groups, Lkv]."""
    result = []
    for group in range(-(-mask.q_len // 64)):
        row = group * 64 // mask.block_q

        def listed(counts, indices, row):
            return indices[b, h, row, : counts[b, h, row]].tolist() if row < mask.blocks_q else []

        full = listed(mask.counts, mask.indices, row)
        partial = listed(mask.partial_counts, mask.partial_indices, row)
        if mask.block_q == 64:
            other = listed(mask.counts, mask.indices, row ^ 1)
            streams = [sorted(set(full) & set(other)), partial + sorted(set(full) - set(other))]
        else:
            streams = [partial + full]
        firsts = [[block * mask.block_kv for block in stream] for stream in streams]
        result.append(ranked(firsts, tile_k, mask.block_kv, mask.kv_len))
    return torch.stack(result)


def stripe_tiles(mask, b, h, tile_k):
    """The same for a StripeMask: its runs, then its columns."""
    result = []
    for group in range(-(-mask.q_len // 64)):
        at = b, h, group * 64 // mask.block_q
        runs = []
        if mask.range_starts is not None:
            runs = mask.range_starts[at][: mask.range_counts[at]].tolist()
        ranks = ranked([runs], tile_k, mask.range_size, mask.kv_len)
        listed = mask.columns[at][: mask.counts[at]].long()
        for i in range(0, len(listed), tile_k):
            ranks[listed[i : i + tile_k]] = ranks.max() + 1
        result.append(ranks)
    return torch.stack(result)


def ranked(streams, tile_k, size, kv_len):
    """Ranks of keys, where tiles hold runs of `size` keys, or parts; each stream ends a tile."""
    ranks, rank = torch.full((kv_len,), -1), 0
    part = min(size, tile_k)
    for stream in streams:
        parts = [first + n for first in stream for n in range(0, size, part)]
        for i in range(0, len(parts), tile_k // part):
            for first in parts[i : i + tile_k // part]:
                ranks[first : first + part] = rank
            rank += 1
    return ranks
