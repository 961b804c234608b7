"""Sums and maxima of probabilities by the whole map in fp64."""

import torch


def probabilities(q, k, causal, scale, lse=None):
    """[B, Hq, Lq, Lkv] in fp64; a row that sees nothing, or with an lse of -inf, is 0."""
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.double(), keys)
    if causal:
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores[..., ~seen] = -torch.inf
    if lse is None:
        return scores.softmax(-1).nan_to_num(0)
    lse = lse.double().masked_fill(lse == -torch.inf, torch.inf)
    return (scores - lse.transpose(1, 2)[..., None]).exp()


def reduced(map_, reduce, rows, block_q, block_kv):
    """By loops over diagonals and blocks of a map [B, H, Lq, Lkv]."""
    q_len, kv_len = map_.shape[2:]
    used = map_[:, :, max(0, q_len - rows) :]
    if reduce == "columns":
        return used.sum(2)
    if reduce == "diagonals":
        shift = kv_len - used.shape[2]  # of the used queries
        sums = [used.diagonal(shift - s, 2, 3).sum(-1) for s in range(kv_len)]
        return torch.stack(sums, -1)
    over = torch.sum if reduce == "blocks_sum" else torch.amax
    return torch.stack(
        [
            torch.stack([over(part, (2, 3)) for part in band.split(block_kv, 3)], -1)
            for band in used.split(block_q, 2)
        ],
        2,
    )
