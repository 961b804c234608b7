"""sdpa against torch's own, and the routing of calls."""

import pytest
import torch

import sparse_fmha
from sparse_fmha import route_sdpa, sdpa

torch_sdpa = torch.nn.functional.scaled_dot_product_attention


def given(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 70), (30, 90), (90, 30), (1, 40), (40, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_as_torch(q_len, kv_len, is_causal, scale):
    q, k, v = given((2, 4, q_len, 16), (2, 4, kv_len, 16), (2, 4, kv_len, 16))
    out = sdpa(q, k, v, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(out, torch_sdpa(q, k, v, is_causal=is_causal, scale=scale))
    assert out.shape == q.shape


@pytest.mark.parametrize(
    "shape", [(150, 170), (1, 1, 150, 170), (2, 1, 1, 170), (1, 4, 150, 170), (2, 4, 150, 1)]
)
def test_masks(shape):
    """Also rows that see nothing, which are 0 in torch, too."""
    q, k, v = given((2, 4, 150, 16), (2, 4, 170, 16), (2, 4, 170, 16))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = mask.index_fill(-2, torch.tensor([0]), False) if shape[-2] > 1 else mask
    torch.testing.assert_close(sdpa(q, k, v, mask), torch_sdpa(q, k, v, mask))


def test_three_dimensions():
    q, k, v = given((3, 50, 16), (3, 60, 16), (3, 60, 16))
    mask = torch.rand(3, 50, 60, generator=torch.Generator().manual_seed(1)) < 0.6
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask[0]}):
        torch.testing.assert_close(sdpa(q, k, v, **options), torch_sdpa(q, k, v, **options))


def test_grouped_heads():
    q, k, v = given((2, 8, 50, 16), (2, 2, 50, 16), (2, 2, 50, 16))
    options = {"is_causal": True, "enable_gqa": True}
    torch.testing.assert_close(sdpa(q, k, v, **options), torch_sdpa(q, k, v, **options))
    with pytest.raises(ValueError, match=r"query has 8 heads, key has 2; .* enable_gqa"):
        sdpa(q, k, v)


def test_nothing_is_copied():
    """Views of a [B, L, H, D] tensor, as models make them, arrive at the op as they are."""
    q = given((2, 50, 4, 16))[0].transpose(1, 2)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.sparse_fmha.fmha_fwd:
                seen.extend(x.data_ptr() for x in args[:3])
            return func(*args, **(kwargs or {}))

    with Watch():
        sdpa(q, q, q)
    assert seen == [q.data_ptr()] * 3


REFUSED = [
    ({"dropout_p": 0.1}, {}, "dropout_p is 0.1; only 0 is there"),
    ({"attn_mask": torch.zeros(20, 20)}, {}, "attn_mask has dtype torch.float32"),
    ({}, {"dim": 12}, "q has head dim 12; multiples of 8 from 8 to 256"),
    ({}, {"dim": 264}, "q has head dim 264"),
    ({}, {"dtype": torch.complex64}, "q has dtype torch.complex64; allowed on cpu are"),
    ({}, {"grad": True}, "gradients are asked for"),
    ({}, {"lead": (2,)}, "query has 5 dimensions; 3 or 4 are taken"),
]


def refused(dim=16, dtype=torch.float32, grad=False, lead=()):
    q = given((*lead, 1, 2, 20, dim))[0].to(dtype)
    return q.requires_grad_(grad)


@pytest.mark.parametrize(("options", "sizes", "message"), REFUSED)
def test_what_is_not_there(options, sizes, message):
    q = refused(**sizes)
    with pytest.raises(NotImplementedError, match=f"^sparse_fmha.sdpa: {message}"):
        sdpa(q, q, q, **options)


def test_a_mask_and_causal():
    q = refused()
    with pytest.raises(ValueError, match="attn_mask is given and is_causal is True"):
        sdpa(q, q, q, torch.ones(20, 20).bool(), is_causal=True)


def test_routing():
    q = refused()
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True

    def model(x):
        functional = torch.nn.functional
        x = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return functional.scaled_dot_product_attention(x, x, x, mask.float())

    plain = model(q)
    with route_sdpa() as routes:
        routed = model(q)
    torch.testing.assert_close(routed, plain)
    assert (routes.routed, dict(routes.left)) == (
        2,
        {"attn_mask has dtype torch.float32; only torch.bool is there": 1},
    )
    assert str(routes).splitlines()[0] == "2 calls routed to sparse_fmha"
    assert "1 left to torch: attn_mask has dtype" in str(routes)
    model(q)
    assert routes.routed == 2


def test_it_is_exported():
    assert {"sdpa", "route_sdpa"} <= set(sparse_fmha.__all__)
