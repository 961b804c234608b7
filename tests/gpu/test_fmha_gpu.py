"""attention on the GPU: its numbers, over dtypes, head dims, lengths, heads and scales."""

import random

import pairwise
import pytest
import torch

import sparse_fmha

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (8, 40, 64, 72, 96, 128, 136, 192, 256)
LENGTHS = [
    (1, 1),
    (63, 63),
    (64, 64),
    (129, 129),
    (1000, 1000),
    (200, 90),
    (90, 200),
    (320, 64),
    (1, 777),
    (777, 1),
]


@pairwise.parametrize(dtype=DTYPES, dim=HEAD_DIMS, lengths=LENGTHS, causal=(False, True))
def test_shapes(make_qkv, attend, agrees, dtype, dim, lengths, causal):
    q, k, v = make_qkv(2, *lengths, 2, 2, dim, dtype)
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long(make_qkv, attend, agrees, dtype, dim, causal):
    q, k, v = make_qkv(1, 4097, 4097, 3, 3, dim, dtype)
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(8, 2), (6, 1), (17, 17), (34, 2)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_grouped_heads(make_qkv, attend, agrees, dim, heads, causal):
    q, k, v = make_qkv(3, 333, 411, *heads, dim)
    agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 79, 80, 81, 127, 128, 129, 159, 160, 161, 241])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_key_tile_borders(make_qkv, attend, agrees, dim, length):
    for causal in (False, True):
        q, k, v = make_qkv(1, 193, length, 2, 2, dim)
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("length", [65, 127, 128, 191, 192, 193, 255, 257, 384, 385])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_query_tile_borders(make_qkv, attend, agrees, dim, length):
    for causal in (False, True):
        q, k, v = make_qkv(1, length, 300, 2, 2, dim)
        agrees(*attend(q, k, v, causal=causal), q, k, v, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.125, 1.0, 1e-6, 1e-40, -3.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scale(make_qkv, attend, agrees, dim, scale, causal):
    q, k, v = make_qkv(2, 257, 300, 2, 1, dim)
    agrees(*attend(q, k, v, causal=causal, scale=scale), q, k, v, causal, scale)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_without_keys(make_qkv, attend, dim):
    q, k, v = make_qkv(2, 640, 64, 2, 2, dim)
    out, lse = attend(q, k, v, causal=True)
    assert out[:, :576].eq(0).all()
    assert lse[:, :576].eq(-torch.inf).all()
    assert lse[:, 576:].isfinite().all()


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_maximum(make_qkv, attend, agrees, dtype, dim, scale, order):
    """Scores that drift by hundreds along the keys, so that the row maximum moves in each tile."""
    q, k, v = make_qkv(1, 200, 1000, 2, 2, dim, dtype)
    q[..., 0] = 8
    k[..., 0] = torch.linspace(-16, 16 * order, 1000, device=k.device, dtype=dtype)[:, None]
    agrees(*attend(q, k, v, scale=scale), q, k, v, False, scale)


def test_one_key_wins(make_qkv, attend):
    """Scores of 1e5 in log2 units, where fp32 has steps of 2^-7: the weight of the best key is 1 to
    one unit of the last place of the result, that of all others 0.
    """
    q, k, v = make_qkv(1, 192, 500, 2, 2, 128)
    winner = torch.arange(192, device=q.device) * 7 % 500
    k[:, winner] = 32 * q
    out, lse = attend(q, k, v, scale=16.0)
    torch.testing.assert_close(out, v[:, winner], rtol=2**-7, atol=0)
    top = 16.0 * (q.double() * k[:, winner].double()).sum(-1)
    torch.testing.assert_close(lse.double(), top, rtol=4e-6, atol=0)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_every_time(make_qkv, attend, dim, causal):
    q, k, v = make_qkv(2, 1500, 1500, 16, 4, dim)
    out, lse = attend(q, k, v, causal=causal)
    for _ in range(5):
        again, again_lse = attend(q, k, v, causal=causal)
        assert again.equal(out)
        assert again_lse.equal(lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_batch_and_heads_are_independent(make_qkv, attend, one_kernel, dim, causal):
    q, k, v = make_qkv(3, 700, 700, 20, 5, dim)
    out, lse = attend(q, k, v, causal=causal)
    for b, h in [(0, 0), (1, 7), (2, 19)]:
        one = slice(b, b + 1), slice(None)
        alone, alone_lse = attend(
            q[one][:, :, h : h + 1],
            k[one][:, :, h // 4 : h // 4 + 1],
            v[one][:, :, h // 4 :][:, :, :1],
            causal=causal,
        )
        assert alone[0, :, 0].equal(out[b, :, h])
        assert alone_lse[0, :, 0].equal(lse[b, :, h])


@pytest.mark.parametrize("shape", ["no batch", "no queries", "no keys", "no heads"])
@pytest.mark.parametrize("causal", [False, True])
def test_empty(make_qkv, attend, shape, causal):
    sizes = {
        "no batch": (0, 64, 64, 2, 2),
        "no queries": (2, 0, 64, 2, 2),
        "no keys": (2, 64, 0, 2, 2),
        "no heads": (2, 64, 64, 0, 0),
    }[shape]
    q, k, v = make_qkv(*sizes, 64)
    out, lse = attend(q, k, v, causal=causal)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def random_case(seed):
    rng = random.Random(seed)
    heads_kv = rng.randint(1, 4)
    return {
        "batch": rng.randint(1, 4),
        "len_q": int(2 ** rng.uniform(0, 11)),
        "len_kv": int(2 ** rng.uniform(0, 11)),
        "heads": heads_kv * rng.randint(1, 4),
        "heads_kv": heads_kv,
        "dim": 8 * rng.randint(1, 32),
        "dtype": rng.choice(DTYPES),
        "causal": rng.random() < 0.5,
        "scale": rng.choice([None, None, rng.uniform(-1, 1)]),
        "transposed": rng.random() < 0.5,
    }


@pytest.mark.parametrize("seed", range(60))
def test_random(make_qkv, attend, agrees, seed):
    case = random_case(seed)
    print(case)  # pytest shows it where the test fails
    causal, scale = case.pop("causal"), case.pop("scale")
    transposed = case.pop("transposed")
    q, k, v = make_qkv(**case, seed=seed)
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    agrees(*attend(q, k, v, causal=causal, scale=scale), q, k, v, causal, scale)


def test_agrees_with_flash_attention(make_qkv, attend):
    """PyTorch's own fused kernel, on the same tensors."""
    q, k, v = make_qkv(2, 1024, 1024, 4, 4, 128)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        ).transpose(1, 2)
    out, _ = attend(q, k, v, causal=True)
    torch.testing.assert_close(out, theirs, rtol=2e-2, atol=4e-3)


def test_lse_is_optional(make_qkv):
    q, k, v = make_qkv(1, 100, 100, 2, 2, 64)
    out, _ = sparse_fmha.attention(q, k, v, return_lse=True)
    assert sparse_fmha.attention(q, k, v).equal(out)
