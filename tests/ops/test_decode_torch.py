"""Decode attention as a part of PyTorch: tracing, derivatives, threads, memory."""

import mmap

import decode_cases
import pytest
import torch
from derivative_ways import WAYS, lacking
from torch.autograd import forward_ad

from sparse_fmha import decode_attention

OPS = torch.ops.sparse_fmha
FORMS = pytest.mark.parametrize("form", decode_cases.FORMS)


def op_arguments(call):
    """The arguments of the raw op by their names."""
    call = dict(call)
    indices, counts, block = call.pop("blocks", (None, None, 64))
    tokens, token_counts = call.pop("tokens", (None, None))
    return call | {
        "block_indices": indices,
        "block_counts": counts,
        "block": block,
        "token_indices": tokens,
        "token_counts": token_counts,
    }


@pytest.mark.parametrize("form", ["blocks", "tokens"])
def test_opcheck(form):
    call = op_arguments(decode_cases.draw(30, form, page=8, len_q=2, rows=40, window=30))
    torch.library.opcheck(OPS.decode, (), call)
    call |= {"skip_threshold": torch.full((4,), 0.1), "sink": torch.tensor([0.5, 0.1, 0.2, 0.3])}
    call["softcap"] = 2.0
    torch.library.opcheck(OPS.decode, (), call)
    torch.library.opcheck(OPS.decode_out, (), call | {"out": torch.empty_like(call["q"])})


def test_the_function_is_the_op():
    call = decode_cases.draw(31, "blocks", page=8, len_q=2)
    out, lse, tiles = OPS.decode(**op_arguments(call))
    given = decode_attention(**call, return_lse=True)
    assert given[0].equal(out)
    assert given[1].equal(lse)
    assert tiles.shape == (4, 2, 0)


@pytest.mark.parametrize("form", ["blocks", "spans"])
def test_compiled(form):
    torch._dynamo.reset()
    call = decode_cases.draw(32, form, page=8, len_q=2)
    threshold = torch.full((4,), 0.2)
    call["softcap"] = 1.5

    def both(out, **call):
        out, lse = decode_attention(**call, out=out * 0, return_lse=True)
        again, stats = decode_attention(**call, skip_threshold=threshold, return_stats=True)
        return out + 1, lse, again, stats

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for lengths in (call["seq_lens"], call["seq_lens"].flip(0)):
        decode_cases.fill({**call, "seq_lens": lengths}, torch.Generator().manual_seed(1))
        changed = {**call, "seq_lens": lengths}
        wanted = both(torch.empty_like(call["q"]).fill_(1), **changed)
        got = compiled(torch.empty_like(call["q"]).fill_(1), **changed)
        for a, b in zip((*got[:3], *got[3]), (*wanted[:3], *wanted[3]), strict=True):
            assert a.equal(b)


def test_one_graph_serves_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    into_out = torch.compile(
        lambda out, **call: decode_attention(**call, out=out) * 1,
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for i in range(2):
        sizes = {"page": 9 + i, "len_q": 3 + i, "rows": 60 + 20 * i, "batch": 13 + 2 * i}
        call = decode_cases.draw(i, "all", **sizes)
        call |= {"window": 20 + i, "split_tokens": 64 * (i + 1), "scale": 0.1 + i}
        wanted = decode_attention(**call)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert compiled(**call).equal(wanted)
            assert into_out(torch.empty_like(wanted), **call).equal(wanted)


def test_out():
    call = decode_cases.draw(33, "all", page=16, len_q=2, heads=(4, 2), dim=8)
    wanted = decode_attention(**call)
    wide = torch.full((4, 3, 6, 24), torch.nan)
    out = wide[:, :2, 1:5, 8:16]
    assert decode_attention(**call, out=out) is out
    assert out.equal(wanted)
    assert wide.isnan().sum() == wide.numel() - out.numel()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_for_a_derivative_raises(way):
    call = decode_cases.draw(34, "all", bad=False)
    q = call.pop("q")
    with pytest.raises(NotImplementedError, match=lacking(way, "decode")):
        WAYS[way](lambda x: decode_attention(x, **call), q)


def test_derivatives_raise():
    call = decode_cases.draw(34, "all", bad=False)
    q = call.pop("q").requires_grad_()
    out, lse = decode_attention(q, **call, return_lse=True)
    for result in (out, lse):
        with pytest.raises(NotImplementedError, match="sparse_fmha::decode has no backward pass"):
            result.sum().backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match="sparse_fmha::decode_out has no derivatives"):
        decode_attention(q, **call, out=torch.empty_like(q))
    with torch.no_grad():
        assert decode_attention(q, **call, out=torch.empty_like(q)).equal(out)
    plain = q.detach()
    for options in ({}, {"out": torch.empty_like(plain)}):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="decode"):
            decode_attention(forward_ad.make_dual(plain, plain), **call, **options)


