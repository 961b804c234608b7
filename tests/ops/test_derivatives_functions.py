"""Derivatives of the public functions: those of ops, and by `merge`."""

import pytest
import torch
from derivative_ways import WAYS, lacking
from torch import func
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask
from sparse_fmha._ops import derivatives
from sparse_fmha.patterns.anchor import anchor_attention, distant_keys

TORCH_SDPA = torch.nn.functional.scaled_dot_product_attention


def block_sparse(q, k, v, **options):
    mask = BlockMask.from_blocks(torch.ones(1, 1, 2, 2).bool(), 100, 100, 64, 64)
    return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)


def stripe(q, k, v, **options):
    columns = torch.arange(10, dtype=torch.int32).expand(1, 1, 2, 10)
    mask = StripeMask(columns, torch.full((1, 1, 2), 10, dtype=torch.int32), 100, 100, 64)
    return sparse_fmha.stripe_attention(q, k, v, mask, **options)


def neighborhood(q, k, v, extra_k, extra_v, **options):
    extra = {"extra_k": extra_k, "extra_v": extra_v}
    return sparse_fmha.neighborhood_attention(q, k, v, 9, **extra, **options)


# The ops that a function may run, and itself.
ATTENTION = {
    "fmha": sparse_fmha.attention,
    "neighborhood": neighborhood,
    "block_sparse": block_sparse,
    "stripe": stripe,
}
ASKED = ("jvp", "forward_ad", "vjp", "vmap of grad", "hessian", "backward")


