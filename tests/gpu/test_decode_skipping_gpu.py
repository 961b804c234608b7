"""Decode attention that skips tiles on GPUs, against its definition; tests/ops has the rest."""

import decode_cases
import pytest
import torch
from decode_oracle import expected, tanh_error
from pairwise import parametrize

from sparse_fmha import decode_attention

pytestmark = pytest.mark.gpu
FORMS = pytest.mark.parametrize("form", decode_cases.FORMS)
THRESHOLDS = [0.0, 0.02, 0.2, 0.9]  # of the requests


def on(device, value):
    if isinstance(value, tuple):
        return tuple(on(device, x) for x in value)
    return value.to(device) if torch.is_tensor(value) else value


def moved(device, call):
    return {name: on(device, value) for name, value in call.items()}


def run(device, call, **changes):
    """out, lse and the counts on the CPU, of a call on the GPU."""
    given = moved(device, {**call, **changes})
    given["out"] = torch.full_like(given["q"], torch.nan)
    out, lse, stats = decode_attention(**given, return_lse=True, return_stats=True)
    return out.cpu(), lse.cpu(), stats.visited.cpu(), stats.skipped.cpu()


def check(device, call):
    __tracebackhide__ = True
    out, lse, visited, skipped = run(device, call)
    exact = expected(call)
    assert visited.equal(exact.visited)
    assert skipped.equal(exact.skipped)
    error = 1e-3 + tanh_error(call)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=2e-6, atol=error)
    assert out.isfinite().all()
    allowed = 8 * torch.finfo(out.dtype).eps * exact.out.abs().max()
    error = (out.double() - exact.out).abs().max()
    assert error <= allowed, (error, allowed)
    return skipped


@parametrize(
    form=decode_cases.FORMS,
    page=[None, 1, 16, 64],
    len_q=[1, 2, 12],
    heads=[(4, 2), (3, 3), (8, 1)],
    dim=[8, 64, 72, 128, 256],
    dtype=[torch.float16, torch.bfloat16],
    layout=decode_cases.LAYOUTS,
    window=[None, 600],
    scale=[1.0, -1.0],
    split_tokens=[64, 192, 1024],
)
def test_the_same_tiles_are_skipped(
    cuda, form, page, len_q, heads, dim, dtype, layout, window, scale, split_tokens
):
    options = {"len_q": len_q, "heads": heads, "dim": dim, "dtype": dtype, "layout": layout}
    options |= {"window": window, "scale": scale * 5 / dim**0.5, "split_tokens": split_tokens}
    lengths = [700, 690, 699, 1000]
    for seed in range(2):
        call = decode_cases.draw(seed, form, page, rows=700, lengths=lengths, **options)
        skipped = check(cuda, {**call, "skip_threshold": torch.tensor(THRESHOLDS)})
        if split_tokens == 64:
            assert skipped.eq(0).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [None, 1, 16])