@FORMS
def test_results_do_not_depend_on_threads(form):
    call = decode_cases.draw(35, form, page=16, rows=1500, len_q=3, split_tokens=128)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(decode_attention(**call, return_lse=True))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert out.equal(results[0][0])
        assert lse.equal(results[0][1])


@FORMS
@pytest.mark.parametrize("split_tokens", [None, 256])
def test_results_do_not_depend_on_other_requests(form, split_tokens):
    call = decode_cases.draw(36, form, page=16, rows=1500, split_tokens=split_tokens)
    together = decode_attention(**call)

    def alone(value, b):
        if isinstance(value, tuple):
            return tuple(alone(x, b) for x in value)
        if not isinstance(value, torch.Tensor) or value is call["k_cache"]:
            return value
        return value if value is call["v_cache"] else value[b : b + 1]

    for b in range(4):
        one = decode_attention(**{name: alone(value, b) for name, value in call.items()})
        assert one.equal(together[b : b + 1])


def test_autocast_casts_nothing():
    call = decode_cases.draw(37, "all")
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_attention(**call)
    assert out.dtype == torch.float32
    assert out.equal(decode_attention(**call))


@pytest.mark.parametrize("paged", [False, True])
def test_strides_beyond_32_bits(paged):
    stride = 2**32 + 8  # in elements; nothing is touched between the rows
    try:
        memory = mmap.mmap(-1, 5 * 2 * stride, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except (OSError, ValueError):
        pytest.skip("no address space of 40 GB")
    far = torch.frombuffer(memory, dtype=torch.float16)
    call = decode_cases.draw(38, "all", 16 if paged else None, dtype=torch.float16, rows=32,
                             batch=2, dim=8, bad=False)  # fmt: skip
    wanted = decode_attention(**call)
    changed = {}
    for i, name in enumerate(("k_cache", "v_cache")):
        cache = call[name][:5]
        sizes, (_, *strides) = cache.shape, cache.stride()
        view = far.as_strided(sizes, (stride, *strides), i * 100_000)
        changed[name] = view.copy_(cache)
    if paged:
        entries = call["page_table"].clamp(max=4)
        changed["page_table"] = entries
        wanted = decode_attention(**{**call, "page_table": entries})
        finite = wanted.isfinite()
        assert finite.any()
        got = decode_attention(**{**call, **changed})
        assert got[finite].equal(wanted[finite])
    else:
        assert decode_attention(**{**call, **changed}).equal(wanted)


def test_layouts_of_small_tensors():
    call = decode_cases.draw(39, "tokens", page=8, len_q=2, by_head=True)
    wanted = decode_attention(**call)
    transposed = {
        name: call[name].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("seq_lens", "page_table")
    }
    indices, counts = call["tokens"]
    every_other = torch.stack((indices, indices), -1)[..., 0]
    assert decode_attention(**{**call, **transposed, "tokens": (every_other, counts)}).equal(wanted)
