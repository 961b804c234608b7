"""In place of a bias of list entries and of an epilogue: one softmax of keys of several levels."""

import math

import pytest
import torch

from sparse_fmha import BlockMask, block_sparse_attention, patterns, score_sums

TOKENS, BLOCK, DIM = 512, 128, 32


def inputs(heads=(2, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, TOKENS, h, DIM) for h in (heads[0], heads[1], heads[1])]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def one_softmax(q, k, v, levels):
    """Attention over the pyramid, pair by pair, from its definition."""
    logits, values = [], []
    for level in (1, 2, 4, 8):
        keys, vals = (x.unflatten(1, (-1, level)).mean(2) for x in (k, v))
        keys, vals = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (keys, vals))
        scores = torch.einsum("bihd,bjhd->bhij", q, keys) * DIM**-0.5 + math.log(level)
        seen = (levels == level).repeat_interleave(BLOCK, 2)
        seen = seen.repeat_interleave(BLOCK // level, 3)
        logits.append(scores.masked_fill(~seen, -torch.inf))
        values.append(vals)
    shares = torch.cat(logits, 3).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", shares, torch.cat(values, 1))


def by_key_bias(q, k, v, levels):
    """One call over the keys of all levels, in lists of 16 keys, with ln h as a bias of keys."""
    keys, values, biases, seen = [], [], [], []
    for level in (1, 2, 4, 8):
        pooled = [x.unflatten(1, (-1, level)).mean(2) for x in (k, v)]
        keys.append(pooled[0])
        values.append(pooled[1])
        biases.append(torch.full((TOKENS // level,), math.log(level), dtype=torch.float32))
        seen.append((levels == level).repeat_interleave(BLOCK // level // 16, 3))
    mask = BlockMask.from_blocks(torch.cat(seen, 3), TOKENS, TOKENS * 15 // 8, BLOCK, 16)
    bias = torch.cat(biases).expand(1, 1, -1)
    return block_sparse_attention(q, torch.cat(keys, 1), torch.cat(values, 1), mask, key_bias=bias)


@pytest.mark.parametrize(
    "attend",
    [by_key_bias, lambda q, k, v, levels: patterns.psa_attention(q, k, v, levels)],
    ids=["key_bias", "psa_attention"],
)
def test_pooled_keys_of_all_levels_are_one_softmax(attend):
    """Outputs and gradients; a bias of the wrong sign or of another level's would differ."""
    some = inputs()
    choice = torch.randint(5, (1, 2, 4, 4), generator=torch.Generator().manual_seed(3))
    levels = torch.tensor([0, 1, 2, 4, 8])[choice]
    levels[..., 0] = 8
    weight = torch.randn(1, TOKENS, 2, DIM, generator=torch.Generator().manual_seed(4)).double()
    found = []
    for each in (attend, one_softmax):
        out = each(*some, levels)
        found.append((out.detach(), *torch.autograd.grad((out * weight).sum(), some)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [512, 460, 100])
@pytest.mark.parametrize("trains", [False, True])
def test_rows_are_scaled_and_added_to(tokens, trains):
    """Rectified SpaAttn: scale * attention over the mask + rest @ means, by its definition."""
    q, k, v = (x.detach()[:, :tokens] for x in inputs(heads=(2, 2)))
    alike = 2 * torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(7)).double()
    q, k = (
        x + y.repeat_interleave(BLOCK, 0)[None, :tokens, None]
        for x, y in zip((q, k), alike, strict=True)
    )
    v.requires_grad_(trains)
    plan = patterns.rectified(q, k, keep=0.5, theta=0.0)
    assert (plan.rest > 0).any() or tokens < BLOCK
    out = patterns.rectified_attention(q, k, v, plan=plan)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * DIM**-0.5
    shares = scores.masked_fill(~plan.mask.to_dense(), -torch.inf).softmax(-1)
    sparse = torch.einsum("bhij,bjhd->bhid", shares, v)
    means = torch.stack([x.mean(1) for x in v.split(BLOCK, 1)], 2)
    factor = plan.scale.double().repeat_interleave(BLOCK, 2)[:, :, :tokens, None]
    added = (plan.rest.double() @ means).repeat_interleave(BLOCK, 2)[:, :, :tokens]
    expected = (sparse * factor + added).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if trains:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(8)).double()
        ours, theirs = (torch.autograd.grad((x * weight).sum(), v)[0] for x in (out, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sums_are_those_of_the_map():
    """The uses in the docs: sums that grow by a query, sums among image tokens, maps of words."""
    q, k, _ = (x.detach().float() for x in inputs(heads=(4, 2)))
    wide = k.repeat_interleave(2, 2)

    def shares(q, k, causal):
        scores = torch.einsum("bihd,bjhd->bhij", q, k).double() * DIM**-0.5
        if causal:
            past = 1 + k.shape[1] - q.shape[1]
            hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(past)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1)

    def alike(found, expected):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)

    # H2O
    before = score_sums(q[:, :-1], k[:, :-1], causal=True, group="mean")
    heavy = torch.nn.functional.pad(before, (0, 1)) + score_sums(q[:, -1:], k, group="mean")
    alike(heavy, shares(q, wide, True).sum(2).unflatten(1, (2, 2)).mean(2))
    # VisionDrop
    image = slice(16, 400)
    alike(score_sums(q[:, image], k[:, image]), shares(q[:, image], wide[:, image], False).sum(2))
    # maps of words
    words = slice(0, 21)
    whole = shares(q, wide[:, words], False)
    alike(score_sums(q, k[:, words], reduce="blocks_sum", block_q=1, block_kv=1), whole)
    alike(
        score_sums(q, k[:, words], reduce="blocks_sum", block_q=32, block_kv=1),
        whole.unflatten(2, (-1, 32)).sum(3),
    )