def test_many_tiles_are_skipped(cuda, page, dim):
    """Runs of kept and of skipped tiles of all lengths."""
    options = {"rows": 8000, "dim": dim, "dtype": torch.float16, "heads": (4, 1), "batch": 3}
    call = decode_cases.draw(1, "all", page, lengths=[8000, 7999, 5000], bad=False, **options)
    way = call["q"][:, 0, 0].float()
    way /= way.norm(dim=-1, keepdim=True)
    call["q"] = (4 * way[:, None, None] + 0.1 * call["q"]).half()
    generator = torch.Generator().manual_seed(dim)
    for b in range(3):
        high = torch.rand(125, generator=generator) < 0.3
        along = torch.where(high, 4.0, -4.0).repeat_interleave(64)[:, None] * way[b]
        for position in range(int(call["seq_lens"][b])):
            at = b, position
            if page is not None:
                at = int(call["page_table"][b, position // page]), position % page
            call["k_cache"][at] = (along[position] + 0.1 * torch.randn(dim)).half()
    skipped = check(cuda, {**call, "scale": 1.0, "skip_threshold": 0.01, "split_tokens": 4096})
    assert skipped.sum() > 150


@FORMS
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("split_tokens", [None, 256])
def test_a_threshold_of_0_is_dense(cuda, one_kernel, form, dim, split_tokens):
    """To the bit, with every cut, of the kernel that also votes."""
    for page in (None, 16):
        options = {"len_q": 2, "dtype": torch.bfloat16, "dim": dim, "rows": 3000}
        call = decode_cases.draw(23, form, page, split_tokens=split_tokens, **options)
        given = moved(cuda, call)
        out, lse = decode_attention(**given, return_lse=True)
        counted, counted_lse, stats = decode_attention(**given, return_lse=True, return_stats=True)
        assert counted.equal(out)
        assert counted_lse.equal(lse)
        assert stats.skipped.eq(0).all()
        assert stats.visited.cpu().equal(expected(call).visited)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [None, 1, 64])
def test_cuts_of_the_gpu(cuda, page, dim):
    """Where the parts of the workers are long, a threshold this small leaves fp16 as it is."""
    torch.manual_seed(0)
    lengths = torch.tensor([60000, 0, 17000, 64, 33333], dtype=torch.int32, device=cuda)
    shape = (5, 60000, 2, dim) if page is None else (5 * 60032 // page, page, 2, dim)
    k, v = (torch.randn(shape, dtype=torch.float16, device=cuda) for _ in "kv")
    q = 6 * torch.randn(5, 1, 8, dim, dtype=torch.float16, device=cuda)
    options = {}
    if page is not None:
        pages = torch.randperm(len(k), device=cuda).to(torch.int32)
        options["page_table"] = pages.view(5, -1)
    wanted = decode_attention(q, k, v, lengths, **options)
    for _ in range(3):
        out, stats = decode_attention(
            q, k, v, lengths, **options, skip_threshold=1e-7, return_stats=True
        )
        torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
        assert stats.visited.tolist() == [[-(-n // 64)] * 2 for n in lengths.tolist()]


def test_values_of_skipped_tiles_do_not_count(cuda):
    options = {"heads": (2, 1), "batch": 1, "dtype": torch.float16, "dim": 128}
    call = decode_cases.draw(22, "all", rows=512, lengths=[512], split_tokens=512, **options)
    call["k_cache"][:, :64] = 9 * call["q"][:, :, :1].sign()
    call["k_cache"][:, 64:] *= 0.01
    call["q"][:, :, 1] = call["q"][:, :, 0]
    first = run(cuda, call, seq_lens=decode_cases.int32([64]))
    call["v_cache"][:, 64:] = torch.nan
    out, lse, visited, skipped = run(cuda, call, skip_threshold=0.01)
    assert (visited.item(), skipped.item()) == (8, 7)
    assert out.equal(first[0])
    assert lse.equal(first[1])


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [None, 16])
def test_votes_are_over_capped_scores(cuda, page, dim):
    """Tiles far below the largest score are kept if a narrow cap brings them near it."""
    call = decode_cases.loud_tiles(page, dim=dim, dtype=torch.float16)
    counts = [check(cuda, {**call, "softcap": cap}).sum().item() for cap in (0.0, 0.5, 5.0)]
    assert counts == [48, 0, 48]  # six tiles of ten, of four requests' two heads


def test_trees_and_sinks(cuda):
    generator = torch.Generator().manual_seed(3)
    options = {"len_q": 40, "rows": 700, "dtype": torch.float16, "dim": 64, "scale": 0.6}
    call = decode_cases.draw(8, "all", 16, lengths=[700, 650, 699, 640], **options)
    call["tree_mask"] = decode_cases.bits_of_trees(generator, 4, 40)
    decode_cases.fill(call, generator)
    call |= {"skip_threshold": 0.5, "split_tokens": 512}
    check(cuda, call)
    check(cuda, {**call, "sink": torch.tensor([0.5, -2.0, -torch.inf, 30.0])})


def test_thresholds_change_between_replays(cuda):
    options = {"rows": 6000, "dtype": torch.float16, "dim": 128, "scale": 0.4}
    options |= {"split_tokens": 2048}
    given = moved(cuda, decode_cases.draw(9, "all", 16, lengths=[6000, 10, 5000, 0], **options))
    for name in ("k_cache", "v_cache"):
        given[name].nan_to_num_(0.5)
    given["skip_threshold"] = torch.zeros(4, device=cuda)
    decode_attention(**given, return_stats=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, stats = decode_attention(**given, return_lse=True, return_stats=True)
    counts = []
    for thresholds in ([0.0] * 4, [0.5] * 4, [0.01, torch.nan, 2.0, -1.0], [0.9] * 4):
        given["skip_threshold"].copy_(torch.tensor(thresholds))
        for _ in range(100):
            graph.replay()
        wanted = decode_attention(**given, return_lse=True, return_stats=True)
        assert out.equal(wanted[0])
        assert lse.equal(wanted[1])
        assert stats.visited.equal(wanted[2].visited)
        assert stats.skipped.equal(wanted[2].skipped)
        counts.append(stats.skipped.sum().item())
    assert counts[0] == 0
    assert counts[3] > counts[1] > 0
