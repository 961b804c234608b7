"""Gradients of calls that skip tiles on the GPU: those of attention to what was kept."""

import contextlib
import functools

import pytest
import torch
from gradient_rule import output_gradients
from poison import poisoned
from test_skipping_gpu import calls, inputs
from torch.utils.checkpoint import checkpoint

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask

pytestmark = pytest.mark.gpu
OPS = torch.ops.sparse_fmha
TILE = 80  # keys that are skipped together
names = pytest.mark.parametrize("name", ["dense", "causal"])
BOTH = torch.float16, torch.bfloat16
LISTS = ["blocks", "blocks of 128", "pairs of blocks", "partial blocks", "stripes", "runs"]


@contextlib.contextmanager
def deterministic(wanted=True):
    """The forward pass decides: two kernels, or one of all gradients."""
    torch.use_deterministic_algorithms(wanted)
    yield
    torch.use_deterministic_algorithms(False)


def differentiated(call, given, threshold, by_two=False):
    """out, lse, statistics and the gradients of q, k and v, through out and lse."""
    leaves = [x.detach().requires_grad_() for x in given]
    options = dict(skip_threshold=threshold, return_lse=True, return_stats=True)
    with deterministic(by_two):
        out, lse, stats = call(*leaves, **options)
    dout, dlse = output_gradients(out.detach().cpu(), lse.detach().cpu())
    with poisoned():
        found = torch.autograd.grad((out, lse), leaves, (dout.to(out.device), dlse.to(out.device)))
    return out.detach(), lse.detach(), stats, found


def call_of(name, length):
    """Those of skipping, and the routes of gradients that they do not take."""

    def runs(q, k, v, **options):
        columns = torch.arange(0, 300, 2).int().expand(1, 1, -(-length // 128), -1).contiguous()
        counts = torch.full(columns.shape[:3], columns.shape[-1], dtype=torch.int32)
        starts = torch.tensor([301, 430, 700]).int().expand(*columns.shape[:3], 3).contiguous()
        many = torch.full(columns.shape[:3], 3, dtype=torch.int32)
        given = columns, counts, length, length, 128
        options_of_runs = dict(range_starts=starts, range_counts=many, range_size=128)
        mask = StripeMask(*given, **options_of_runs).to(q.device)
        return sparse_fmha.stripe_attention(q, k, v, mask, **options)

    def sequence(q, k, v, **options):
        return sparse_fmha.neighborhood_attention(q, k, v, length // 3, **options)

    others = {
        "runs": runs,
        "sequence": sequence,
        "blocks of 128": functools.partial(calls(length)["blocks"], size=(64, 128)),
    }
    return (calls(length) | others)[name]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("dense", "causal") for dtype in BOTH),
        *((name, torch.bfloat16) for name in ("grid", *LISTS)),
    ],
    ids=str,
)
@pytest.mark.parametrize("by_two", [False, True])
@pytest.mark.parametrize("dim", [40, 128, 256])
def test_as_on_the_cpu(cuda, name, dim, dtype, by_two):
    call = call_of(name, 1000)
    given = inputs(1000, heads=2, dim=dim, dtype=dtype)
    assert sum(compared(call, given, cuda, x, by_two) for x in (1e-3, 0.05, 0.5)) > 3


def compared(call, given, cuda, threshold, by_two=False):
    """Compares gradients with those of the CPU, of the batch entries and heads for which both skip
    equally many tiles; returns how many of these skip some. No head shares its keys."""
    _, _, stats, found = differentiated(call, [x.to(cuda) for x in given], threshold, by_two)
    _, _, wanted_stats, wanted = differentiated(call, given, threshold)
    skipping = 0
    for b, h in (stats.skipped.cpu() == wanted_stats.skipped).nonzero().tolist():
        skipping += wanted_stats.skipped[b, h].item() > 0
        for ours, theirs in zip(found, wanted, strict=True):
            ours, theirs = ours[b, ..., h, :].cpu().float(), theirs[b, ..., h, :].float()
            size = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=2e-2 * size)
    return skipping


