"""Block-sparse attention on the CPU against the reference, and the errors of its op."""

from dataclasses import replace

import pytest
import torch
from block_masks import Drawn, drawn
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sparse_fmha
from sparse_fmha import BlockMask, reference

OPS = torch.ops.sparse_fmha
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="session")
def check(randn, poisoned, agrees):
    """check(case, ...): the public function agrees with the reference under the case's mask."""

    def run(case, dtype=torch.float32, dim=16, heads=None, heads_kv=1, batch=None, scale=None):
        heads, batch = heads or case.heads, batch or case.batch
        q = randn(batch, case.q_len, heads, dim, dtype=dtype, seed=1)
        k, v = (randn(batch, case.kv_len, heads_kv, dim, dtype=dtype, seed=s) for s in (2, 3))
        with poisoned():
            out, lse = sparse_fmha.block_sparse_attention(
                q, k, v, case.mask(), scale=scale, return_lse=True
            )
        agrees(out, lse, q, k, v, case.dense(), scale)
        return out, lse

    return run


@settings(max_examples=150)
@given(
    drawn(),
    st.sampled_from(DTYPES),
    st.sampled_from([8, 16, 40, 64, 72]),
    st.booleans(),
    st.none() | st.floats(-1, 1, width=32),
)
def test_any_lists(check, case, dtype, dim, shared, scale):
    heads_kv = 1 if shared or case.heads == 1 else 2
    check(case, dtype, dim, heads_kv=heads_kv, scale=scale)


@settings(max_examples=20)
@given(drawn(batch=1, heads=1), st.integers(1, 2), st.integers(1, 2))
@example(Drawn(300, 200, 64, 16, causal=True), 2, 2)  # queries that see no key
def test_one_list_for_all(check, case, batch, heads_kv):
    check(case, heads=2 * heads_kv, heads_kv=heads_kv, batch=batch)


@pytest.mark.parametrize("block_kv", [16, 128])
@pytest.mark.parametrize("block_q", [64, 128])
def test_empty_lists(check, block_q, block_kv):
    out, lse = check(Drawn(200, 300, block_q, block_kv, kinds=(1, 0, 0)))
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_width_zero(randn):
    q = randn(1, 200, 2, 16)
    counts, indices = torch.zeros(1, 1, 2).int(), torch.zeros(1, 1, 2, 0).int()
    out, lse = sparse_fmha.block_sparse_attention(
        q, q, q, BlockMask(counts, indices, 200, 200), return_lse=True
    )
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_every_block_is_dense_attention(randn):
    q, k, v = (randn(2, 333, 2, 32, seed=s) for s in range(3))
    for causal in (False, True):
        mask = BlockMask.from_blocks(
            torch.ones(1, 1, 3, 6).bool(), 333, 333, 128, 64, causal=causal
        )
        out = sparse_fmha.block_sparse_attention(q, k, v, mask)
        dense = sparse_fmha.attention(q, k, v, causal=causal)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_strided_views(randn, agrees):
    case = Drawn(150, 170, 64, 32, 2, 2)
    q, k, v = (randn(2, 2, n, 16, seed=s).transpose(1, 2) for s, n in enumerate((150, 170, 170)))
    out, lse = sparse_fmha.block_sparse_attention(q, k, v, case.mask(), return_lse=True)
    agrees(out, lse, q, k, v, case.dense())


def raw(case, q_heads=2, **changes):
    """Arguments of the raw op."""
    mask = case.mask()
    names = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
    given_tensors = {name: getattr(mask, name) for name in names}
    sizes = {"block_q": case.block_q, "block_kv": case.block_kv, "causal": case.causal}
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(case.batch, case.q_len, q_heads, 16),
        "k": torch.randn(case.batch, case.kv_len, 1, 16),
        "v": torch.randn(case.batch, case.kv_len, 1, 16),
    }
    return tensors | given_tensors | sizes | changes


def test_blocks_that_are_not_there_are_ignored():
    indices = torch.tensor([[[[2, -1, 7, 0, 3]]]], dtype=torch.int32)
    case = Drawn(60, 100, 64, 32)
    none = dict.fromkeys(("partial_counts", "partial_indices", "partial_bits"))
    for count, blocks in ((5, [0, 2, 3]), (3, [2]), (99, [0, 2, 3]), (-1, [])):
        counts = torch.tensor([[[count]]], dtype=torch.int32)
        given_args = raw(case, counts=counts, indices=indices, **none)
        out, lse = OPS.block_sparse_fwd(**given_args)
        visible = torch.zeros(1, 1, 60, 4, dtype=torch.bool)
        visible[..., blocks] = True
        visible = visible.repeat_interleave(32, -1)[..., :100]
        exact, exact_lse = reference.attention(*(given_args[x] for x in "qkv"), visible)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


CASE = Drawn(100, 200, 64, 32, batch=2, heads=2, seed=1)