def inputs(randn, name):
    lengths = (100,) * 3 + ((4, 4) if name == "neighborhood" else ())
    return [randn(2, length, 2, 8, seed=i) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(randn, name, threshold, way):
    tensors = inputs(randn, name)
    for place, x in enumerate(tensors):
        for output in range(2):

            def attend(x, place=place, output=output):
                args = [*tensors[:place], x, *tensors[place + 1 :]]
                options = {"skip_threshold": threshold, "return_lse": True}
                return ATTENTION[name](*args, **options)[output]

            message = lacking(way, f"{name}_fwd" + (" that skips" if threshold else ""))
            if message is None:
                assert WAYS[way](attend, x).abs().sum() > 0 or (place in (2, 4) and output == 1)
                continue
            with pytest.raises(NotImplementedError, match=message):
                WAYS[way](attend, x)


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("name", ATTENTION)
def test_thresholds(randn, name, way):
    tensors = inputs(randn, name)

    def attend(threshold):
        return ATTENTION[name](*tensors, skip_threshold=threshold)

    message = lacking(way, f"{name}_fwd that skips", "skip_threshold")
    with pytest.raises(NotImplementedError, match=message):
        WAYS[way](attend, torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("way", ASKED)
def test_anchor_attention(randn, way):
    q, k, v = (randn(1, 700, 1, 8, seed=i) for i in range(3))
    for f in (
        lambda x: anchor_attention(x, k, v, step=1, block=64, width=200).out,
        lambda x: anchor_attention(q, k, x, step=1, block=64, width=200).out,
        lambda x: anchor_attention(q, x, v, step=1, block=64, width=200, recall=True).recall,
    ):
        if lacking(way, "fmha_fwd") is None:
            assert WAYS[way](f, q).isfinite().all()
            continue
        with pytest.raises(NotImplementedError, match=r"sparse_fmha::.*_fwd has no forward-mode"):
            WAYS[way](f, q)


def test_the_choice_of_distant_keys_has_no_derivative(randn):
    q, k = (randn(1, 400, 1, 8, seed=i) for i in range(2))

    def columns(q):
        return distant_keys(q, k, 0.0, 1, 64, 0.3, None)[0]

    found, tangent = func.jvp(columns, (q,), (q,))
    assert found.equal(columns(q))
    assert not tangent.any()
    assert not columns(q.requires_grad_()).requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_sdpa(randn, way):
    q = randn(2, 2, 20, 8)
    message = lacking(way, "fmha_fwd")
    if message is None:
        with sdpa_kernel(SDPBackend.MATH):
            expected = WAYS[way](lambda x: TORCH_SDPA(q, x, q), q)
        found = WAYS[way](lambda x: sparse_fmha.sdpa(q, x, q), q)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    tangent = "|sparse_fmha.sdpa: key must not have a tangent: forward-mode derivatives are not"
    with pytest.raises(NotImplementedError, match=f"^({message}{tangent})"):
        WAYS[way](lambda x: sparse_fmha.sdpa(q, x, q), q)


@pytest.mark.parametrize("way", WAYS)
def test_routed_calls_inside_transforms_are_left_to_torch(randn, way):
    """Plain gradients are routed; of a second one torch says that the op has none."""
    q = randn(1, 1, 5, 8)
    with sdpa_kernel(SDPBackend.MATH):
        expected = WAYS[way](lambda x: TORCH_SDPA(x, q, q), q)
        with sparse_fmha.route_sdpa() as routes:
            if way in ("backward twice", "functional.hessian"):
                with pytest.raises(NotImplementedError, match="fmha_bwd has no backward pass"):
                    WAYS[way](lambda x: TORCH_SDPA(x, q, q), q)
                return
            found = WAYS[way](lambda x: TORCH_SDPA(x, q, q), q)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # vjp and linearize also compute f alone.
    assert routes.routed == (1 if way in ("vjp", "linearize", "backward") else 0)
    reasons = ("key must not have", "query must not have", "inside a transform")
    assert all(reason.startswith(reasons) for reason in routes.left)
    assert routes.left.total() == (0 if way == "backward" else 1)


def test_what_asks_for_a_derivative():
    """Under nested transforms, whichever is the inner one."""
    x = torch.randn(2, 3)
    seen = []

    def look(y):
        seen.append(derivatives.requires_grad(y) or derivatives.has_tangent(y))
        return y * 2

    func.grad(lambda x: func.vmap(look)(x).sum())(x)
    func.jvp(func.vmap(look), (x,), (x,))
    func.jvp(func.grad(lambda x: look(x).sum()), (x,), (x,))
    torch.no_grad()(func.jvp)(look, (x,), (x,))
    look(x.clone().requires_grad_())
    assert seen == [True] * 5
    seen.clear()
    func.vmap(look)(x)
    func.jvp(lambda y: look(x) + y, (x,), (x,))
    torch.no_grad()(look)(x.clone().requires_grad_())
    assert seen == [False] * 3


def parts(randn, empty):
    """outs, lses in fp64 and which keys are hidden: all of them for some queries, if `empty`."""
    outs = tuple(randn(1, 3, 2, 4, dtype=torch.float64, seed=i) for i in range(3))
    lses = tuple(randn(1, 3, 2, dtype=torch.float64, seed=i) for i in range(3, 6))
    hidden = torch.zeros(3, 1, 3, 2).bool()
    hidden[0, :, 0] = True
    hidden[:, :, 1, 0] = empty
    return outs, lses, hidden


@pytest.mark.parametrize("empty", [False, True])
def test_merge(randn, empty):
    """First and second derivatives, in both modes, against differences."""
    outs, lses, hidden = parts(randn, empty)
    tensors = [x.requires_grad_() for x in (*outs, *lses)]

    def merge(*tensors):
        lses = [x.masked_fill(h, -torch.inf) for x, h in zip(tensors[3:], hidden, strict=True)]
        out, lse = sparse_fmha.merge(tensors[:3], lses)
        return out, lse.masked_fill(hidden.all(0), 0)

    torch.autograd.gradcheck(merge, tensors, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(merge, tensors, check_fwd_over_rev=True)


def test_merge_of_a_query_without_keys(randn):
    outs, lses, hidden = parts(randn, True)
    lses = tuple(x.masked_fill(h, -torch.inf) for x, h in zip(lses, hidden, strict=True))
    (out, lse), pullback = func.vjp(sparse_fmha.merge, outs, lses)
    gradients = pullback((torch.ones_like(out), torch.ones_like(lse)))
    _, tangents = func.jvp(sparse_fmha.merge, (outs, lses), (outs, outs_like(lses)))
    empty = hidden.all(0)
    assert lse[empty].eq(-torch.inf).all()
    for x in (*gradients[0], *gradients[1], *tangents):
        assert x.isfinite().all()
        assert not x[empty].any()


def outs_like(lses):
    return tuple(torch.ones_like(x) for x in lses)