@pytest.mark.parametrize("by_two", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", [1024, 1100])
def test_windows_of_a_sequence(cuda, length, dim, by_two):
    """Tokens in the order of groups, whose gradients need no copies, and others."""
    call = call_of("sequence", length)
    given = inputs(length, heads=2, dim=dim)
    assert sum(compared(call, given, cuda, x, by_two) for x in (1e-3, 0.05, 0.5)) > 3


@names
def test_what_is_skipped_has_no_gradient(cuda, name):
    """Keys of a tile that every group skips, and ragged lengths with more keys than queries."""
    q, k, v = (x.to(cuda) for x in inputs(700, heads=2, batch=1))
    q = q[:, 300:]
    way = torch.nn.functional.normalize(q.float().mean(1), dim=-1)
    k[:] = 0
    k[:, TILE : 2 * TILE] = -2 * way.to(k.dtype)  # weights of exp(-2)
    low = torch.zeros(700, dtype=torch.bool, device=cuda)
    low[TILE : 2 * TILE] = True
    for by_two in (False, True):
        _, _, stats, found = differentiated(calls(700)[name], (q, k, v), 0.5, by_two)
        assert stats.skipped.eq(7).all()  # groups
        assert all(x[0].flatten(1).eq(0).all(-1).equal(low) for x in found[1:])
        _, _, _, dense = differentiated(calls(700)[name], (q, k, v), 0.0, by_two)
        assert not any(x[0].flatten(1).eq(0).all(-1).any() for x in dense[1:])


@pytest.mark.parametrize("name", ["dense", "causal", "grid", *LISTS])
def test_two_runs_give_the_same_bits(cuda, name):
    given = [x.to(cuda) for x in inputs(1000)]
    first = differentiated(call_of(name, 1000), given, 0.05, by_two=True)
    for _ in range(5):
        again = differentiated(call_of(name, 1000), given, 0.05, by_two=True)
        assert all(a.equal(b) for a, b in zip(again[3], first[3], strict=True))


def op_of(name, length, device):
    """The name of an op and its arguments between v and the scale."""
    if name in ("dense", "causal"):
        return "fmha", (name == "causal",)
    if name == "grid":
        return "neighborhood", ((25, 11), (1, 1), (1, 1), (0, 0))
    generator = torch.Generator().manual_seed(1)
    if name == "stripes":
        drawn = torch.rand(1, 1, -(-length // 192), length, generator=generator) < 0.4
        mask = StripeMask.from_columns(drawn, length, 192).to(device)
        return "stripe", (mask.columns, mask.counts, None, None, 192, 64, False)
    pairs = torch.rand(1, 1, length, length, generator=generator) < 0.6
    mask = BlockMask.from_dense(pairs, 64, 128).to(device)
    lists = mask.counts, mask.indices, mask.partial_counts, mask.partial_indices, mask.partial_bits
    return "block_sparse", (*lists, 64, 128, False)


@pytest.mark.parametrize("name", ["dense", "causal", "grid", "blocks", "stripes"])
def test_graph_with_another_threshold(cuda, name):
    q, k, v = (x.to(cuda) for x in inputs(1000))
    op, others = op_of(name, 1000, cuda)
    if name == "grid":
        q, k, v = (x.unflatten(1, (50, 20)) for x in (q, k, v))
    threshold = torch.zeros(2, device=cuda)
    forward, backward = (getattr(OPS, f"{op}_{way}") for way in ("fwd", "bwd"))

    def step():
        out, lse, _, saved = forward(q, k, v, *others, skip_threshold=threshold, save_skipped=True)
        given = torch.ones_like(out), None, q, k, v, out, lse, *others
        options = dict(deterministic=True, skip_threshold=threshold, skipped=saved)
        return backward(*given, **options)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for values in ((0.0, 0.5), (1e-3, 0.05)):
        threshold.copy_(torch.tensor(values))
        graph.replay()
        assert all(a.equal(b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.parametrize("name", ["blocks", "stripes"])
@pytest.mark.parametrize("dim", [128, 256])
def test_the_forward_pass_of_lists_is_the_same_where_it_saves(cuda, name, dim):
    """The second half of the last query tile does not exist."""
    q, k, v = (x.to(cuda) for x in inputs(1060, dim=dim))
    op, others = op_of(name, 1060, cuda)
    forward, threshold = getattr(OPS, f"{op}_fwd"), torch.full((2,), 0.05, device=cuda)
    with poisoned():
        plain = forward(q, k, v, *others, None, threshold)
        *same, bits = forward(q, k, v, *others, None, threshold, save_skipped=True)
    assert all(a.equal(b) for a, b in zip(plain, same, strict=True))
    marked = (bits[..., None] >> torch.arange(32, device=cuda) & 1).sum((2, 3, 4))
    assert (marked >= plain[2][..., 1]).all()  # a tile of which no row sees a key is marked, too
    assert plain[2][..., 1].sum() > 0


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_forward_pass_of_windows_is_the_same_where_it_saves(cuda, dim):
    q, k, v = (x.to(cuda).unflatten(1, (50, 20)) for x in inputs(1000, dim=dim))
    others, threshold = op_of("grid", 1000, cuda)[1], torch.full((2,), 0.3, device=cuda)
    with poisoned():
        plain = OPS.neighborhood_fwd(q, k, v, *others, skip_threshold=threshold)
        *same, bits = OPS.neighborhood_fwd(
            q, k, v, *others, skip_threshold=threshold, save_skipped=True
        )
    assert all(a.equal(b) for a, b in zip(plain, same, strict=True))
    marked = (bits[..., None] >> torch.arange(32, device=cuda) & 1).sum((2, 3, 4))
    assert (marked >= plain[2][..., 1]).all()  # a tile of which no row sees a key is marked, too
    assert plain[2][..., 1].sum() > 0
    assert bits.nbytes < 0.01 * plain[0].nbytes


def test_only_what_is_wanted(cuda):
    q, k, v = (x.to(cuda) for x in inputs(500))
    threshold = torch.full((2,), 0.1, device=cuda)
    out, lse, _, skipped = OPS.fmha_fwd(q, k, v, True, None, threshold, save_skipped=True)
    given = torch.ones_like(out), None, q, k, v, out, lse, True
    options = dict(deterministic=True, skip_threshold=threshold, skipped=skipped)
    whole = OPS.fmha_bwd(*given, **options)
    dq = OPS.fmha_bwd(*given, need_dkv=False, **options)
    dkv = OPS.fmha_bwd(*given, need_dq=False, **options)
    assert dq[0].equal(whole[0])
    assert dkv[1].equal(whole[1])
    assert dkv[2].equal(whole[2])
    assert dq[1].numel() == dq[2].numel() == dkv[0].numel() == 0


@names
def test_the_forward_pass_is_the_same_where_it_saves(cuda, name):
    q, k, v = (x.to(cuda) for x in inputs(3000))
    threshold = torch.full((2,), 0.05, device=cuda)
    with poisoned():
        plain = OPS.fmha_fwd(q, k, v, name == "causal", None, threshold)
        *same, bits = OPS.fmha_fwd(q, k, v, name == "causal", None, threshold, save_skipped=True)
    assert len(plain) == 3
    assert all(a.equal(b) for a, b in zip(plain, same, strict=True))
    skipped = plain[2][..., 1]
    assert skipped.equal((bits[..., None] >> torch.arange(32, device=cuda) & 1).sum((2, 3, 4)))
    assert skipped.sum() > 0
    assert bits.nbytes < 0.01 * plain[0].nbytes


@pytest.mark.parametrize("name", ["causal", "sequence"])
def test_recomputed_and_compiled(cuda, name):
    leaves = [x.to(cuda).requires_grad_() for x in inputs(500)]
    call = call_of(name, 500)

    def loss(*leaves):
        return call(*leaves, skip_threshold=0.1).float().square().sum()

    def again(*leaves):
        return checkpoint(loss, *leaves, use_reentrant=False)

    with deterministic():
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for way in (again, compiled):
            found = torch.autograd.grad(way(*leaves), leaves)
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_skipped_tiles_are_checked(cuda):
    q, k, v = (x.to(cuda) for x in inputs(500))
    threshold = torch.full((2,), 0.1, device=cuda)
    out, lse, _, skipped = OPS.fmha_fwd(q, k, v, False, None, threshold, save_skipped=True)
    given = torch.ones_like(out), None, q, k, v, out, lse
    for wrong, message in {
        None: "skipped must be given with skip_threshold on a GPU",
        skipped[:1]: r"skipped must have shape \[2, 4, 8, 1\], .* got \[1, 4, 8, 1\]",
        skipped.long(): "skipped must have dtype int32, got Long",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.fmha_bwd(*given, skip_threshold=threshold, skipped=wrong)


@pytest.mark.parametrize("lengths", [(0, 10), (10, 0)])
def test_no_pairs(cuda, lengths):
    q, k = (torch.randn(2, n, 2, 64, device=cuda, dtype=torch.bfloat16) for n in lengths)
    leaves = [x.requires_grad_() for x in (q, k, k.detach().clone())]
    sparse_fmha.attention(*leaves, skip_threshold=0.1).sum().backward()
    assert all(x.grad.eq(0).all() for x in leaves)


@pytest.mark.parametrize("causal", [False, True])
def test_values_of_their_own_head_dim(cuda, causal):
    q, k, _ = inputs(500, heads=2, dim=192)
    given = q, k, inputs(500, heads=2, dim=128, seed=1)[2]
    call = functools.partial(sparse_fmha.attention, causal=causal)
    assert compared(call, given, cuda, 0.05) > 0


def test_extra_tokens_of_a_grid_of_three_axes(cuda):
    """Two batch entries, which have tensor maps of their own."""
    grid, window = (5, 8, 20), (5, 8, 15)
    q, k, v = (x.unflatten(1, grid) for x in inputs(800, heads=2))
    extra_k, extra_v = inputs(70, heads=2, seed=1)[1:]

    def call(q, k, v, extra_k, extra_v, **options):
        options |= {"extra_k": extra_k, "extra_v": extra_v}
        return sparse_fmha.neighborhood_attention(q, k, v, window, **options)

    assert compared(call, (q, k, v, extra_k, extra_v), cuda, 0.5) > 0
