"""Methods that choose keys of a cache by learned gates, rings and token lists."""

import math

import pytest
import torch
from dispatch_watch import Watch

from sparse_fmha import decode_attention, patterns

HEADS, HEADS_KV, DIM, GATE, BLOCK = 4, 2, 8, 16, 16


@pytest.fixture
def gate():
    torch.manual_seed(0)
    made = patterns.SeerDecodeGate(HEADS, HEADS_KV, DIM, gate_dim=GATE, block=BLOCK)
    for weight in (made.norm_q, made.norm_k):
        torch.nn.init.uniform_(weight, 0.5, 1.5)
    return made


def placed(x, weight, position):
    """RMSNorm and RoPE of one vector, by their formulas."""
    x = x / math.sqrt((x * x).mean() + torch.finfo(torch.float32).eps) * weight
    half = GATE // 2
    found = torch.empty(GATE)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / GATE)
        low, high = float(x[i]), float(x[i + half])
        found[i] = low * math.cos(angle) - high * math.sin(angle)
        found[i + half] = high * math.cos(angle) + low * math.sin(angle)
    return found


@torch.no_grad()
def scores_by_definition(gate, q, k):
    """Of the complete blocks before the newest, for one request: `[Hkv, blocks]`."""
    length = len(k)
    newest = (length - 1) // BLOCK
    scores = torch.empty(HEADS_KV, newest)
    group = HEADS // HEADS_KV
    for head in range(HEADS_KV):
        own = q[head * group : (head + 1) * group].flatten() @ gate.weight_q[head]
        own = placed(own, gate.norm_q, length - 1)
        for block in range(newest):
            keys = k[block * BLOCK : (block + 1) * BLOCK, head]
            pools = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)]) @ gate.weight_k[head]
            pools = placed(pools, gate.norm_k, block * BLOCK)
            scores[head, block] = own @ pools / math.sqrt(GATE)
    return scores


LENGTHS = [100, 33, 7, 16]


def kept(gate, k, prompt, steps):
    """Compressed keys of prompts, then of one token after the other."""
    keys = patterns.SeerKeys(gate, len(LENGTHS), 128)
    lens = torch.tensor(prompt)
    keys.start(k[:, : max(prompt)], lens)
    with Watch():
        for _ in range(steps):
            requests = torch.arange(len(lens))
            keys.write(k[requests, lens], lens)
            lens = lens + 1
    return keys, lens


