"""Sparsifiner's predictor against its definition, and what its losses train."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import block_sparse_attention, reference
from sparse_fmha.patterns import SparsifinerPredictor, sparsifiner_distillation_loss


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictor(tokens=101, heads=4, **options):
    torch.manual_seed(0)
    made = SparsifinerPredictor(tokens, heads, 16, **options)
    with torch.no_grad():  # so that rows differ
        made.up.mul_(3)
        made.down.mul_(30)
    return made


def inputs(tokens=101, heads=(4, 2), seed=0):
    return [normal(2, tokens, h, 16, seed=seed + n) for n, h in enumerate((*heads, heads[1]))]


def coefficients(made, q, k, b, h):
    """C of one head in fp64, all rows."""
    a, c = (x.weight.double().T for x in (made.project_q, made.project_k))
    queries = q[b, :, h].double() @ a + made.project_q.bias.double()
    keys = k[b, :, h * k.shape[2] // q.shape[2]].double() @ c + made.project_k.bias.double()
    scores = queries @ (keys.T @ made.down.double()) / math.sqrt(q.shape[2])
    return scores.softmax(-1)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (101, {}),
        (70, {"keep": 0.5, "rank": 30, "coefficients": 3, "dense_rows": 0}),
        (197, {"reduced_dim": 4, "threshold": 0.0, "dense_rows": 3}),
    ],
)
def test_definition(tokens, options):
    made = predictor(tokens, **options)
    q, k, v = inputs(tokens)
    with Watch():
        mask = made.mask(q, k)
    mask.validate()
    visible = mask.to_dense()
    budget = math.ceil(options.get("keep", 0.25) * tokens)
    dense, most = options.get("dense_rows", 1), options.get("coefficients", 8)
    basis = made.up.double().abs()
    basis = torch.where(basis > options.get("threshold", 0.02), basis, 0)
    scores = made(q, k)
    for b in range(2):
        for h in range(4):
            found = coefficients(made, q, k, b, h)
            expected = found @ made.up.double().T
            torch.testing.assert_close(
                scores[b, h].double(), expected[dense:], atol=1e-5, rtol=1e-4
            )
            for i in range(tokens):
                if i < dense:
                    assert visible[b, h, i].all()
                    continue
                kept = found[i].clone()
                kept[kept < kept.sort().values[-most]] = 0
                row = kept @ basis.T
                seen = visible[b, h, i]
                assert seen.sum() == budget
                assert row[seen].min() >= row[~seen].max() - 1e-6
    out = block_sparse_attention(q, k, v, mask)
    expected, _ = reference.attention(q, k, v, visible)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_training_finds_the_keys_that_matter():
    """Groups of tokens attend to each other: the mask holds more of that after training."""
    tokens, heads = 64, 2
    made = SparsifinerPredictor(tokens, heads, 16, rank=16)
    place = normal(1, 8, heads, 16, seed=3)[:, torch.arange(tokens) % 8]
    torch.manual_seed(1)

    def drawn():
        q, k = (2 * place + 0.3 * torch.randn(4, tokens, heads, 16) for _ in range(2))
        return q, k, torch.einsum("bihd,bjhd->bhij", q, k).mul(0.25).softmax(-1)

    def recall():
        q, k, target = drawn()
        return (made.mask(q, k).to_dense() * target)[:, :, 1:].sum(-1).mean().item()

    before = recall()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = made.reconstruction_loss(*drawn())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert recall() > before + 0.4


def test_the_mask_has_no_gradient_and_attention_has():
    made = predictor()
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = made.mask(q, k)
    block_sparse_attention(q, k, v, mask).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in (q, k, v))
    assert all(p.grad is None for p in made.parameters())


def test_distillation():
    logits, tokens = normal(3, 5).requires_grad_(), normal(3, 7, 4).requires_grad_()
    other, others = normal(3, 5, seed=1), normal(3, 7, 4, seed=2)
    loss = sparsifiner_distillation_loss(logits, other, tokens, others, token_weight=0.25)
    p, t = logits.double().softmax(-1), other.double().softmax(-1)
    expected = 0.5 * (t * (t / p).log()).sum() / 3
    expected = expected + 0.25 * (tokens.double() - others).square().mean()
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    assert tokens.grad.abs().sum() > 0


MADE = predictor()
Q = normal(1, 101, 4, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparsifinerPredictor(0, 4, 16), ValueError, "tokens must be at least 1, got 0"),
        (
            lambda: SparsifinerPredictor(9, 4, 16, keep=2),
            ValueError,
            "keep must be from 0 to 1, got 2",
        ),
        (
            lambda: SparsifinerPredictor(9, 4, 16, rank=0),
            ValueError,
            "rank must be at least 1, got 0",
        ),
        (lambda: SparsifinerPredictor(9, 4, 16, dense_rows=10), ValueError, "at most tokens = 9"),
        (
            lambda: SparsifinerPredictor(9, 4, 16, threshold=-1),
            ValueError,
            "threshold must be from 0 to inf, got -1",
        ),
        (
            lambda: MADE(Q[:, 1:], Q),
            ValueError,
            r"q and k must have 101 tokens, and q 4 heads of 16, got shapes \[1, 100,",
        ),
        (lambda: MADE.mask(Q, Q, block_q=32), ValueError, "block_q must be 64 or 128, got 32"),
        (
            lambda: MADE.reconstruction_loss(Q, Q, Q[0]),
            ValueError,
            r"target must have shape \[batch, heads, tokens, tokens\], got \[101, 4,",
        ),
        (
            lambda: sparsifiner_distillation_loss(Q, Q[:, 1:], Q, Q),
            ValueError,
            r"teacher_logits must have the shape of logits, \[1, 101, 4, 16\], got \[1,",
        ),
        (
            lambda: sparsifiner_distillation_loss(Q, Q, Q, Q, cls_weight=-1),
            ValueError,
            "cls_weight must be from 0 to inf, got -1",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
