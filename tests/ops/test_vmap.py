"""torch.vmap over the ops is the op for each entry, run once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import CALLS, floats, run

import sparse_fmha
from sparse_fmha import BlockMask

SIZE = 3


@pytest.fixture(autouse=True)
def no_fallback():
    """torch itself would run the op for one entry after the other, with a warning."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def tensors(name):
    return [key for key, value in CALLS[name].items() if isinstance(value, torch.Tensor)]


def varied(name, argument):
    """SIZE tensors that could stand for an argument; lists stay within what they may list."""
    value = CALLS[name][argument]
    if value.is_floating_point():
        return torch.stack([value * (1 - 0.3 * i) for i in range(SIZE)])
    return torch.stack([value.roll(i, min(2, value.dim() - 1)) for i in range(SIZE)])


def loop(name, mapped):
    entries = [run(name, **{a: x[i] for a, x in mapped.items()}) for i in range(SIZE)]
    return [torch.stack(parts) for parts in zip(*entries, strict=True)]


def assert_close(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_arguments_over_any_dimension(name, data):
    chosen = data.draw(st.sets(st.sampled_from(tensors(name)), min_size=1))
    mapped = {argument: varied(name, argument) for argument in sorted(chosen)}
    # The last dimension has to have the stride 1.
    dims = {a: data.draw(st.integers(0, x.dim() - 2), label=a) for a, x in mapped.items()}
    moved = [x.movedim(0, dims[a]) for a, x in mapped.items()]

    def op(*xs):
        return run(name, **dict(zip(mapped, xs, strict=True)))

    assert_close(torch.vmap(op, tuple(dims.values()))(*moved), loop(name, mapped))


@pytest.mark.parametrize("name", CALLS)
def test_lists_of_one_batch_entry_serve_all(name):
    """Of q or of the mask, one is mapped and the other has more batch entries."""
    lists = [a for a in tensors(name) if a not in floats(name)]
    for chosen in filter(None, (lists, floats(name))):
        mapped = {argument: varied(name, argument) for argument in chosen}
        results = torch.vmap(lambda *xs, of=chosen: run(name, **dict(zip(of, xs, strict=True))))(
            *mapped.values()
        )
        assert_close(results, loop(name, mapped))


@pytest.mark.parametrize("name", [name for name in CALLS if len(tensors(name)) > 1])
def test_nested(name):
    first, *_, last = tensors(name)
    x, y = varied(name, first), varied(name, last)
    inner = torch.vmap(lambda x, y: run(name, **{first: x, last: y}), (None, 0))
    results = torch.vmap(inner, (0, None), out_dims=1)(x, y)
    expected = [loop(name, {first: x[i].expand(SIZE, *x[i].shape), last: y}) for i in range(SIZE)]
    assert_close(results, [torch.stack(parts, 1) for parts in zip(*expected, strict=True)])


def test_functions(randn):
    """A mask is one of mapped lists."""
    q, k, v = (randn(SIZE, 2, 100, 2, 16, seed=i) for i in range(3))
    whole = BlockMask.from_blocks(randn(SIZE, 2, 2, 4, seed=3) > 0, 100, 100, 64, 32)
    lists = whole.counts[:, None], whole.indices[:, None]

    def attend(q, k, v, counts, indices):
        mask = BlockMask(counts, indices, 100, 100, 64, 32)
        parts = [
            sparse_fmha.attention(q, k, v, causal=True, return_lse=True),
            sparse_fmha.neighborhood_attention(q, k, v, 9, return_lse=True),
            sparse_fmha.block_sparse_attention(q, k, v, mask, return_lse=True),
        ]
        return sparse_fmha.merge(*zip(*parts, strict=True))

    expected = [attend(*entry) for entry in zip(q, k, v, *lists, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*expected, strict=True)]
    assert_close(torch.vmap(attend)(q, k, v, *lists), expected)
    torch.compiler.reset()
    compiled = torch.compile(torch.vmap(attend), backend="aot_eager", fullgraph=True)
    assert_close(compiled(q, k, v, *lists), expected)


def test_autocast(randn):
    q, k, v = (randn(SIZE, 2, 33, 2, 16, seed=i) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.vmap(sparse_fmha.attention)(q, k, v)
        expected = torch.stack([sparse_fmha.attention(*x) for x in zip(q, k, v, strict=True)])
    assert out.dtype == torch.bfloat16
    assert out.equal(expected)


def test_an_error_is_that_of_the_op(randn):
    """What is mapped is not broadcast where the op does not."""
    q, k = randn(SIZE, 2, 33, 2, 16), randn(SIZE, 1, 33, 2, 16)
    with pytest.raises(RuntimeError, match="k must have q's batch"):
        torch.vmap(torch.ops.sparse_fmha.fmha_fwd)(q, k, k)
