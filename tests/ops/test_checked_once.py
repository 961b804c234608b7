"""Arguments are checked once: by the op, or by Python where the op does not get them so."""

import pytest
import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask, _checks
from sparse_fmha._ops import autocast

LENGTH = 100
BLOCKS = BlockMask.from_blocks(torch.ones(1, 1, 2, 2).bool(), LENGTH, LENGTH, 64, 64)
STRIPES = StripeMask.from_columns(torch.ones(1, 1, 2, LENGTH).bool(), LENGTH, 64)

FUNCTIONS = {
    "attention": lambda *qkv, **rest: sparse_fmha.attention(*qkv, causal=True, **rest),
    "neighborhood": lambda *qkv, **rest: sparse_fmha.neighborhood_attention(
        *qkv, (9,), stride=2, causal=True, extra_k=qkv[1], extra_v=qkv[2], **rest
    ),
    "block lists": lambda *qkv, **rest: sparse_fmha.block_sparse_attention(*qkv, BLOCKS, **rest),
    "stripes": lambda *qkv, **rest: sparse_fmha.stripe_attention(*qkv, STRIPES, **rest),
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture
def qkv(randn):
    return [randn(2, LENGTH, heads, 16, seed=heads) for heads in (4, 2, 2)]


@pytest.fixture
def checked(monkeypatch):
    """The calls of Python's check of q, k and v."""
    calls = []
    check = _checks.check_qkv

    def counted(*args, **kwargs):
        calls.append(args)
        return check(*args, **kwargs)

    monkeypatch.setattr(_checks, "check_qkv", counted)
    return calls


@functions
def test_by_the_op_alone(qkv, checked, function):
    function(*qkv)
    function(*qkv, scale=0.5, skip_threshold=0.1, return_lse=True, return_stats=True)
    function(torch.nn.Parameter(qkv[0]), *qkv[1:])
    torch.vmap(function)(*(x[None] for x in qkv))
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*qkv).dtype == torch.bfloat16
    assert not checked


@functions
def test_python_says_what_the_op_refused(qkv, checked, function):
    with pytest.raises(ValueError, match=r"^v must have q's batch, 2, got 1") as refused:
        function(*qkv[:2], qkv[2][:1])
    assert len(checked) == 1
    assert refused.value.__suppress_context__  # one reason, not two


@functions
def test_other_errors_of_the_op_stay(qkv, monkeypatch, function):
    def failing(*args):
        raise RuntimeError("out of memory")

    for name in ("fmha", "neighborhood", "block_sparse", "stripe"):
        monkeypatch.setattr(torch.ops.sparse_fmha, f"{name}_fwd", failing)
    with pytest.raises(RuntimeError, match=r"^out of memory"):
        function(*qkv)


class Subclass(torch.Tensor):
    pass


@functions
def test_first_by_python_where_the_op_does_not(qkv, checked, function):
    """As it is traced, and for subclasses; the op has no say in what is wrong there."""
    k = qkv[1][:, :, :, :8]
    message = "k must have q's head dim, 16, got 8"
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        torch.compile(function, backend="eager", fullgraph=True)(qkv[0], k, qkv[2])
    fake = torch._subclasses.FakeTensorMode()
    with fake, pytest.raises(ValueError, match=f"^{message}"):
        function(*map(fake.from_tensor, (qkv[0], k, qkv[2])))
    with pytest.raises(ValueError, match=f"^{message}"):
        function(qkv[0].as_subclass(Subclass), k, qkv[2])
    checked.clear()
    function(qkv[0].as_subclass(Subclass), *qkv[1:])
    assert len(checked) == 1


@pytest.mark.parametrize("mask", [BLOCKS, STRIPES], ids=["block lists", "stripes"])
@pytest.mark.parametrize("place", [0, 1])
def test_lengths_of_masks(qkv, mask, place):
    """The ops do not get them."""
    run = {BLOCKS: sparse_fmha.block_sparse_attention, STRIPES: sparse_fmha.stripe_attention}[mask]
    shorter = [x[:, :99] if (i > 0) == place else x for i, x in enumerate(qkv)]
    with pytest.raises(
        ValueError, match=f"^mask must be for the 99 tokens of {'qk'[place]}, got one for 100"
    ):
        run(*shorter, mask)


@functions
def test_autocast_is_applied_once(qkv, monkeypatch, function):
    casts = []
    cast = autocast.cast

    def counted(*args):
        casts.append(args)
        return cast(*args)

    monkeypatch.setattr(autocast, "cast", counted)
    with torch.autocast("cpu", torch.bfloat16):
        function(*qkv)
    assert len(casts) == 1
