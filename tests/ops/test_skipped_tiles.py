"""What the forward op saves of a call that skips, for its gradients."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sparse_fmha

OPS = torch.ops.sparse_fmha


@pytest.fixture
def leaves(randn):
    return [randn(2, 300, heads, 16, seed=heads).requires_grad_() for heads in (4, 2)] + [
        randn(2, 300, 2, 16, seed=9).requires_grad_()
    ]


def threshold_of(value=0.3):
    return torch.full((2,), value)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how often ops that save were called."""

    def __init__(self):
        super().__init__()
        self.saving, self.skipped = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func is OPS.fmha_fwd.default:
            self.saving.append(len(results) == 4)
        if func is OPS.fmha_bwd.default:
            place = [argument.name for argument in func._schema.arguments].index("skipped")
            self.skipped.append(len(args) > place and args[place] is not None)
        return results


@pytest.mark.parametrize("with_bias", [False, True])
def test_saved_for_gradients_alone(leaves, with_bias):
    rest = (False, None, threshold_of())
    rest = (*rest, torch.zeros(1, 1, 300)) if with_bias else rest
    with Calls() as calls:
        recorded = OPS.fmha_fwd(*leaves, *rest)
        with torch.no_grad():
            plain = OPS.fmha_fwd(*leaves, *rest)
        OPS.fmha_fwd(*(x.detach() for x in leaves), *rest)
        dense = OPS.fmha_fwd(*leaves, *rest[:2])
        recorded[0].sum().backward()
    assert calls.saving == [True, False, False, False]
    assert calls.skipped == [True]
    assert len(recorded) == len(plain) == 3
    assert len(dense) == 2
    for a, b in zip(recorded, plain, strict=True):
        assert a.equal(b)


def test_asked_for(leaves):
    for tensors in (leaves, [x.detach() for x in leaves]):
        *_, skipped = OPS.fmha_fwd(*tensors, skip_threshold=threshold_of(), save_skipped=True)
        assert (skipped.shape, skipped.dtype) == ((2, 4, 0, 0), torch.int32)
        assert not skipped.requires_grad
    assert len(OPS.fmha_fwd(*leaves, save_skipped=True)) == 2  # nothing is skipped


@pytest.mark.parametrize(
    ("q_len", "kv_len", "sizes"),
    [(64, 2048, (1, 1)), (65, 2049, (2, 2)), (1, 1, (1, 1)), (1000, 70000, (16, 35))],
)
def test_shapes_elsewhere(q_len, kv_len, sizes):
    """Of a GPU, which does not depend on the tiles of its kernel."""
    q, k = (torch.empty(3, n, h, 64, device="meta") for n, h in ((q_len, 4), (kv_len, 2)))
    threshold = torch.empty(3, device="meta")
    found = OPS.fmha_fwd(q, k, k, skip_threshold=threshold, save_skipped=True)
    assert found[3].shape == (3, 4, *sizes)
    assert found[3].dtype == torch.int32


def lists(groups, **widths):
    """Counts and indices of zeros, in the order of the ops: of each kind, [1, 1, groups]."""
    found = {}
    for name, width in widths.items():
        found[name] = torch.zeros(1, 1, groups, width, dtype=torch.int32, device="meta")
        found[f"{name}_counts"] = torch.zeros(1, 1, groups, dtype=torch.int32, device="meta")
    return found


