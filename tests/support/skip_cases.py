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
    dout, dlse = cotangents(out, lse)
    wanted, wanted_lse, skipped, exact = expected(
        q, k, v, visible, groups, tiles, threshold, dout, dlse, kwargs.get("scale")
    )
    torch.testing.assert_close(out.flatten(1, -3), wanted)
    torch.testing.assert_close(lse.flatten(1, -2).double(), wanted_lse, rtol=1e-6, atol=1e-5)
    assert stats.skipped.equal(skipped)
    visible = visible.expand(q.shape[0], q.shape[-2], *visible.shape[-2:])
    for h in range(q.shape[-2]):
        ranks = behind(tiles[min(h, len(tiles) - 1)])
        pairs = torch.zeros(len(q), int(groups.max()) + 1, int(ranks.max()) + 1)
        for g in range(pairs.shape[1]):
            seen = visible[:, h, groups == g].any(1)
            pairs[:, g] = pairs[:, g].index_add(1, ranks[g], seen.float())
        assert stats.visited[:, h].tolist() == (pairs > 0).sum((1, 2)).tolist()
    found = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    return stats


def expected(q, k, v, visible, groups, tiles, threshold, dout, dlse, scale=None):
    """The reference's out and lse of flattened tokens, the number of tiles that each batch entry
    and head skips, and the gradients of q, k and v. Arguments: see `check`."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    heads, loss, results = q.shape[-2], 0, []
    visible = visible.expand(q.shape[0], heads, *visible.shape[-2:])
    q, k, v = (x.flatten(1, -3) for x in leaves)
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    for h in range(heads):
        one = slice(h, h + 1)
        ranks = behind(tiles[min(h, len(tiles) - 1)])
        given = q[:, :, one], k[:, :, one], v[:, :, one], visible[:, one]
        out, lse, skipped = reference.skip_attention(*given, threshold, groups, ranks, scale)
        there = lse > -torch.inf
        loss = loss + (out * dout.flatten(1, -3)[:, :, one]).sum()
        loss = loss + (lse * dlse.flatten(1, -2)[:, :, one])[there].sum()
        results.append((out.detach(), lse.detach(), skipped.sum((2, 3))))
    outs, all_lse, numbers = zip(*results, strict=True)
    of_heads = torch.cat(outs, 2), torch.cat(all_lse, 2), torch.cat(numbers, 1)
    return *of_heads, torch.autograd.grad(loss, leaves)


def behind(ranks):
    """Keys that are in no tile come behind all others."""
    return torch.where(ranks < 0, ranks.amax(1, keepdim=True) + 1, ranks)


def cotangents(out, lse):
    """Gradients of out and lse; 0 of a lse of -inf, which has none."""
    generator = torch.Generator().manual_seed(9)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse))
    return dout, dlse.masked_fill(lse == -torch.inf, 0)


def rows(length):
    return torch.arange(length) // 64
