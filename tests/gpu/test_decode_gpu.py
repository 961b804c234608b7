"""Decode attention on GPUs, against its definition on the CPU; tests/ops has the rest."""

import decode_cases
import pytest
import torch
from decode_oracle import assert_as_good_as_eager, tanh_error
from pairwise import parametrize

from sparse_fmha import decode_attention

pytestmark = pytest.mark.gpu
FORMS = pytest.mark.parametrize("form", decode_cases.FORMS)


def on(device, value):
    if isinstance(value, tuple):
        return tuple(on(device, x) for x in value)
    return value.to(device) if torch.is_tensor(value) else value


def moved(device, call):
    """The call on a device, with the caches' layout."""
    return {name: on(device, value) for name, value in call.items()}


def check(device, call, **changes):
    """out and lse on the GPU agree with the definition in fp64."""
    __tracebackhide__ = True
    call = {**call, **changes}
    given = moved(device, call)
    given["out"] = torch.full_like(given["q"], torch.nan)
    out, lse = (x.cpu() for x in decode_attention(**given, return_lse=True))
    assert_as_good_as_eager(call, out, lse, 1e-3 + tanh_error(call))


@parametrize(
    form=decode_cases.FORMS,
    page=[None, 1, 7, 16, 64, 128],
    len_q=[1, 2, 5, 16],
    heads=[(1, 1), (3, 3), (5, 1), (8, 2), (16, 1)],
    dim=[8, 64, 72, 128, 256],
    dtype=[torch.float16, torch.bfloat16],
    layout=decode_cases.LAYOUTS,
    by_head=[False, True],
    causal=[True, False],
    window=[None, 1, 70],
    scale=[None, -0.3],
    softcap=[0.0, 0.7, 5.0, 50.0],
    split_tokens=[None, 64, 128],
)
def test_drawn(
    cuda,
    form,
    page,
    len_q,
    heads,
    dim,
    dtype,
    layout,
    by_head,
    causal,
    window,
    scale,
    softcap,
    split_tokens,
):
    options = {"len_q": len_q, "heads": heads, "dim": dim, "dtype": dtype, "layout": layout}
    options |= {"by_head": by_head, "causal": causal, "window": window, "scale": scale}
    options["softcap"] = softcap
    for seed in range(3):
        call = decode_cases.draw(seed, form, page, split_tokens=split_tokens, **options)
        check(cuda, call)


@parametrize(
    form=decode_cases.FORMS,
    page=[None, 16, 64],
    len_q=[1, 2, 4],
    heads=[(4, 2), (3, 3), (8, 1)],
    dim=[64, 128],
    softcap=[0.7, 5.0, 50.0],
    window=[None, 1000],
)
def test_caps_of_few_rows(cuda, form, page, len_q, heads, dim, softcap, window):
    """In the kernel for few rows where it takes the form, of Hopper; some scores are large."""
    options = {"len_q": len_q, "heads": heads, "dim": dim, "window": window, "softcap": softcap}
    call = decode_cases.draw(1, form, page, rows=1500, dtype=torch.bfloat16, **options)
    check(cuda, call)
    check(cuda, call, q=4 * call["q"])


@FORMS
def test_lengths_around_pages(cuda, form):
    lengths = [0, 1, 15, 16, 17, 47, 48, 1000]
    options = {"rows": 48, "len_q": 2, "lengths": lengths, "dtype": torch.float16, "dim": 64}
    check(cuda, decode_cases.draw(5, form, 16, batch=len(lengths), **options))


@pytest.mark.parametrize("split_tokens", [None, 256])
def test_long_and_short_requests(cuda, split_tokens):
    lengths = [3000, 1, 0, 64, 1999, 65]
    options = {"batch": 6, "rows": 3000, "lengths": lengths, "dtype": torch.bfloat16, "dim": 128}
    check(cuda, decode_cases.draw(6, "all", 16, **options), split_tokens=split_tokens)


@pytest.mark.parametrize("len_q", [3, 40])
def test_trees_and_sinks(cuda, len_q):
    generator = torch.Generator().manual_seed(len_q)
    call = decode_cases.draw(8, "all", 16, len_q=len_q, rows=100, dtype=torch.float16)
    call["tree_mask"] = decode_cases.bits_of_trees(generator, 4, len_q)
    decode_cases.fill(call, generator)
    check(cuda, call)
    check(cuda, call, sink=torch.tensor([0.5, -2.0, -torch.inf, 30.0]))


@FORMS
def test_lengths_change_between_replays(cuda, form):
    call = decode_cases.draw(9, form, 16, rows=900, dtype=torch.float16, dim=64)
    for name in ("k_cache", "v_cache"):
        call[name].nan_to_num_(0.5)
    given = moved(cuda, call)
    decode_attention(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = decode_attention(**given, return_lse=True)
    for lengths in ([900, 1, 0, 64], [2, 899, 300, 65], [0, 0, 0, 0]):
        given["seq_lens"].copy_(decode_cases.int32(lengths))
        graph.replay()
        wanted = decode_attention(**given, return_lse=True)
        for a, b in zip(results, wanted, strict=True):
            assert a.equal(b)


def test_results_do_not_depend_on_other_requests(cuda):
    call = decode_cases.draw(10, "all", rows=1500, split_tokens=128, dtype=torch.float16)
    given = moved(cuda, call)
    together = decode_attention(**given)
    assert decode_attention(**given).equal(together)
    for b in range(4):
        one = {n: x[b : b + 1] if torch.is_tensor(x) else x for n, x in given.items()}
        assert decode_attention(**one).equal(together[b : b + 1])


@pytest.mark.parametrize("page", decode_cases.PAGES)
def test_all_combinations(cuda, page):
    """Of pages, splits, new tokens, heads and ragged lengths."""
    for call in decode_cases.product("all", page, dim=64, dtype=torch.bfloat16):
        check(cuda, call)


@pytest.mark.parametrize("split_tokens", [None, 1024])
@pytest.mark.parametrize("skip_threshold", [0.0, 0.1])
def test_memory_follows_from_sizes(cuda, split_tokens, skip_threshold):
    """What a call allocates does not depend on lengths, so a graph has room for all of them."""
    if cuda.type != "cuda":
        pytest.skip("the emulator has no allocator of its own")
    options = {"dtype": torch.bfloat16, "device": cuda}
    q = torch.randn(4, 1, 8, 128, **options)
    k, v = torch.randn(2, 4, 65536, 2, 128, **options)
    given = {"split_tokens": split_tokens, "skip_threshold": skip_threshold}
    taken = []
    for length in (0, 1, 65536, 3):
        lens = torch.full((4,), length, dtype=torch.int32, device=cuda)
        decode_attention(q, k, v, lens, **given)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(cuda)
        before = torch.cuda.memory_allocated(cuda)
        decode_attention(q, k, v, lens, **given)
        taken.append(torch.cuda.max_memory_allocated(cuda) - before)
    assert len({*taken}) == 1
