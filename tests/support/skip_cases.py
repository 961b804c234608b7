"""Inputs whose tiles can be skipped, and what the fp64 reference says of them."""

import torch

from sparse_fmha import reference


def inputs(length=500, kv=None, heads=4, heads_kv=2, dim=64, batch=2, seed=0, value_dim=None):
    """All queries of a head look in one direction, along which runs of 30 keys lie together, so
    that rows agree on what is small; scores spread over some ten natural log units."""
    generator = torch.Generator().manual_seed(seed)
    kv = length if kv is None else kv

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    way = torch.nn.functional.normalize(randn(1, heads_kv, dim), dim=-1)
    along = randn(-(-kv // 30), heads_kv, 1).repeat_interleave(30, 1)[:, :kv]
    q = dim**0.5 * way.repeat_interleave(heads // heads_kv, 2) + 0.1 * randn(length, heads, dim)
    k = 4 * along * way + 0.1 * randn(kv, heads_kv, dim)
    return q, k, randn(kv, heads_kv, value_dim or dim)


def check(function, q, k, v, visible, groups, tiles, threshold, *args, **kwargs):
    """`tiles` [heads, groups, Lkv] ranks the keys; -1 for keys that are in no tile.

    Also gradients, through out and lse, against those of attention to the keys of the kept tiles.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse, stats = function(
        q, k, v, *args, skip_threshold=threshold, return_lse=True, return_stats=True, **kwargs
    )
    heads, leaves, loss = q.shape[-2], (q, k, v), 0
    dout, dlse = cotangents(out, lse)
    visible = visible.expand(q.shape[0], heads, *visible.shape[-2:])
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in flat[1:])
    for h in range(heads):
        one = slice(h, h + 1)
        ranks = tiles[min(h, len(tiles) - 1)]
        last = ranks.amax(1, keepdim=True) + 1  # unseen keys behind all others
        ranks = torch.where(ranks < 0, last, ranks)
        wanted, wanted_lse, skipped = reference.skip_attention(
            flat[0][:, :, one],
            k[:, :, one],
            v[:, :, one],
            visible[:, one],
            threshold,
            groups,
            ranks,
            kwargs.get("scale"),
        )
        there = wanted_lse > -torch.inf
        loss = loss + (wanted * dout.flatten(1, -3)[:, :, one]).sum()
        loss = loss + (wanted_lse * dlse.flatten(1, -2)[:, :, one])[there].sum()
        torch.testing.assert_close(out.flatten(1, -3)[:, :, one], wanted)
        torch.testing.assert_close(
            lse.flatten(1, -2)[:, :, one].double(), wanted_lse, rtol=1e-6, atol=1e-5
        )
        assert stats.skipped[:, h].tolist() == skipped[:, 0].sum((1, 2)).tolist()
        pairs = torch.zeros(len(q), int(groups.max()) + 1, int(ranks.max()) + 1)
        for g in range(pairs.shape[1]):
            seen = visible[:, h, groups == g].any(1)
            pairs[:, g] = pairs[:, g].index_add(1, ranks[g], seen.float())
        assert stats.visited[:, h].tolist() == (pairs > 0).sum((1, 2)).tolist()
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for ours, exact in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-9)
    return stats


def cotangents(out, lse):
    """Gradients of out and lse; 0 of a lse of -inf, which has none."""
    generator = torch.Generator().manual_seed(9)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse))
    return dout, dlse.masked_fill(lse == -torch.inf, 0)


def rows(length):
    return torch.arange(length) // 64
