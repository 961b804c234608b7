"""SeerAttention: the gate and what it learns from, against their definitions in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha.patterns import (
    SeerAttentionGate,
    SeerDecodeGate,
    load_seer_gates,
    seer_ground_truth,
)
from sparse_fmha.selection import reductions

FEW = settings(max_examples=25)
POOLS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch, q_len, kv_len, heads, dim=16, seed=0):
    q = normal(batch, q_len, heads[0], dim, seed=seed)
    return 2 * q, normal(batch, kv_len, heads[1], dim, seed=seed + 1)


def pooled(x, pools, block):
    """Concatenated along the head dim, [B, n, H, pools * D]."""
    parts = x.double().split(block, 1)
    return torch.cat(
        [torch.stack([POOLS[pool](part, 1) for part in parts], 1) for pool in pools], -1
    )


def rotated(x, first, block, base):
    """RoPE of [B, n, H, D] as complex numbers."""
    half = x.shape[-1] // 2
    position = first + block * torch.arange(x.shape[1], dtype=torch.float64)
    angle = position[:, None] * base ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def gate_scores(gate, q, k, q_pools, k_pools, base, causal):
    """The definition: logits [B, H, nQ, nK] in fp64."""
    q_len, kv_len, block = q.shape[1], k.shape[1], gate.block
    group = q.shape[2] // k.shape[2]
    gate_q, gate_k = pooled(q, q_pools, block), pooled(k, k_pools, block)
    weight_k = gate.weight_k.double()
    if weight_k.shape[0] != q.shape[2]:
        weight_k = weight_k.repeat_interleave(group, 0)
    gate_k = torch.stack([gate_k[:, :, h // group] @ weight_k[h] for h in range(q.shape[2])], 2)
    if gate.weight_q is not None:
        heads = [gate_q[:, :, h] @ gate.weight_q[h].double() for h in range(q.shape[2])]
        gate_q = torch.stack(heads, 2)
    gate_q = rotated(gate_q, kv_len - q_len, block, base)
    gate_k = rotated(gate_k, 0, block, base)
    scores = torch.einsum("bihd,bjhd->bhij", gate_q, gate_k) / math.sqrt(gate.gate_dim)
    for i in range(scores.shape[2]):
        last = min((i + 1) * block, q_len) - 1 + kv_len - q_len
        for j in range(scores.shape[3]):
            if causal and j * block > last:
                scores[:, :, i, j] = -torch.inf
    return scores


@FEW
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([(1, 1), (4, 2)]),
    st.sampled_from([16, 24]),
    st.sampled_from([("mean",), ("max", "mean")]),
    st.sampled_from([("max", "min", "mean"), ("mean",)]),
    st.sampled_from([64, 128]),
    st.booleans(),
)
def test_gate(q_len, kv_len, heads, gate_dim, q_pools, k_pools, block, causal):
    q, k = inputs(2, q_len, kv_len, heads)
    torch.manual_seed(0)
    options = {"gate_dim": gate_dim, "q_pools": q_pools, "k_pools": k_pools, "block": block}
    gate = SeerAttentionGate(*heads, 16, **options, rope_base=500.0)
    own_q = gate_dim != 16 or len(q_pools) > 1
    assert (gate.weight_q is not None) == own_q
    assert gate.weight_k.shape == (heads[own_q], len(k_pools) * 16, gate_dim)
    expected = gate_scores(gate, q, k, q_pools, k_pools, 500.0, causal)
    scores = gate(q, k, causal=causal)
    torch.testing.assert_close(scores, expected.float(), atol=1e-4, rtol=1e-4)
    shares = expected.softmax(-1).nan_to_num(0)
    made = gate(q, k, causal=causal, softmax=True)
    torch.testing.assert_close(made, shares.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dense_rows", [0, 2])
def test_masks_of_the_gate(causal, dense_rows):
    q, k = inputs(2, 1000, 1000, (4, 2))
    gate = SeerAttentionGate(4, 2, 16, gate_dim=16)
    scores = gate(q, k, causal=causal)
    options = {"causal": causal, "dense_rows": dense_rows}
    visible = scores > -torch.inf
    dense = (torch.arange(16) >= 16 - dense_rows)[:, None] & visible

    def of(keep):
        return scores >= scores.topk(keep).values.amin(-1, keepdim=True)

    for given_as, blocks in (
        ({}, scores.softmax(-1) > 2e-3),
        ({"threshold": 0.1}, scores.softmax(-1) > 0.1),
        ({"top_k": 3}, of(3) & visible),
        ({"nz_ratio": 0.5}, of(4) & visible),  # 16 * (1 - sqrt(1 / 2)) is 4.69
        ({"nz_ratio": 0}, of(1) & visible),
        ({"nz_ratio": 1}, visible),
    ):
        mask = gate.mask(q, k, **given_as, **options)
        mask.validate()
        assert (mask.block_q, mask.block_kv) == (64, 64)
        assert torch.equal(mask.blocks(), blocks | dense), given_as


def test_the_gate_learns():
    """Towards the ground truth by the KL divergence; q and k need no gradients."""
    torch.manual_seed(0)
    q, k = inputs(1, 600, 600, (2, 1))
    gate = SeerAttentionGate(2, 1, 16, gate_dim=16)
    truth = seer_ground_truth(q, k)
    optimizer = torch.optim.Adam(gate.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        logits = gate(q, k).masked_fill(truth == 0, -1e4)
        loss = torch.nn.functional.kl_div(logits.log_softmax(-1), truth, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_inverse_frequencies_and_defaults():
    gate = SeerAttentionGate(32, 8, 128)
    assert gate.weight_k.shape == (32, 384, 128)
    assert gate.weight_q is None
    assert gate.block == 64
    given_as = SeerAttentionGate(2, 1, 8, gate_dim=8, inv_freq=torch.zeros(4))
    q, k = inputs(1, 200, 200, (2, 1), 8)
    means = [torch.stack([p.mean(1) for p in x.split(64, 1)], 1) for x in (q, k)]
    scores = SeerAttentionGate(2, 1, 8, gate_dim=8, k_pools=("mean",), inv_freq=torch.zeros(4))
    torch.nn.init.eye_(scores.weight_k[0])
    torch.nn.init.eye_(scores.weight_k[1])
    expected = torch.einsum("bihd,bjd->bhij", means[0], means[1][:, :, 0]) / 8**0.5
    torch.testing.assert_close(scores(q, k, causal=False), expected)  # nothing is turned
    assert "inv_freq" not in given_as.state_dict()


@FEW
@given(
    st.integers(1, 2),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([(1, 1), (4, 2), (2, 2)]),
    st.sampled_from([(64, 64), (128, 16)]),
    st.booleans(),
    st.sampled_from([None, 0.7, -1]),
    st.sampled_from([1, 100_000, 1 << 26]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_ground_truth(batch, q_len, kv_len, heads, sizes, causal, scale, most, dtype):
    """Against the whole map."""
    q, k = (x.to(dtype) for x in inputs(batch, q_len, kv_len, heads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "SLICE", most)
        options = {"block_q": sizes[0], "block_kv": sizes[1]}
        truth = seer_ground_truth(q, k, causal=causal, scale=scale, **options)
    factor = 0.25 if scale is None else scale
    keys = k.double().repeat_interleave(heads[0] // heads[1], 2)
    scores = factor * torch.einsum("bihd,bjhd->bhij", q.double(), keys)
    if causal:
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        scores[:, :, j > i + kv_len - q_len] = -torch.inf
    weights = scores.softmax(-1).nan_to_num(0)
    rows, columns = -(-q_len // sizes[0]), -(-kv_len // sizes[1])
    expected = torch.zeros(batch, heads[0], rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            part = weights[:, :, i * sizes[0] : (i + 1) * sizes[0]]
            part = part[..., j * sizes[1] : (j + 1) * sizes[1]]
            expected[:, :, i, j] = part.amax((2, 3))
    expected /= expected.sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(truth, expected.float(), atol=1e-5, rtol=1e-4)


def test_ground_truth_of_large_scores():
    """The maximum of a row is subtracted: no overflow."""
    q, k = inputs(1, 130, 130, (1, 1))
    truth = seer_ground_truth(1e4 * q, k)
    assert truth.isfinite().all()
    torch.testing.assert_close(truth.sum(-1), torch.ones(1, 1, 3))


GATE = SeerAttentionGate(2, 1, 8, gate_dim=8)
Q, K = inputs(1, 70, 70, (2, 1), 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: SeerAttentionGate(3, 2, 8),
            ValueError,
            "heads must be a multiple of heads_kv = 2, got 3",
        ),
        (
            lambda: SeerAttentionGate(2, 1, 8, gate_dim=7),
            ValueError,
            "gate_dim must be even, got 7",
        ),
        (lambda: SeerAttentionGate(2, 1, 8, block=32), ValueError, "block_q must be .*, got 32"),
        (
            lambda: SeerAttentionGate(2, 1, 8, q_pools=()),
            ValueError,
            "q_pools must have at least one entry, got none",
        ),
        (
            lambda: SeerAttentionGate(2, 1, 8, k_pools=["avg"]),
            ValueError,
            "k_pools must be mean, max or min, got 'avg'",
        ),
        (
            lambda: SeerAttentionGate(2, 1, 8, inv_freq=torch.ones(3)),
            ValueError,
            r"inv_freq must have .*\[64\].*, got .*\[3\]",
        ),
        (lambda: GATE(K, K), ValueError, r"q must have .*2 heads of 8.*, got .*\[1, 70, 1, 8\]"),
        (
            lambda: GATE(Q, K[:, :, :, :4]),
            ValueError,
            r"k must have the batch and head dim of q, of",
        ),
        (
            lambda: GATE.mask(Q, K, threshold=0.1, top_k=2),
            ValueError,
            "at most one of threshold, top_k and nz_ratio must be given, got 0.1, 2",
        ),
        (
            lambda: GATE.mask(Q, K, threshold=2),
            ValueError,
            "threshold must be from 0 to 1.*, got 2",
        ),
        (lambda: GATE.mask(Q, K, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (
            lambda: GATE.mask(Q, K, nz_ratio=-1),
            ValueError,
            "nz_ratio must be from 0 to 1.*, got -1",
        ),
        (
            lambda: GATE.mask(Q, K, dense_rows=-1),
            ValueError,
            "dense_rows must be at least 0, got -1",
        ),
        (lambda: seer_ground_truth(Q, K[0]), ValueError, r"k must have .*, got .*\[70, 1, 8\]"),
        (
            lambda: seer_ground_truth(Q, K, block_q=32),
            ValueError,
            "block_q must be 64 or 128, got 32",
        ),
        (
            lambda: seer_ground_truth(Q, K, scale=math.nan),
            ValueError,
            "scale must be a finite number, got nan",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def gate_file(kind, layers=2, heads=4, heads_kv=2, dim=8, gate_dim=16):
    """Tensors with the names and shapes of a published file."""
    shapes = {
        "prefill": {"mask_linear_q": (heads, dim, gate_dim),
                    "mask_linear_k": (heads_kv, 3 * dim, gate_dim)},
        "decode": {"attngate_linear_q": (heads_kv, heads // heads_kv, dim, gate_dim),
                   "attngate_linear_k": (heads_kv, 3 * dim, gate_dim),
                   "attngate_qnorm": (gate_dim,), "attngate_knorm": (gate_dim,)},
    }[kind]  # fmt: skip
    return {
        f"model.layers.{n}.self_attn.attn_gate.{name}.weight": normal(*shape, seed=n)
        for n in range(layers) for name, shape in shapes.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_files_of_gates(kind, tmp_path):
    state = gate_file(kind)
    path = tmp_path / "attn_gate_weights.pth"
    torch.save({**state, "lm_head.weight": normal(2, 2)}, path)
    gates = load_seer_gates(path, 4, 2, 8, rope_base=5e5)
    assert list(gates) == [0, 1]
    for layer, gate in gates.items():
        own = [x for name, x in state.items() if f".{layer}." in name]
        assert isinstance(gate, SeerAttentionGate if kind == "prefill" else SeerDecodeGate)
        assert gate.weight_q.equal(own[0] if kind == "prefill" else own[0].flatten(1, 2))
        assert gate.weight_k.equal(own[1])
        assert gate.inv_freq[1].item() == pytest.approx(5e5 ** (-2 / 16))
        if kind == "decode":
            assert gate.norm_k.equal(own[3])
    if kind == "prefill":
        mask = gates[0].mask(*inputs(1, 200, 200, (4, 2), 8))
        assert mask.counts.shape == (1, 4, 4)


def test_files_that_are_no_gates():
    state = gate_file("prefill")
    for changed, match in (
        ({}, "got none"),
        ({**state, **gate_file("decode")}, "got both"),
        ({name: x for name, x in state.items() if "_k." not in name}, "of keys of layer 0"),
        ({name: x[:1] for name, x in state.items()}, "the weights of layer 0: .*size mismatch"),
    ):
        with pytest.raises(ValueError, match=f"(?s){match}"):
            load_seer_gates(changed, 4, 2, 8)
