"""neighborhood_attention on the GPU: where its tensors lie, and which it turns down."""

import other_archs
import pairwise
import pytest
import torch
from neighborhoods import LAYOUTS, Case, amid_nan, contiguous, crop, laid_out

import sparse_fmha

pytestmark = pytest.mark.gpu

OP = torch.ops.sparse_fmha.neighborhood_fwd
NAMES = ("q", "k", "v", "extra_k", "extra_v")
SHARED = {"extra": 9, "batch": 2, "heads": 4, "heads_kv": 2}
CASES = [
    Case((501,), 37, 5, **SHARED),
    Case((500,), 37, 5, 9, True, **SHARED),
    Case((21, 37), (6, 9), (2, 4), (1, 1), (False, True), **SHARED),
    Case((21, 37), (6, 4), (2, 4), (3, 8), **SHARED),
    Case((9, 10, 11), (3, 4, 5), (2, 1, 5), 1, (True, False, False), **SHARED),
    Case((9, 10, 11), (3, 4, 5), 1, (2, 1, 2), **SHARED),
]


@pytest.fixture
def no_cache():
    """Large tensors are given back."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pairwise.parametrize(case=CASES, layout=LAYOUTS[1:], dim=(40, 64, 128, 256))
def test_strides(tensors, check, case, layout, dim):
    """The same bits, wherever the tensors lie and whatever lies around them."""
    case = case.with_(dim=dim)
    plain = tensors(case)
    expected, expected_lse = check(case, plain)
    out, lse = check(case, laid_out(layout, plain))
    assert out.equal(expected)
    assert lse.equal(expected_lse)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_of_one_axis(tensors, check, case, batch):
    """Of a grid that is larger on one axis, and NaN there."""
    for axis in range(len(case.grid)):
        for extra in (0, 9):
            own = case.with_(batch=batch, extra=extra)
            given = laid_out(
                lambda x, axis=axis: amid_nan(x, min(1 + axis, x.dim() - 3)), tensors(own)
            )
            check(own, given)


@pytest.mark.parametrize("extra", [1, 7, 64, 130])
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_nothing_beyond_the_end_is_used(tensors, attend, dim, extra):
    """Ends on each axis, of each residue, and of the extra tokens; NaN beyond."""
    for case in CASES:
        own = case.with_(extra=extra, dim=dim, batch=1)
        results = []
        for layout in (contiguous, crop):
            q, k, v, extra_k, extra_v = laid_out(layout, tensors(own))
            results.append(attend(q, k, v, extra_k=extra_k, extra_v=extra_v, **own.options()))
        (expected, expected_lse), (out, lse) = results
        assert out.isfinite().all()
        assert out.equal(expected)
        assert lse.equal(expected_lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expanded(tensors, check, case):
    """Stride 0: one entry along an axis stands for all."""
    for dim in range(len(case.grid) + 2):
        plain = tensors(case)
        k, v = (x.narrow(dim, 0, 1).expand_as(x) for x in plain[1:3])
        check(case, (plain[0], k, v, *plain[3:]))
        q = plain[0].narrow(dim, 0, 1).expand_as(plain[0])
        check(case, (q, *plain[1:]))
    extra_k, extra_v = (x[:1].expand_as(x) for x in plain[3:])
    check(case, (*plain[:3], extra_k, extra_v))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strides_of_one_entry_do_not_matter(tensors, check, case):
    case = case.with_(batch=1, heads=1, heads_kv=1)
    odd = []
    for x in tensors(case):
        strides = [3, *x.stride()[1:-2], 5, 1]
        odd.append(x.as_strided(x.shape, strides))
    check(case, odd)


LIMITED = [case.with_(batch=3, extra=0) for case in CASES]


def with_bad_token(x, token, value):
    """x, with a value all over one token of batch 1 and head 1."""
    x = x.clone()
    x.view(3, -1, *x.shape[-2:])[1, token, 1] = value
    return x


@pytest.mark.parametrize(
    ("place", "value"),
    [(1, torch.nan), (1, torch.inf), (1, -torch.inf), (2, 3e38), (2, -3e38)],
    ids=lambda x: "qkv"[x] if isinstance(x, int) else str(x),
)
@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("case", LIMITED, ids=str)
def test_token_reaches_who_sees_it(tensors, attend, case, extra, place, value):
    """The other rows are the same bits, also where they share a tile with it.

    What they do not see may be any key, and any finite value: a weight of 0 times NaN is NaN.
    """
    case = case.with_(extra=extra)
    *given, extra_k, extra_v = tensors(case)
    extras = {"extra_k": extra_k, "extra_v": extra_v}
    expected, expected_lse = attend(*given, **extras, **case.options())
    visible = case.visible(given[0].device)
    tokens = visible.shape[0]
    for token in (0, tokens // 2, tokens - 1):
        bad = list(given)
        bad[place] = with_bad_token(bad[place], token, value)
        out, lse = attend(*bad, **extras, **case.options())
        hit = torch.zeros(3, tokens, 4, dtype=torch.bool, device=lse.device)
        hit[1, :, 2:] = visible[:, token, None]
        hit = hit.view(lse.shape)
        assert out[~hit].equal(expected[~hit])
        assert lse[~hit].equal(expected_lse[~hit])
        if value is torch.nan:
            assert out[hit].isnan().all()
        elif place == 2:
            assert not out[hit].isclose(expected[hit]).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("dilation", "causal"), [(1, False), (1, True), (3, False)])
def test_bad_value_stays_near(tensors, attend, dilation, causal, value):
    """NaN in V reaches no row that is further away than the window and two tiles."""
    case = Case((6000,), 100, 8, dilation, causal, dim=128)
    q, k, v, *_ = tensors(case)
    expected, _ = attend(q, k, v, **case.options())
    v[:, 3000] = value
    out, _ = attend(q, k, v, **case.options())
    far = (torch.arange(6000, device=q.device) - 3000).abs() > (100 + 2 * 256) * dilation
    assert out[:, far].equal(expected[:, far])
    assert not out[:, 3000].isfinite().any()


@pytest.mark.parametrize("place", [1, 2, 3, 4], ids=NAMES.__getitem__)
@pytest.mark.parametrize("case", LIMITED, ids=str)
def test_bad_batch_and_head_stay_alone(tensors, attend, case, place):
    """One head of one batch is NaN; also the extra tokens alone, and all of the grid alone."""
    case = case.with_(extra=7)

    def run(given):
        q, k, v, extra_k, extra_v = given
        return attend(q, k, v, extra_k=extra_k, extra_v=extra_v, **case.options())

    given = list(tensors(case))
    expected, expected_lse = run(given)
    given[place] = with_bad_token(given[place], slice(None), torch.nan)
    out, lse = run(given)
    assert out[1][..., 2:, :].isnan().all()
    out[1][..., 2:, :] = expected[1][..., 2:, :]
    lse[1][..., 2:] = expected_lse[1][..., 2:]
    assert out.equal(expected)
    assert lse.equal(expected_lse)


PITCH = 1 << 19  # elements from one token to the next: 2^32 from the first to the last, 8 GiB


@pytest.mark.parametrize(
    "case",
    [
        Case((8192,), 200, 16, dim=128, heads=1),
        Case((8192,), 200, 16, 3, True, dim=128, heads=1),
        Case((64, 64), 9, 2, 3, batch=2, dim=128, heads=1),
        Case((16, 16, 16), 5, 2, (1, 2, 3), batch=2, dim=128, heads=1),
    ],
    ids=str,
)
def test_strides_beyond_32_bits(cuda, tensors, check, no_cache, case):
    buffer = torch.empty(case.batch, *case.grid, 1, PITCH, dtype=case.dtype, device=cuda)
    given = [
        buffer[..., i * 1024 :][..., : case.dim].copy_(x) for i, x in enumerate(tensors(case)[:3])
    ]
    check(case, (*given, None, None))


def test_output_beyond_32_bits(cuda, randn, agrees, no_cache):
    """2.2e9 elements of q and of out."""
    case = Case((20, 128, 128), (3, 3, 4), (1, 2, 1), (1, 2, 3), (True, False, False))
    q = torch.empty(2, *case.grid, 26, 128, dtype=torch.bfloat16, device=cuda).normal_()
    k, v = (randn(2, *case.grid, 1, 128, seed=s) for s in (1, 2))
    assert q.numel() > 1 << 31
    out, lse = sparse_fmha.neighborhood_attention(q, k, v, return_lse=True, **case.options())
    for b, *query in [(0, 0, 0, 0), (0, 19, 127, 127), (1, 18, 126, 3), (1, 19, 127, 126)]:
        at = (slice(b, b + 1), *(slice(i, i + 1) for i in query))
        seen = torch.meshgrid(*(i.to(cuda) for i in case.seen_from(*query)), indexing="ij")
        keys, values = (x[b : b + 1][(slice(None), *seen)] for x in (k, v))
        agrees(*(x[at].contiguous() for x in (out, lse, q)), keys, values)


def replaced(place, x):
    """Arguments of a small problem, of which one tensor is replaced."""
    return dict(zip(NAMES, [*small()[:place], x, *small()[place + 1 :]], strict=True))


def small(device="cuda", dtype=torch.bfloat16):
    grid = [torch.ones(2, 12, 16, 2, 64, device=device, dtype=dtype) for _ in range(3)]
    return [*grid, *(torch.ones(2, 5, 2, 64, device=device, dtype=dtype) for _ in range(2))]


@pytest.mark.parametrize("place", range(5), ids=NAMES.__getitem__)
def test_layouts_that_the_copy_engine_does_not_take(place):
    x = torch.randn_like(small()[place])
    expected = sparse_fmha.neighborhood_attention(window=3, **replaced(place, x))
    odd = [x.new_empty(x.numel() + 4)[4:].view(x.shape).copy_(x)]
    for dim in range(x.dim() - 1):
        strides = [2 * s for s in x.stride()[:-1]] + [1]
        strides[dim] += 4
        odd.append(x.new_empty(4 * x.numel()).as_strided(x.shape, strides).copy_(x))
    for view in odd:
        result = sparse_fmha.neighborhood_attention(window=3, **replaced(place, view))
        assert torch.equal(result, expected), view.stride()


@pytest.mark.parametrize("place", range(5), ids=NAMES.__getitem__)
def test_mixed_devices(place):
    given = replaced(place, small("cpu")[place])
    with pytest.raises(ValueError, match=r"must be on .* device"):
        sparse_fmha.neighborhood_attention(window=3, **given)
    tensors = [given[name] for name in NAMES]
    one = [1, 1]
    with pytest.raises(RuntimeError, match=r"\b(k|v|extra_k|extra_v) must be on q's device"):
        OP(*tensors[:3], [3, 3], one, one, [0, 0], None, *tensors[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_have_no_kernel(dtype):
    q, k, v, *_ = small(dtype=dtype)
    with pytest.raises(
        TypeError, match=f"q must have dtype .*float16 or .*bfloat16 on cuda, got {dtype}"
    ):
        sparse_fmha.neighborhood_attention(q, k, v, 3)
    arch, name = other_archs.in_use(), str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=f"(?s)no kernel for arch={arch}, .*dtype={name}"):
        OP(q, k, v, [3, 3], [1, 1], [1, 1], [0, 0])


def test_grids_without_a_window_are_named():
    q, k, v, *_ = small()
    with pytest.raises(ValueError, match=r"window\[0\] must be at least 1, got 0"):
        sparse_fmha.neighborhood_attention(q, k, v, (0, 3))
    with pytest.raises(
        ValueError, match=r"window\[0\] \* dilation\[0\] must be at most the 1 tokens .*got 2 \* 1"
    ):
        sparse_fmha.neighborhood_attention(q[:, :1], k[:, :1], v[:, :1], (2, 3))
    with pytest.raises(RuntimeError, match=r"window\[1\] \* dilation\[1\] must be .*, got 9 \* 2"):
        OP(q, k, v, [3, 9], [1, 1], [1, 2], [0, 0])