RAW_ERRORS = {
    "block_q must be 64 or 128, got 32": {"block_q": 32},
    "block_kv must be 16, 32, 64 or 128, got 8": {"block_kv": 8},
    r"counts must have .*3 dimensions.*, got .*\[2, 2\]": {"counts": torch.ones(2, 2).int()},
    "counts must have 1 or q's 2 in its batch dimension, got 3": {
        "counts": torch.ones(3, 2, 2).int()
    },
    "counts must have 1 or q's 2 in its head dimension, got 4": {
        "counts": torch.ones(2, 4, 2).int()
    },
    r"counts must have .*\[2, 2, 2\].*, got .*\[2, 2, 3\]": {"counts": torch.ones(2, 2, 3).int()},
    "counts must have dtype Int, got Long": {"counts": torch.ones(2, 2, 2).long()},
    r"indices must have .*\[2, 2, 2, any\].*, got .*\[2, 1, 2, 3\]": {
        "indices": torch.ones(2, 1, 2, 3).int()
    },
    "indices must have dtype Int, got Float": {"indices": torch.ones(2, 2, 2, 3)},
    "indices must be contiguous, got stride 2 in dimension 3": {
        "indices": torch.ones(2, 2, 3, 2).int().mT
    },
    "partial_counts, partial_indices and partial_bits must be given all or": {"partial_bits": None},
    r"partial_counts must have shape \[2, 2, 2\], got \[2, 2, 1\]": {
        "partial_counts": torch.ones(2, 2, 1).int()
    },
    "partial_indices must have .*dtype.*, got Long": {
        "partial_indices": torch.ones(2, 2, 2, 3).long()
    },
    r"partial_bits must have .*\[2, 2, 2, .*, 64, 4\].*, got .*": {
        "partial_bits": torch.ones(2, 2, 2, 3, 64, 8).byte()
    },
    "partial_bits must have dtype Byte, got Int": {"partial_bits": CASE.mask().partial_bits.int()},
}


@pytest.mark.parametrize(("message", "change"), RAW_ERRORS.items())
def test_errors_of_the_op(message, change):
    OPS.block_sparse_fwd(**raw(CASE))
    with pytest.raises(RuntimeError, match=message):
        OPS.block_sparse_fwd(**raw(CASE, **change))


def test_errors_of_the_function(randn):
    q, k = randn(2, 100, 2, 16), randn(2, 200, 1, 16)

    def attend(mask, q=q, **options):
        return sparse_fmha.block_sparse_attention(q, k, k, mask, **options)

    attend(CASE.mask())
    with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
        attend(torch.ones(1))
    with pytest.raises(ValueError, match="mask must be for the 100 tokens of q, got one for 101"):
        attend(replace(CASE, q_len=101).mask())
    with pytest.raises(ValueError, match="mask must be for the 200 tokens of k, got one for 201"):
        attend(replace(CASE, kv_len=201).mask())
    with pytest.raises(ValueError, match="mask must have lists for 1 or q's 2 heads, got 3"):
        attend(replace(CASE, heads=3).mask())
    with pytest.raises(
        ValueError, match="mask must have lists for 1 or q's 2 batch entries, got 3"
    ):
        attend(replace(CASE, batch=3).mask())
    with pytest.raises(ValueError, match="mask must be on q's device, cpu, got meta"):
        attend(CASE.mask().to("meta"))
    with pytest.raises(ValueError, match="scale must be a finite number, got inf"):
        attend(CASE.mask(), scale=float("inf"))


@pytest.mark.parametrize("partial", [False, True])
def test_opcheck(partial):
    given_args = raw(CASE)
    if not partial:
        given_args |= dict.fromkeys(("partial_counts", "partial_indices", "partial_bits"))
    torch.library.opcheck(OPS.block_sparse_fwd, tuple(given_args.values()))


def test_compiled_in_one_graph(randn):
    def layer(x, scores):
        q = x.unflatten(-1, (2, 16))
        top = scores.topk(2).indices.int()
        mask = BlockMask.from_indices(None, top, 300, 300, 64, 32, causal=True)
        return sparse_fmha.block_sparse_attention(q, q, q, mask).flatten(-2) * 2

    torch.compiler.reset()
    x, scores = randn(1, 300, 32), randn(1, 2, 5, 10, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scores), layer(x, scores))


def test_autocast_leaves_lists_alone(randn):
    q, k = randn(2, 100, 2, 16), randn(2, 200, 1, 16)
    expected = sparse_fmha.block_sparse_attention(
        q.bfloat16(), k.bfloat16(), k.bfloat16(), CASE.mask()
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_fmha.block_sparse_attention(q, k, k, CASE.mask())
        raw_out, _ = OPS.block_sparse_fwd(**raw(CASE, q=q, k=k, v=k))
    assert out.dtype == torch.bfloat16
    assert out.equal(expected)
    assert raw_out.equal(expected)