@pytest.mark.parametrize("steps", [0, 1, 20])
def test_seer_scores(gate, steps):
    k = torch.randn(4, 128, HEADS_KV, DIM)
    q = torch.randn(4, 1, HEADS, DIM)
    keys, lens = kept(gate, k, LENGTHS, steps)
    found = gate(q, keys.compressed, lens)
    for b, length in enumerate(lens.tolist()):
        wanted = scores_by_definition(gate, q[b, 0], k[b, :length])
        torch.testing.assert_close(found[b, :, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)
        assert found[b, :, wanted.shape[1] :].eq(-torch.inf).all()


def test_seer_keys_of_a_prompt_are_those_token_by_token(gate):
    k = torch.randn(4, 128, HEADS_KV, DIM)
    whole, _ = kept(gate, k, LENGTHS, 0)
    single = patterns.SeerKeys(gate, 4, 128)
    for position in range(100):
        at = torch.tensor([position if position < n else -1 for n in LENGTHS])
        single.write(k[:, position], at)
    torch.testing.assert_close(single.compressed, whole.compressed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("budget", "threshold"), [(16, None), (48, None), (999, None), (None, 0.2)]
)
def test_seer_blocks(gate, budget, threshold):
    k = torch.randn(4, 128, HEADS_KV, DIM)
    q = torch.randn(4, 1, HEADS, DIM)
    keys, lens = kept(gate, k, LENGTHS, 0)
    lens[2] = 0  # padding
    with Watch():
        blocks = gate.blocks(q, keys.compressed, lens, budget=budget, threshold=threshold)
    indices, counts, block = blocks
    assert block == BLOCK
    for b, length in enumerate(lens.tolist()):
        for head in range(HEADS_KV):
            listed = indices[b, head, : counts[b, head]].tolist()
            if not length:
                assert listed == []
                continue
            scores = scores_by_definition(gate, q[b, 0], k[b, :length])[head]
            if threshold is None:
                wanted = scores.topk(min(budget // BLOCK - 1, len(scores))).indices
            else:
                wanted = (scores.softmax(0) > threshold).nonzero()[:, 0]
            assert listed[0] == (length - 1) // BLOCK
            assert sorted(listed[1:]) == sorted(wanted.tolist())
    out = decode_attention(q, k, k, lens.int(), blocks=blocks)
    assert out.isfinite().all()


def test_seer_errors(gate):
    q, keys = torch.zeros(4, 1, HEADS, DIM), patterns.SeerKeys(gate, 4, 128)
    lens = torch.ones(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="exactly one of budget and threshold must be given"):
        gate.blocks(q, keys.compressed, lens)
    with pytest.raises(ValueError, match="budget must be at least 16, got 15"):
        gate.blocks(q, keys.compressed, lens, budget=15)
    odd = patterns.SeerDecodeGate(4, 2, 8, gate_dim=12, block=16)
    with pytest.raises(ValueError, match="gate_dim must be a multiple of 8 from 8 to 256, got 12"):
        odd.blocks(q, keys.compressed, lens, budget=16)
    with pytest.raises(ValueError, match=r"q must have shape \[any, 1, 4, 8\], got \[4, 2, 4, 8\]"):
        gate(q.expand(4, 2, HEADS, DIM), keys.compressed, lens)
    with pytest.raises(ValueError, match="k must have 4 requests of at most 128 keys"):
        keys.start(torch.zeros(4, 129, HEADS_KV, DIM), lens)
    with pytest.raises(ValueError, match="block must be 16, 32, 64 or 128, got 48"):
        patterns.SeerDecodeGate(4, 2, 8, block=48)
    with pytest.raises(ValueError, match="heads must be a multiple of heads_kv = 3, got 4"):
        patterns.SeerDecodeGate(4, 3, 8)


def test_a_moa_cache_holds_sinks_and_the_newest_tokens():
    steps, sink, spans = 40, 4, [12, 20]
    cache = patterns.MoaCache(steps, [12.0, 10.0], [0.0, 0.25], sink=sink, min_span=8, block=4)
    assert list(cache.spans) == spans
    assert cache.rows == sum(spans)
    k, v = torch.randn(2, 2, steps, 2, DIM)
    kept_k, kept_v = torch.full((2, 2, cache.rows, DIM), torch.nan)
    for p in range(steps):
        places = cache.places(torch.tensor([p, p]))
        for b in range(2):
            kept_k[b, places[b]], kept_v[b, places[b]] = k[b, p], v[b, p]
        # The second request is one token behind.
        seq_lens = torch.tensor([p + 1, 0 if p < 3 else p + 1], dtype=torch.int32)
        q = torch.randn(2, 1, HEADS, DIM)
        views = (x.unsqueeze(2).expand(-1, -1, 2, -1) for x in (kept_k, kept_v))
        out = decode_attention(q, *views, **cache.keys(seq_lens))
        tokens = torch.full((2, 1, 2, max(spans)), -1, dtype=torch.int32)
        for b, length in enumerate(seq_lens.tolist()):
            for head, span in enumerate(spans):
                newest = range(max(sink, length - (span - sink)), length)
                seen = [*range(min(sink, length)), *newest]
                tokens[b, 0, head, : len(seen)] = torch.tensor(seen, dtype=torch.int32)
        wanted = decode_attention(q, k, v, seq_lens, tokens=(tokens, None))
        torch.testing.assert_close(out, wanted)


def masks():
    torch.manual_seed(1)
    q, k = torch.randn(2, 200, HEADS, DIM), torch.randn(2, 200, HEADS_KV, DIM)
    yield "hip", patterns.hip(q, k, keys=16, local=32)
    yield "token_top_k", patterns.token_top_k(q, k, 20)
    yield "vertical_slash", patterns.vertical_slash(q, k, vertical=8, slash=70)


@pytest.mark.parametrize(
    ("name", "mask"), [*masks()], ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize("heads_kv", [HEADS_KV, HEADS])
def test_newest_tokens(name, mask, heads_kv):
    with Watch():
        indices, counts = patterns.newest_tokens(mask, heads_kv)
    seen = mask.to_dense()[:, :, -1].unflatten(1, (heads_kv, -1)).any(2)
    assert seen.any()
    for b in range(2):
        for head in range(heads_kv):
            listed = indices[b, 0, head, : counts[b, 0, head]].tolist()
            assert listed == seen[b, head].nonzero()[:, 0].tolist()
            assert (indices[b, 0, head, counts[b, 0, head] :] == -1).all()
    q, k = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 200, heads_kv, DIM)
    lens = torch.tensor([200, 200], dtype=torch.int32)
    assert decode_attention(q, k, k, lens, tokens=(indices, counts)).isfinite().all()


def test_newest_tokens_of_a_mask_for_all_heads():
    q = torch.randn(1, 130, 1, DIM)
    mask = patterns.token_top_k(q, q, 9)
    indices, counts = patterns.newest_tokens(mask, 8)
    assert indices.shape[:3] == (1, 1, 1)
    assert counts.shape == (1, 1, 1)


def test_newest_tokens_refuses():
    q = torch.randn(1, 130, HEADS, DIM)
    mask = patterns.hip(q, q, keys=4, local=8)
    with pytest.raises(ValueError, match="heads_kv must divide the mask's 4 heads, got 3"):
        patterns.newest_tokens(mask, 3)
    with pytest.raises(ValueError, match="mask must have at least one query, got none"):
        patterns.newest_tokens(patterns.hip(q[:, :0], q, keys=4, local=8), 4)
