"""attention on the GPU: where its tensors lie, and which it turns down."""

import other_archs
import pytest
import torch

import sparse_fmha

pytestmark = pytest.mark.gpu

OPS = torch.ops.sparse_fmha


def packed(q, k, v):
    """Slices of one [B, L, 3, H, D] tensor."""
    return torch.stack((q, k, v), dim=2).unbind(2)


def heads_first(q, k, v):
    """[B, H, L, D] in memory."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def length_first(q, k, v):
    """[L, B, H, D] in memory."""
    return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))


def amid_nan(q, k, v):
    """Views of larger tensors that are NaN all around them, on each axis."""
    return tuple(_amid_nan(x) for x in (q, k, v))


def _amid_nan(x):
    b, n, h, d = x.shape
    buffer = x.new_full((b + 2, n + 300, h + 2, d + 16), torch.nan)
    view = buffer[1 : b + 1, 100 : n + 100, 1 : h + 1, 8 : d + 8]
    return view.copy_(x)


def every_other_head(q, k, v):
    return tuple(x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v))


LAYOUTS = (packed, heads_first, length_first, amid_nan, every_other_head)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [40, 64, 128, 192, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(make_qkv, attend, agrees, layout, dim, causal):
    q, k, v = layout(*make_qkv(2, 333, 333, 4, 4, dim))
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


def test_strides_of_one_entry_do_not_matter(make_qkv, attend, agrees):
    q, k, v = (x.as_strided(x.shape, (3, 64, 5, 1)) for x in make_qkv(1, 200, 200, 1, 1, 64))
    agrees(*attend(q, k, v), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
def test_expanded_keys(make_qkv, attend, agrees, axis, causal):
    """Stride 0: one batch or head of keys and values stands for all."""
    q, k, v = make_qkv(3, 200, 300, 4, 4, 128)
    k, v = (x.narrow(axis, 0, 1).expand_as(x) for x in (k, v))
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


def test_expanded_queries(make_qkv, attend, agrees):
    q, k, v = make_qkv(3, 200, 300, 4, 4, 128)
    q = q[:, :, :1].expand_as(q)
    agrees(*attend(q, k, v), q, k, v)


def off_by_four(x, axis):
    """x with data that no multiple of 16 bytes starts (axis None), or such a stride on an axis."""
    if axis is None:
        return x.new_empty(x.numel() + 4)[4:].view(x.shape).copy_(x)
    strides = [1]
    for at, size in ((2, x.shape[3]), (1, x.shape[2]), (0, x.shape[1])):
        whole = -(-size * strides[0] // 8) * 8
        strides.insert(0, whole + 4 * (axis == at))
    return x.new_empty(x.shape[0] * strides[0]).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("skip_threshold", [0.0, 0.01])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("place", [0, 1, 2], ids="qkv".__getitem__)
def test_layouts_that_the_copy_engine_does_not_take(make_qkv, place, axis, skip_threshold):
    tensors = list(make_qkv(2, 64, 64, 2, 2, 128))
    expected = sparse_fmha.attention(*tensors, skip_threshold=skip_threshold, return_lse=True)
    tensors[place] = off_by_four(tensors[place], axis)
    result = sparse_fmha.attention(*tensors, skip_threshold=skip_threshold, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "packed", "odd"])
def test_what_is_copied(make_qkv, layout):
    """Only what has to be: the output, and a tensor that the copy engine does not take."""
    b, length, heads, dim = 2, 1024, 4, 128
    q, k, v = make_qkv(b, length, length, heads, heads, dim)
    if layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "packed":
        q, k, v = torch.stack((q, k, v), 3).unbind(3)
    else:
        q = off_by_four(q, 2)
    sparse_fmha.attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sparse_fmha.attention(q, k, v)
    tensor = b * length * heads * dim * 2
    tensors = (torch.cuda.max_memory_allocated() - before) // tensor
    assert tensors == (2 if layout == "odd" else 1)


@pytest.mark.parametrize("causal", [False, True])
def test_strides_beyond_32_bits(cuda, randn, agrees_at, causal):
    """Tokens 65536 elements apart: 2^32 elements from the first to the last, 8 GiB."""
    length, pitch, dim = 65536, 65536, 128
    buffer = torch.empty(length, pitch, dtype=torch.bfloat16, device=cuda)
    q, k, v = (buffer[:, i * 1024 :][:, :dim].view(1, length, 1, dim) for i in range(3))
    for seed, x in enumerate((q, k, v)):
        x.copy_(randn(*x.shape, seed=seed))
    out, lse = sparse_fmha.attention(q, k, v, causal=causal, return_lse=True)
    rows = torch.tensor([0, 1, 30000, 32767, 32768, 32769, 65000, 65535], device=cuda)
    agrees_at(rows, out, lse, q, k, v, causal)


def test_output_beyond_32_bits(cuda, randn, agrees_at):
    """2.2e9 elements of q and of out."""
    length, heads, dim = 1 << 17, 132, 128
    q = torch.empty(1, length, heads, dim, dtype=torch.bfloat16, device=cuda).normal_()
    k, v = (randn(1, 100, 1, dim, seed=s) for s in (1, 2))
    assert q.numel() > 1 << 31
    out, lse = sparse_fmha.attention(q, k, v, return_lse=True)
    rows = torch.tensor([0, 1, 63550, 127099, 127101, length - 1], device=cuda)
    agrees_at(rows, out, lse, q, k, v)


@pytest.fixture
def agrees_at(agrees):
    """agrees(), for the query rows listed: each is attention of one query."""

    def check(rows, out, lse, q, k, v, causal=False):
        for row in rows.tolist():
            seen = row + 1 + k.shape[1] - q.shape[1] if causal else k.shape[1]
            at = slice(row, row + 1)
            one = [x[:, at].contiguous() for x in (out, lse, q)]
            agrees(*one, k[:, :seen], v[:, :seen])

    yield check
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_have_no_kernel(make_qkv, dtype):
    q, k, v = make_qkv(1, 64, 64, 2, 2, 64, dtype)
    with pytest.raises(
        TypeError, match=f"q must have dtype .*float16 or .*bfloat16 on cuda, got {dtype}"
    ):
        sparse_fmha.attention(q, k, v)
    arch, name = other_archs.in_use(), str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=f"no kernel for arch={arch}, .*dtype={name}") as raised:
        OPS.fmha_fwd(q, k, v)
    assert f"{arch}_dense_bfloat16_d128" in str(raised.value)


@pytest.mark.parametrize("place", [0, 1, 2], ids="qkv".__getitem__)
def test_mixed_devices(make_qkv, place):
    tensors = list(make_qkv(1, 64, 64, 2, 2, 64))
    tensors[place] = tensors[place].cpu()
    with pytest.raises(ValueError, match=r"must be on .* device"):
        sparse_fmha.attention(*tensors)
    with pytest.raises(RuntimeError, match=r"\b[kv] must be on q's device"):
        OPS.fmha_fwd(*tensors)


def test_second_device(make_qkv, attend, agrees):
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    q, k, v = make_qkv(2, 333, 333, 4, 2, 128)
    expected, _ = attend(q, k, v)
    there = [x.to("cuda:1") for x in (q, k, v)]
    out, lse = attend(*there)
    assert out.device == lse.device == there[0].device
    assert torch.cuda.current_device() == 0
    assert out.cpu().equal(expected.cpu())
    with pytest.raises(ValueError, match="k must be on q's device, cuda:1, got cuda:0"):
        sparse_fmha.attention(there[0], k, v)
