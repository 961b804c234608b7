"""Attention with a cap of scores, a bias of keys, thresholds of rows and sinks, in fp64."""

import torch


def visible_with(mask, key_bias, row_threshold=None):
    """The mask `[B|1, H|1, Lq, Lk]` without the keys that a bias or a threshold hides."""
    bias = key_bias[:, :, None]
    seen = mask & (bias != -torch.inf)
    return seen if row_threshold is None else seen & (bias >= row_threshold[..., None])


def capped(scores, softcap):
    return softcap * (scores / softcap).tanh() if softcap else scores


def attend(q, k, v, mask, scale=None, key_bias=None, row_threshold=None, sink=None, softcap=0):
    """out and lse; a lse of -inf stays. Tokens are in one axis."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (
        q.shape[3] ** -0.5 if scale is None else scale
    )
    scores = capped(scores, softcap)
    if key_bias is not None:
        mask = visible_with(mask, key_bias, row_threshold)
        scores = scores + key_bias.double()[:, :, None].masked_fill(
            key_bias[:, :, None] == -torch.inf, 0
        )
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink is not None:
        column = sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    empty = (scores == -torch.inf).all(3, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(3, keepdim=True)
    weights = (scores - lse).exp().masked_fill(empty, 0)[..., : k.shape[1]]
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out, lse.masked_fill(empty, -torch.inf)[..., 0].transpose(1, 2)


def fused(q, k, v, mask, scale=None, key_bias=None):
    """Of attention in fp32: out with the two roundings that a fused kernel cannot avoid."""
    wide = (
        x.float().repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)
    )
    wide_q, wide_k, wide_v = wide
    scores = wide_q @ wide_k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = (scores + key_bias[:, :, None]).masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp().nan_to_num(0)
    total = weights.sum(-1, keepdim=True).clamp(min=1)
    return (weights.to(q.dtype).float() @ wide_v / total).to(q.dtype).transpose(1, 2)
