"""Decode attention in CUDA graphs over changing data, far apart in memory, and behind adapters."""

import random

import decode_cases
import pages
import pytest
import torch

from sparse_fmha import decode_attention, patterns
from sparse_fmha.integrations.flash_attn import flash_attn_with_kvcache

pytestmark = pytest.mark.gpu
CALLS = {form: {"form": form} for form in decode_cases.FORMS} | {
    "pages of heads": {"by_head": True},
    "trees": {"len_q": 5, "tree_mask": torch.ones(5, 5, 1, dtype=torch.int32)},
    "thresholds": {"skip_threshold": torch.zeros(5)},
}
INT32 = ("seq_lens", "page_table", "head_starts", "head_lengths")


def moved(device, call):
    """The call on a device; caches keep their layout and hold no NaN."""

    def on(value):
        if isinstance(value, tuple):
            return tuple(map(on, value))
        return value.to(device) if torch.is_tensor(value) else value

    given = {name: on(value) for name, value in call.items()}
    for name in ("k_cache", "v_cache"):
        given[name].nan_to_num_(0.5)
    return given


def tables(call):
    """The int32 tensors of a call, whose values may change between replays."""
    found = [call[name] for name in INT32 if call.get(name) is not None]
    for name in ("blocks", "tokens"):
        found += [x for x in call.get(name) or () if torch.is_tensor(x)]
    return found


def change(rng, given):
    """What a call reads on the device, also to what is out of range."""
    for table in tables(given):  # shuffled: an entry may stand in a list twice
        order = torch.randperm(table.numel(), device=table.device)
        table.copy_(table.flatten()[order].view(table.shape))
    lens = given["seq_lens"]
    drawn = [rng.choice([0, 1, 16, 699, 700, 900, -3, rng.randrange(700)]) for _ in range(10)]
    lens.copy_(torch.tensor(drawn[: lens.numel()]).view(lens.shape))
    if "tree_mask" in given:
        given["tree_mask"].random_(-(2**31), 2**31)
    if "skip_threshold" in given:
        given["skip_threshold"].uniform_(-0.2, 1.2)
    given["q"].normal_()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("split_tokens", [None, 128])
def test_a_thousand_replays(cuda, name, split_tokens):
    """Lengths, tables, lists, trees and thresholds change; results are those of eager calls, to the
    bit."""
    options = {"rows": 700, "dtype": torch.bfloat16, "dim": 64, "heads": (8, 2), "batch": 5}
    options |= {"page": 16, "split_tokens": split_tokens}
    given = moved(cuda, decode_cases.draw(3, **options, **CALLS[name]))
    decode_attention(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decode_attention(**given, return_lse=True)
    rng = random.Random(0)
    for step in range(1000):
        change(rng, given)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        wanted = decode_attention(**given, return_lse=True)
        for a, b in zip(results, wanted, strict=True):
            assert a.equal(b), step
        assert results[0].isfinite().all()


def test_quest_is_captured(cuda):
    """Bounds, choice and attention of a step in one graph."""
    torch.manual_seed(0)
    pages, page, batch, width = 80, 16, 3, 24
    caches = torch.zeros(2, pages, page, 2, 64, dtype=torch.float16, device=cuda)
    table = torch.randperm(pages, device=cuda)[: batch * width].view(batch, width).int()
    lens = torch.zeros(batch, dtype=torch.int32, device=cuda)
    q, k, v = (torch.zeros(batch, 1, h, 64, dtype=torch.float16, device=cuda) for h in (8, 2, 2))

    def step(bounds, caches, lens):
        at = lens.long()
        places = table.gather(1, at[:, None] // page)[:, 0].long(), at % page
        caches[0][places], caches[1][places] = k[:, 0], v[:, 0]
        bounds.write(k[:, 0], places[0] * page + places[1])
        lens += 1
        blocks = patterns.quest(q, bounds, lens, table, budget=64)
        return decode_attention(q, *caches, lens, page_table=table, blocks=blocks)

    def bounds():
        return patterns.PageBounds(pages, page, 2, 64, dtype=torch.float16, device=cuda)

    captured, eager = bounds(), bounds()
    step(bounds(), caches.clone(), lens.clone())
    torch.cuda.synchronize()
    graph, own = torch.cuda.CUDAGraph(), (caches.clone(), lens.clone())
    with torch.cuda.graph(graph):
        out = step(captured, *own)
    for _ in range(200):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert out.equal(step(eager, caches, lens))
    assert own[1].equal(lens)


@pytest.mark.parametrize("paged", [False, True])
def test_strides_beyond_32_bits(cuda, paged):
    stride, count = 2**32 + 8, 5
    size = count * stride + 200_000
    if torch.cuda.mem_get_info(cuda)[0] < 2 * size + 2**30:
        pytest.skip("needs 41 GB of memory")
    far = torch.empty(size, dtype=torch.float16, device=cuda)
    options = {"dtype": torch.float16, "rows": 32, "batch": 2, "dim": 64, "bad": False}
    given = moved(cuda, decode_cases.draw(38, "all", 16 if paged else None, **options))
    if paged:
        given["page_table"].clamp_(max=count - 1)
    wanted = decode_attention(**given)
    for i, name in enumerate(("k_cache", "v_cache")):
        cache = given[name][:count]
        view = far.as_strided(cache.shape, (stride, *cache.stride()[1:]), i * 100_000)
        given[name] = view.copy_(cache)
    assert decode_attention(**given).equal(wanted)


def test_flash_attn_with_kvcache(cuda):
    """As on the CPU, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, h, 64, generator=generator).half() for h in (8, 2, 2))
    caches = torch.randn(2, 10, 16, 2, 64, generator=generator).half()
    options = {
        "block_table": torch.randperm(10, generator=generator)[:8].view(2, 4).int(),
        "cache_seqlens": torch.tensor([40, 7], dtype=torch.int32),
        "cache_leftpad": torch.tensor([0, 3], dtype=torch.int32),
    }
    on_gpu = {name: x.to(cuda) for name, x in options.items()}
    inputs = (q, *caches, k, v)
    found = flash_attn_with_kvcache(*(x.to(cuda) for x in inputs), **on_gpu, causal=True)
    wanted = flash_attn_with_kvcache(*inputs, **options, causal=True)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=2e-3)


def test_the_graph_of_the_serving_page(cuda):
    if cuda.type != "cuda":
        pytest.skip("the emulator has no graphs")
    blocks = pages.blocks_of(pages.ROOT / "docs" / "serving.md")
    (block,) = (block for block in blocks if "CUDAGraph" in block.code)
    names = {"__name__": "docs"}
    exec(compile(block.code, str(block), "exec"), names)
    torch.cuda.synchronize()
    assert names["out"][:6].isfinite().all()
    assert names["out"][6:].eq(0).all()
