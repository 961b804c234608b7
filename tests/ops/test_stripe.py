"""Stripe attention on the CPU, its masks, and merging, against the reference."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stripe_masks import Drawn, drawn

import sparse_fmha
from sparse_fmha import StripeMask, reference

OPS = torch.ops.sparse_fmha
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=150)
@given(
    drawn(),
    st.sampled_from(DTYPES),
    st.sampled_from([8, 16, 40, 64, 72]),
    st.booleans(),
    st.none() | st.floats(-1, 1, width=32),
)
@example(Drawn(300, 200, causal=True), torch.float32, 16, False, None)  # queries without keys
@example(Drawn(200, 300, share=0, runs=0), torch.float32, 16, False, None)  # empty lists
def test_any_lists(randn, poisoned, agrees, case, dtype, dim, shared, scale):
    heads_kv = 1 if shared or case.heads == 1 else 2
    q = randn(case.batch, case.q_len, case.heads, dim, dtype=dtype, seed=1)
    k, v = (randn(case.batch, case.kv_len, heads_kv, dim, dtype=dtype, seed=s) for s in (2, 3))
    with poisoned():
        out, lse = sparse_fmha.stripe_attention(q, k, v, case.mask(), scale=scale, return_lse=True)
    agrees(out, lse, q, k, v, case.dense(), scale)


def test_one_list_for_all(randn, agrees):
    case = Drawn(200, 300, causal=True)
    q, k, v = randn(2, 200, 4, 16), randn(2, 300, 2, 16, seed=1), randn(2, 300, 2, 16, seed=2)
    out, lse = sparse_fmha.stripe_attention(q, k, v, case.mask(), return_lse=True)
    agrees(out, lse, q, k, v, case.dense())


@given(drawn())
def test_mask(case):
    mask, dense = case.mask(), case.dense()
    mask.validate()
    assert mask.to_dense().equal(dense)
    assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-9)
    assert mask.shape == dense.shape
    columns = StripeMask.from_columns(mask.seen(), case.q_len, case.block_q, causal=case.causal)
    columns.validate()
    assert columns.to_dense().equal(dense)


def small(**changes):
    tensors = {
        "columns": [[[[1, 5, 9]]]],
        "counts": [[[3]]],
        "range_starts": [[[[20, 90]]]],
        "range_counts": [[[2]]],
    }
    tensors = {
        name: torch.tensor(changes.pop(name, value), dtype=torch.int32)
        for name, value in tensors.items()
    }
    return StripeMask(**tensors, **{"q_len": 60, "kv_len": 100, "block_q": 64} | changes)


FAULTS = {
    "counts of .* must be from 0 to 3": {"counts": [[[4]]]},
    "columns of .* must have a key from 0 to 99 in slot 2": {"columns": [[[[1, 5, 100]]]]},
    "columns of .* must ascend .*, also after slot 0": {"columns": [[[[5, 1, 9]]]]},
    "range_counts of .* must be from 0 to 2": {"range_counts": [[[-1]]]},
    "range_starts of .* must have a key from .* in slot 0": {"range_starts": [[[[-1, 90]]]]},
    "key 83 of .* is listed more than once": {"range_starts": [[[[20, 83]]]]},
    "key 20 of .* is listed more than once": {"columns": [[[[1, 5, 20]]]]},
}


@pytest.mark.parametrize(("message", "change"), FAULTS.items())
def test_validation_names_the_fault(message, change):
    small(validate=True)
    with pytest.raises(ValueError, match=message):
        small(validate=True, **change)
    small(**change)


def test_errors_of_the_mask():
    for error, message, change in (
        (ValueError, "block_q must be a multiple of 64 from 64 to 2048, got 96", {"block_q": 96}),
        (
            ValueError,
            "block_q must be a multiple of 64 from 64 to 2048, got 4096",
            {"block_q": 4096},
        ),
        (ValueError, "range_size must be 64 or 128, got 32", {"range_size": 32}),
        (TypeError, "causal must be True or False, got 1", {"causal": 1}),
        (ValueError, "counts must have .*2 groups of 64 queries.*, got .*", {"q_len": 70}),
        (
            ValueError,
            "must have the shape of|2 dimensions",
            {"range_counts": [[[2], [1]]]},
        ),
    ):
        with pytest.raises(error, match=message):
            small(**change)
    columns, counts = torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1).int()
    with pytest.raises(
        ValueError, match="range_counts must be given with range_starts, got only the latter"
    ):
        StripeMask(columns, counts, 60, 100, 64, columns)
    with pytest.raises(TypeError, match=r"columns must have dtype torch.int32, got torch.int64"):
        StripeMask(columns.long(), counts, 60, 100, 64)
    with pytest.raises(TypeError, match=r"seen must have dtype torch.bool, got torch.int32"):
        StripeMask.from_columns(columns, 60, 64)


def test_repr_and_plot(tmp_path):
    mask = Drawn(300, 400, heads=2, causal=True).mask()
    for part in ("q_len=300", "kv_len=400", "groups of 64", "1x2", "runs of 64", "causal", "cpu"):
        assert part in repr(mask)
    mask.plot(tmp_path / "mask.png", head=1)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        IndexError, match="head must be less than the 2 that the mask has lists for, got 2"
    ):
        mask.plot(tmp_path / "no.png", head=2)


def raw(**changes):
    columns, counts, starts, range_counts = Drawn(100, 200, batch=2, heads=2).tensors()
    torch.manual_seed(0)
    given_args = {
        "q": torch.randn(2, 100, 2, 16),
        "k": torch.randn(2, 200, 1, 16),
        "v": torch.randn(2, 200, 1, 16),
        "columns": columns,
        "counts": counts,
        "range_starts": starts,
        "range_counts": range_counts,
        "block_q": 64,
    }
    return given_args | changes


RAW_ERRORS = {
    "block_q must be a multiple of 64 from 64 to 2048, got 32": {"block_q": 32},
    "range_size must be 64 or 128, got 32": {"range_size": 32},
    "counts must have 1 or q's 2 in its batch dimension, got 3": {
        "counts": torch.ones(3, 2, 2).int()
    },
    r"columns must have .*, got .*\[2, 2\]": {"columns": torch.ones(2, 2).int()},
    "columns must have dtype Int, got Long": {"columns": torch.ones(2, 2, 2, 3).long()},
    "range_starts must be given with range_counts, got only the latter": {"range_starts": None},
    "range_counts must be given with range_starts, got only the latter": {"range_counts": None},
    r"range_counts must have shape \[2, 2, 2\], got \[2, 2, 3\]": {
        "range_counts": torch.ones(2, 2, 3).int()
    },
}


@pytest.mark.parametrize(("message", "change"), RAW_ERRORS.items())
def test_errors_of_the_op(message, change):
    OPS.stripe_fwd(**raw())
    with pytest.raises(RuntimeError, match=message):
        OPS.stripe_fwd(**raw(**change))


def test_keys_that_are_not_there_are_ignored():
    columns = torch.tensor([[[[-3, 2, 99, 100, 7000]]]], dtype=torch.int32)
    starts = torch.tensor([[[[-9, 60, 2_000_000_000]]]], dtype=torch.int32)
    q, k, v = (torch.randn(1, 50, 1, 16) for _ in range(3))
    k, v = (torch.cat([x, x], 1) for x in (k, v))
    for counts, range_counts in ((5, 3), (99, 99), (-1, 2)):
        numbers = [torch.tensor([[[n]]], dtype=torch.int32) for n in (counts, range_counts)]
        out, _ = OPS.stripe_fwd(q, k, v, columns, numbers[0], starts, numbers[1], 64)
        visible = torch.zeros(100, dtype=torch.bool)
        visible[60:] = True
        if counts > 0:
            visible[2] = True
        # 99 is both a column and in the run: it counts twice, as documented.
        doubled = torch.cat([torch.arange(100), torch.tensor([99] if counts > 0 else []).long()])
        visible = torch.cat([visible, torch.ones(len(doubled) - 100, dtype=torch.bool)])
        exact, _ = reference.attention(q, k[:, doubled], v[:, doubled], visible.view(1, 1, 1, -1))
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absent", [-1, 200])
@pytest.mark.parametrize("columns", [[3, 50], list(range(0, 128, 2)), list(range(100))], ids=len)
def test_absent_last_column_does_not_uncover_the_future(randn, absent, columns):
    """Whether a tile is masked is told by its last column."""
    q, k, v = (randn(1, 128, 1, 16, seed=s) for s in range(3))

    def run(listed):
        table = torch.tensor(listed, dtype=torch.int32).expand(1, 1, 2, -1)
        counts = torch.full((1, 1, 2), len(listed), dtype=torch.int32)
        mask = StripeMask(table, counts, 128, 128, 64, causal=True)
        return sparse_fmha.stripe_attention(q, k, v, mask, return_lse=True)

    for found, expected in zip(run([*columns, absent]), run(columns), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_errors_of_the_function(randn):
    q, k = randn(2, 100, 2, 16), randn(2, 200, 1, 16)
    case = Drawn(100, 200, heads=2)
    sparse_fmha.stripe_attention(q, k, k, case.mask())
    for error, message, mask, options in (
        (TypeError, "mask must be a StripeMask, got Tensor", q, {}),
        (
            ValueError,
            "mask must be for the 100 tokens of q, got one for 101",
            Drawn(101, 200).mask(),
            {},
        ),
        (
            ValueError,
            "mask must be for the 200 tokens of k, got one for 201",
            Drawn(100, 201).mask(),
            {},
        ),
        (
            ValueError,
            "mask must have lists for 1 or q's 2 heads, got 3",
            Drawn(100, 200, heads=3).mask(),
            {},
        ),
        (ValueError, "mask must be on q's device, cpu, got meta", case.mask().to("meta"), {}),
    ):
        with pytest.raises(error, match=message):
            sparse_fmha.stripe_attention(q, k, k, mask, **options)


def test_opcheck_and_compile(randn):
    torch.library.opcheck(OPS.stripe_fwd, tuple(raw().values()))
    without = raw(range_starts=None, range_counts=None)
    torch.library.opcheck(OPS.stripe_fwd, tuple(without.values()))

    def layer(x, scores):
        q = x.unflatten(-1, (2, 16))
        mask = StripeMask.from_columns(scores > 1, 300, 64, causal=True)
        return sparse_fmha.stripe_attention(q, q, q, mask).flatten(-2) * 2

    torch.compiler.reset()
    x, scores = randn(1, 300, 32), randn(1, 2, 5, 300, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scores), layer(x, scores))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_attention_over_all(randn, dtype):
    q, k, v = (randn(2, n, 2, 16, dtype=dtype, seed=n) for n in (50, 70, 71))
    v = v[:, :70]
    visible = torch.rand(2, 2, 50, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    visible[:, :, 7] = False  # a query without keys
    visible[:, :, 9, 40:] = False  # and one that has them in one part only
    parts = []
    for keys in (slice(0, 20), slice(20, 40), slice(40, 70)):
        part = torch.zeros_like(visible)
        part[..., keys] = visible[..., keys]
        out, lse = reference.attention(q, k, v, part)
        parts.append((out.to(dtype), lse.float()))
    out, lse = sparse_fmha.merge(*zip(*parts, strict=True))
    exact, exact_lse = reference.attention(q, k, v, visible)
    assert out.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6 + 4 * torch.finfo(dtype).eps}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-6, "atol": 1e-6}  # the log-sum-exps are fp32
    torch.testing.assert_close(out.double(), exact, **tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_errors_of_merge():
    out, lse = torch.zeros(1, 5, 2, 8), torch.zeros(1, 5, 2)
    with pytest.raises(
        ValueError, match="outs and lses must have the same number of parts, at least one, got 0"
    ):
        sparse_fmha.merge([], [])
    with pytest.raises(
        ValueError, match="outs and lses must have the same number of parts, at least one, got 2"
    ):
        sparse_fmha.merge([out, out], [lse])
    with pytest.raises(
        ValueError, match=r"lses\[1\] that without the last dimension, got .*\[1, 5\]"
    ):
        sparse_fmha.merge([out, out], [lse, lse[..., 0]])
    with pytest.raises(TypeError, match=r"outs\[1\] must have .*dtype.*, got torch.float64"):
        sparse_fmha.merge([out, out.double()], [lse, lse])
