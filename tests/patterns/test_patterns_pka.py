"""PKA against its definition: one softmax over text, image, aligned and keyword-scoped keys."""

import pytest
import torch
from dispatch_watch import Watch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_fmha import patterns, reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens, kv_len, subject=50, conditions=2, dtype=torch.float32):
    def keys(length, seed):
        return tuple(normal(2, length, 2, 16, seed=seed + n).to(dtype) for n in range(2))

    q, own = normal(2, tokens, 4, 16).to(dtype), keys(kv_len, 1)
    return q, own, [keys(tokens, 10 + n) for n in range(conditions)], keys(subject, 30)


def definition(q, own, grid, spatial, window, subject, rows, joint, scale=None):
    """Masks token by token over all keys behind each other."""
    tokens = q.shape[1]
    near = reference.neighborhood_mask(grid, window)
    masks = [torch.ones(tokens, own[0].shape[1], dtype=torch.bool).expand(2, 1, -1, -1)]
    masks += [near.expand(2, 1, -1, -1) for _ in spatial]
    keys = [own, *spatial]
    if subject is not None:
        scoped = torch.ones(1, tokens, dtype=torch.bool) if rows is None else rows
        scoped = scoped[:, None, :, None].expand(2, 1, -1, subject[0].shape[1])
        masks.append(scoped)
        keys.append(subject)
    if joint:
        k, v = (torch.cat(each, 1) for each in zip(*keys, strict=True))
        return reference.attention(q, k, v, torch.cat(masks, -1), scale)[0]
    return sum(
        reference.attention(q, *each, m, scale)[0] for each, m in zip(keys, masks, strict=True)
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("grid", "window", "scale", "several"),
    [((12, 13), 1, None, True), ((12, 13), (3, 5), 0.5, False), ((150,), 7, None, True)],
)
def test_definition(grid, window, scale, several, joint):
    tokens = torch.Size(grid).numel()
    q, own, spatial, subject = inputs(tokens, tokens + 20)
    rows = normal(2 if several else 1, tokens, seed=5) > 0.5
    rows[:, 64:128] = False  # a block without any
    options = {"spatial": spatial, "window": window, "subject": subject, "rows": rows}
    with Watch():
        out = patterns.pka_attention(q, *own, grid, **options, joint=joint, scale=scale)
    expected = definition(q, own, grid, **options, joint=joint, scale=scale)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    assert 0 < rows.sum() < rows.numel()