@pytest.mark.parametrize(
    ("block_kv", "widths", "words"),
    [(16, (62, 0), 1), (16, (63, 0), 2), (128, (7, 0), 1), (128, (8, 0), 2), (64, (10, 7), 2)],
)
def test_shapes_of_blocks_elsewhere(block_kv, widths, words):
    """32 tiles of 32 keys to a word. A row visits blocks of both rows of a tile, then its own: each
    part may end with a ragged tile."""
    q = torch.empty(3, 300, 4, 64, device="meta")
    given = lists(5, full=widths[0], partial=widths[1])
    bits = torch.empty(1, 1, 5, widths[1], 64, block_kv // 8, dtype=torch.uint8, device="meta")
    partial = (given["partial_counts"], given["partial"], bits) if widths[1] else (None,) * 3
    found = OPS.block_sparse_fwd(
        q, q, q, given["full_counts"], given["full"], *partial, 64, block_kv,
        skip_threshold=torch.empty(3, device="meta"), save_skipped=True,
    )  # fmt: skip
    assert (found[3].shape, found[3].dtype) == ((3, 4, 5, words), torch.int32)


@pytest.mark.parametrize(
    ("size", "widths", "words"),
    [
        (64, (1024, 0), 1),
        (64, (1025, 0), 2),
        (64, (992, 1), 2),
        (128, (32, 8), 2),
        (64, (1, 15), 1),
    ],
)
def test_shapes_of_stripes_elsewhere(size, widths, words):
    q = torch.empty(3, 300, 4, 64, device="meta")
    given = lists(3, columns=widths[0], runs=widths[1])
    runs = (given["runs"], given["runs_counts"]) if widths[1] else (None, None)
    found = OPS.stripe_fwd(
        q, q, q, given["columns"], given["columns_counts"], *runs, 128, size,
        skip_threshold=torch.empty(3, device="meta"), save_skipped=True,
    )  # fmt: skip
    assert (found[3].shape, found[3].dtype) == ((3, 4, 5, words), torch.int32)


def of_windows(grid, window, dim=64, extra=0, device="meta", **others):
    """Arguments of the op behind v, and q and extra tokens."""
    axes = len(grid)
    axis = [others.get(n, [x] * axes) for n, x in (("stride", 1), ("dilation", 1), ("causal", 0))]
    q = torch.empty(3, *grid, 4, dim, device=device)
    more = torch.empty(3, extra, 4, dim, device=device) if extra else None
    return q, (list(window), *axis, None, more, more)


@pytest.mark.parametrize(
    ("grid", "window", "others", "sizes"),
    [
        # Boxes of 128 queries, whose windows are 128 * 31 + 1 and 128 * 32 + 1 keys long at most.
        ((6400,), (3840,), {}, (100, 1)),
        ((6400,), (3970,), {}, (100, 2)),
        ((6400,), (3840,), {"extra": 130}, (100, 2)),
        ((6401,), (3840,), {}, (102, 1)),
        # Four grids of a dilation that the copy engine does not stride over: 13 boxes for each.
        ((6500,), (4,), {"dilation": [67]}, (2 * 67, 1)),
        # Above head dim 128 tiles have 32 keys.
        ((6400,), (900,), {"dim": 256}, (100, 2)),
        # A causal window ends with its axis, and a dilation of a window of 1 has no effect.
        ((256, 64), (1, 10**6), {"dilation": [5, 1], "causal": [0, 1]}, (256, 1)),
    ],
)
def test_shapes_of_windows_elsewhere(grid, window, others, sizes):
    q, given = of_windows(grid, window, **others)
    options = {"skip_threshold": torch.empty(3, device="meta"), "save_skipped": True}
    found = OPS.neighborhood_fwd(q, q, q, *given, **options)
    assert (found[3].shape, found[3].dtype) == ((3, 4, *sizes), torch.int32)


def test_opcheck_of_windows(leaves):
    given = [30], [1], [1], [0]
    options = {"skip_threshold": threshold_of()}
    torch.library.opcheck(OPS.neighborhood_fwd, (*leaves, *given), options | {"save_skipped": True})
    detached = [x.detach() for x in leaves]
    out, lse, _, skipped = OPS.neighborhood_fwd(*detached, *given, **options, save_skipped=True)
    assert skipped.shape == (2, 4, 0, 0)
    options["skipped"] = skipped
    torch.library.opcheck(
        OPS.neighborhood_bwd, (torch.ones_like(out), None, *detached, out, lse, *given), options
    )


LISTS = {
    "block_sparse": lambda: (torch.full((1, 1, 5), 2, dtype=torch.int32),
                             torch.tensor([0, 2]).int().expand(1, 1, 5, 2).contiguous(),
                             None, None, None, 64, 64),
    "stripe": lambda: (torch.arange(40).int().expand(1, 1, 3, 40).contiguous(),
                       torch.full((1, 1, 3), 40, dtype=torch.int32), None, None, 128),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_opcheck_of_lists(leaves, name):
    forward, backward = (getattr(OPS, f"{name}_{way}") for way in ("fwd", "bwd"))
    given, options = LISTS[name](), {"skip_threshold": threshold_of()}
    torch.library.opcheck(forward, (*leaves, *given), options | {"save_skipped": True})
    detached = [x.detach() for x in leaves]
    out, lse, _, skipped = forward(*detached, *given, **options, save_skipped=True)
    assert skipped.shape == (2, 4, 0, 0)
    options["skipped"] = skipped
    torch.library.opcheck(
        backward, (torch.ones_like(out), None, *detached, out, lse, *given), options
    )


@pytest.mark.parametrize("symbolic", [False, True])
def test_opcheck(leaves, symbolic):
    name, scale = ("_symbolic", torch.tensor(0.2, dtype=torch.float64)) if symbolic else ("", 0.2)
    forward, backward = (getattr(OPS, f"fmha_{way}{name}") for way in ("fwd", "bwd"))
    given = True, scale, threshold_of()
    torch.library.opcheck(forward, (*leaves, *given))
    torch.library.opcheck(forward, (*leaves, *given), {"save_skipped": True})
    detached = [x.detach() for x in leaves]
    out, lse, _, skipped = forward(*detached, *given, save_skipped=True)
    arguments = torch.ones_like(out), None, *detached, out, lse, True, scale
    options = {"skip_threshold": threshold_of(), "skipped": skipped}
    torch.library.opcheck(backward, arguments, options)


@contextlib.contextmanager
def counted(saving, skipped):
    with Calls() as calls:
        yield
    assert (sum(calls.saving), sum(calls.skipped)) == (saving, skipped)


def loss(*leaves, threshold=0.3):
    return sparse_fmha.attention(*leaves, causal=True, skip_threshold=threshold).square().sum()


def test_recomputed_and_compiled(leaves):
    expected = torch.autograd.grad(loss(*leaves), leaves)
    with counted(saving=2, skipped=1):
        again = checkpoint(loss, *leaves, use_reentrant=False)
        found = torch.autograd.grad(again, leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.equal(theirs)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("batch", [1, 2])
def test_mapped(leaves, batch):
    """A map over gradients of out alone shares what was saved."""
    q, k, v = (x.detach()[:batch] for x in leaves)
    threshold = threshold_of()[:batch]
    out, lse, _, skipped = OPS.fmha_fwd(q, k, v, skip_threshold=threshold, save_skipped=True)
    douts = torch.stack([torch.ones_like(out), out])

    def gradient(dout):
        return OPS.fmha_bwd(
            dout, None, q, k, v, out, lse, skip_threshold=threshold, skipped=skipped
        )[0]

    for found, dout in zip(torch.vmap(gradient)(douts), douts, strict=True):
        torch.testing.assert_close(found, gradient(dout))


def test_of_both_levels(leaves):
    """Of a gradient inside of a map, and of a map inside of a gradient."""
    q, k, v = (x.detach() for x in leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves[0])[0]

    def of_one(q, k, v):
        return loss(q[None], k[None], v[None])

    inside = torch.vmap(torch.func.grad(of_one))(q, k, v)
    outside = torch.func.grad(lambda q: torch.vmap(of_one)(q, k, v).sum())(q)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, expected)