def test_fewer_parts():
    q, own, spatial, subject = inputs(120, 130)
    for given in ({}, {"spatial": spatial[:1]}, {"subject": subject}):
        out = patterns.pka_attention(q, *own, (10, 12), **given)
        more = {"spatial": [], "subject": None, "rows": None, "window": 1, "joint": True} | given
        expected = definition(q, own, (10, 12), **more)
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_a_window_of_one_alone_adds_the_values():
    q, own, spatial, _ = inputs(120, 130)
    with_condition = patterns.pka_attention(q, *own, (10, 12), spatial=spatial[:1], joint=False)
    without = patterns.pka_attention(q, *own, (10, 12))
    values = spatial[0][1].repeat_interleave(2, 2)
    torch.testing.assert_close(with_condition - without, values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_gradients(window):
    q, own, spatial, subject = inputs(80, 90, dtype=torch.float64)
    rows = normal(2, 80, seed=5) > 0.5
    leaves = [x.requires_grad_() for x in (q, *own, *spatial[0], *spatial[1], *subject)]
    options = {"spatial": spatial, "window": window, "subject": subject, "rows": rows}
    weight = normal(2, 80, 4, 16, seed=6)
    out = patterns.pka_attention(q, *own, (8, 10), **options)
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    expected = definition(q, own, (8, 10), **options, joint=True)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("window", [(1, 1), 3])
def test_all_conditions_together(window):
    """The number of ops does not grow with the conditions, but by what joins their results."""
    q, own, spatial, _ = inputs(120, 130, conditions=16)
    counts = []
    for n in (2, 16):
        with Counted() as seen, torch.no_grad():
            patterns.pka_attention(q, *own, (10, 12), spatial=spatial[:n], window=window)
        counts.append(seen.ops)
    assert counts[1]["attention"] == counts[0]["attention"]
    if window == (1, 1):
        assert counts[1] == counts[0]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = {"attention": 0, "other": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops["attention" if func.namespace == "sparse_fmha" else "other"] += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    q, own, spatial, _ = inputs(156, 170, conditions=5, dtype=dtype)
    out = patterns.pka_attention(q, *own, (12, 13), spatial=spatial)
    assert out.dtype == dtype
    expected = definition(q, own, (12, 13), spatial, 1, None, None, True)
    keys = [torch.cat(each, 1) for each in zip(own, *spatial, strict=True)]
    seen = [torch.ones(156, 170, dtype=torch.bool)] + 5 * [torch.eye(156, dtype=torch.bool)]
    heads_first = (x.transpose(1, 2) for x in (q, *keys))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.cat(seen, 1), enable_gqa=True
    ).transpose(1, 2)
    error, allowed = ((x.double() - expected).abs().max() for x in (out, theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_keyword_rows(threshold):
    q, k = 2 * normal(2, 2, 4, 16), normal(2, 90, 2, 16, seed=1)
    with Watch():
        rows = patterns.keyword_rows(q, k, threshold=threshold)
    keys = k.double().repeat_interleave(2, 2)
    shares = (torch.einsum("bihd,bjhd->bhij", q.double(), keys) / 4).softmax(-1).mean((1, 2))
    for b in range(2):
        low, high = shares[b].min(), shares[b].max()
        for n in range(90):
            assert rows[b, n] == ((shares[b, n] - low) / (high - low) > threshold)
    assert rows.any(1).all()


Q = normal(1, 64, 2, 16)
KV = (Q, Q)
A = patterns.pka_attention


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: A(Q, Q, Q, (8, 9)),
            ValueError,
            r"grid must have one to three axes and the 64 tokens of q, got \[8, 9\]",
        ),
        (lambda: A(Q, Q, Q, (64, 0)), ValueError, r"grid\[1\] must be at least 1, got 0"),
        (
            lambda: A(Q, Q, Q, (8, 8), rows=Q[0, :, 0] > 0),
            ValueError,
            "subject must be given with rows, got only the latter",
        ),
        (
            lambda: A(Q, Q, Q, (8, 8), spatial=[(Q[:, 1:], Q[:, 1:])]),
            ValueError,
            r"spatial\[0\] must have the 64 tokens of grid, got 63",
        ),
        (
            lambda: A(Q, Q, Q, (8, 8), spatial=[KV, (Q[:, :, :1], Q[:, :, :1])]),
            ValueError,
            r"spatial\[1\] must have the shape of spatial\[0\], \[1, 64, 2, 16\], got "
            r"\[1, 64, 1, 16\]",
        ),
        (
            lambda: A(Q, Q, Q, (8, 8), spatial=[(Q, Q.double())]),
            TypeError,
            r"v must have q's dtype, torch\.float32, got torch\.float64",
        ),
        (lambda: A(Q, Q, Q, (8, 8), spatial=[KV], window=9), ValueError, r"window\[0\]"),
        (
            lambda: A(Q, Q, Q, (8, 8), spatial=[KV], window=(1, 1, 1)),
            ValueError,
            "window must have one entry for each of q's 2 token axes",
        ),
        (
            lambda: A(Q, Q, Q, (8, 8), subject=KV, rows=Q),
            TypeError,
            r"rows must be a bool tensor, got torch\.float32",
        ),
        (
            lambda: A(Q, Q, Q, (8, 8), subject=KV, rows=torch.ones(1, 63) > 0),
            ValueError,
            r"rows must have shape \[1 or 1, 64\], got \[1, 63\]",
        ),
        (lambda: A(Q, Q, Q, (8, 8), joint=1), TypeError, "joint must be True or False, got 1"),
        (
            lambda: patterns.keyword_rows(Q, Q, threshold=2),
            ValueError,
            "threshold must be from 0 to 1, got 2",
        ),
        (
            lambda: patterns.keyword_rows(Q[:, :0], Q),
            ValueError,
            "q and k must have at least 1 token, got 0 and 64",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
