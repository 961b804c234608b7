"""block_sparse_attention on the GPU as a part of PyTorch: graphs, streams, tracing, devices."""

import contextlib
import shutil

import other_archs
import pytest
import torch
from block_lists import BLOCKS, Case, attend, checker, same

import sparse_fmha

pytestmark = pytest.mark.gpu

SHARED = {"batch": 2, "heads": 8, "heads_kv": 2, "dim": 128}
CASES = [
    Case(1500, 1500, (64, 32), 0.2, **SHARED),
    Case(777, 1300, (128, 128), 0.3, 0.3, True, **SHARED),
    Case(1300, 777, (64, 64), 0.3, 0.3, shared_heads=True, **SHARED),
]


@pytest.fixture(scope="session")
def check(make_qkv, agrees):
    return checker(make_qkv, agrees)


def op(*arguments):
    return torch.ops.sparse_fmha.block_sparse_fwd(*arguments)


def run(mask, given):
    return sparse_fmha.block_sparse_attention(*given, mask, return_lse=True)


def top_blocks(q, k, blocks, keep):
    """Indices of the `keep` key blocks with the largest pooled scores, for each query block: int32
    [B, Hq, nQ, keep]; in no order. Lengths are multiples of the blocks."""
    q, k = (
        x.unflatten(1, (-1, block)).mean(2, dtype=torch.float32).transpose(1, 2)
        for x, block in zip((q, k), blocks, strict=True)
    )
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return scores.topk(keep, sorted=False).indices.int()


def select(q, k, v, blocks, keep, causal):
    """From scores to attention, all on the device: (out, lse) and the indices."""
    top = top_blocks(q, k, blocks, keep)
    mask = sparse_fmha.BlockMask.from_indices(
        None, top, q.shape[1], k.shape[1], *blocks, causal=causal
    )
    return *run(mask, (q, k, v)), top


def visible_of(top, len_q, len_kv, blocks, causal):
    """Bool [B, Hq, len_q, len_kv]."""
    listed = torch.zeros(*top.shape[:3], len_kv // blocks[1], dtype=torch.bool, device=top.device)
    listed = listed.scatter_(-1, top.long(), True)
    listed = listed.repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)
    i, j = (torch.arange(n, device=top.device) for n in (len_q, len_kv))
    return listed & (j <= i[:, None] + len_kv - len_q) if causal else listed


@contextlib.contextmanager
def no_synchronisation():
    """The host may not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_from_scores_to_attention_in_a_cuda_graph(make_qkv, agrees, blocks, causal):
    """Captured once, then replayed with other q, k and v, so with other lists."""
    sizes = 2, 768, 1024, 8, 2, 128
    static = make_qkv(*sizes)
    keep = 1024 // blocks[1] // 4
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        select(*static, blocks, keep, causal)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, top = select(*static, blocks, keep, causal)
    before = None
    for seed in (5, 6, 7):
        for tensor, new in zip(static, make_qkv(*sizes, seed=seed), strict=True):
            tensor.copy_(new)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        assert same((out, lse), select(*static, blocks, keep, causal)[:2])
        agrees(out, lse, *static, visible=visible_of(top, 768, 1024, blocks, causal))
        chosen = top.sort(-1).values
        assert before is None or not chosen.equal(before)
        before = chosen


@pytest.mark.parametrize("blocks", [(64, 16), (128, 128)], ids=str)
def test_no_synchronisation(make_qkv, blocks):
    """Neither on the way from scores to attention nor with the other masks of device tensors."""
    q, k, v = make_qkv(2, 768, 1024, 8, 2, 128)
    sizes = 768, 1024, *blocks
    chosen = torch.rand(2, 8, 768 // blocks[0], 1024 // blocks[1], device=q.device) < 0.3
    forced = torch.zeros_like(chosen)
    forced[..., 0] = True
    masks = sparse_fmha.BlockMask

    def everything():
        select(q, k, v, blocks, 4, True)
        mask = masks.from_blocks(chosen, *sizes) | masks.from_blocks(forced, *sizes)
        return run(mask, (q, k, v))

    everything()
    torch.cuda.synchronize()
    with no_synchronisation():
        results = everything()
    assert same(results, run(masks.from_blocks(chosen | forced, *sizes), (q, k, v)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_graph_of_the_op(make_qkv, case):
    """Replayed with other lists in the same memory."""
    given = make_qkv(*case.sizes())
    device, width = given[0].device, case.grid[-1]  # as wide as any list can be
    wide = _wide(case.lists(), width)
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in wide]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*given, *arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = op(*given, *arguments)
    for seed in (5, 6, 7):
        other = case.lists(seed=seed)
        for static, new in zip(arguments, _wide(other, width), strict=True):
            if isinstance(static, torch.Tensor):
                static.copy_(new)
        for static, new in zip(given, make_qkv(*case.sizes(), seed=seed), strict=True):
            static.copy_(new)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        assert same(results, run(other.mask(device), given))


def _wide(lists, width):
    """The op's arguments, with lists of this width."""
    counts, indices, partial_counts, partial_indices, bits, *rest = lists.arguments("cpu")

    def pad(x, axes_behind=0):
        if x is None:
            return None
        missing = width - x.shape[3]
        return torch.nn.functional.pad(x, (*[0] * (2 * axes_behind), 0, missing))

    return counts, pad(indices), partial_counts, pad(partial_indices), pad(bits, 2), *rest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_on_the_current_stream(make_qkv, case):
    """The inputs and the lists arrive late, on a side stream that nothing else waits for."""
    given = make_qkv(*case.sizes())
    lists = case.lists()
    tensors = [x for x in lists.tensors(given[0].device) if x is not None]
    expected = run(lists.mask(given[0].device), given)
    late = [torch.full_like(x, torch.nan) for x in given]
    late_lists = [torch.zeros_like(x) for x in tensors]
    places = iter(late_lists)
    arguments = [next(places) if isinstance(x, torch.Tensor) else x for x in lists.arguments("cpu")]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late + late_lists, [*given, *tensors], strict=True):
            x.copy_(y)
        results = op(*late, *arguments)
        assert not side.query(), "the call waited for the stream"
    side.synchronize()
    assert same(results, expected)


def test_streams_at_once(make_qkv):
    """Calls under way together do not share their scratch memory."""
    streams = [torch.cuda.Stream() for _ in CASES]
    given = [make_qkv(*case.sizes()) for case in CASES]
    masks = [case.lists().mask(given[0][0].device) for case in CASES]
    expected = [run(*pair) for pair in zip(masks, given, strict=True)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, *pair in zip(streams, masks, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*pair))
        torch.cuda.synchronize()
        assert all(map(same, results, expected))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_compile(make_qkv, case, backend):
    if backend == "inductor" and shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for inductor")

    def block(q, k, v, *arguments):
        out, lse = op(q, k, v, *arguments)
        return out + 1, lse * 2

    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for length in (case.len_q, case.len_q + 1, 500):
        other = case.with_(len_q=length)
        given = make_qkv(*other.sizes())
        arguments = other.lists().arguments(given[0].device)
        results = compiled(*given, *arguments)
        for result, expected in zip(results, block(*given, *arguments), strict=True):
            torch.testing.assert_close(result, expected)


def test_compile_with_a_mask(make_qkv):
    """The public function, of a mask that is there and of one that is made on the way."""

    def there(q, k, v):
        return run(mask, (q, k, v))[0] + 1

    def on_the_way(q, k, v):
        return select(q, k, v, (128, 64), 4, True)[0] + 1

    case = Case(768, 1024, (128, 64), 0.3, 0.2, **SHARED)
    given = make_qkv(*case.sizes())
    mask = case.lists().mask(given[0].device)
    for function in (there, on_the_way):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), function(*given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("partial", [0, 0.3])
def test_opcheck(make_qkv, partial, dtype):
    for causal, scale in ((False, None), (True, -0.25)):
        case = Case(200, 300, (64, 32), 0.4, partial, causal, 2, scale=scale, dtype=dtype)
        given = make_qkv(*case.sizes())
        torch.library.opcheck(
            torch.ops.sparse_fmha.block_sparse_fwd,
            (*given, *case.lists().arguments(given[0].device)),
        )


def test_autocast(make_qkv):
    case = CASES[1].with_(dtype=torch.float32)
    given = make_qkv(*case.sizes())
    mask = case.lists().mask(given[0].device)
    with torch.autocast("cuda", dtype=torch.float16):
        results = run(mask, given)
    assert results[0].dtype == torch.float16
    assert results[1].dtype == torch.float32
    assert same(results, run(mask, [x.half() for x in given]))


def test_mask_of_a_device_tensor_is_the_one_of_the_cpu(make_qkv, check):
    """from_dense and back, with bits made on the device."""
    case = Case(333, 420, (64, 32), 0.3, 0.3, batch=2)
    lists = case.lists()
    given = make_qkv(*case.sizes())
    visible = lists.visible()
    mask = sparse_fmha.BlockMask.from_dense(visible.to(given[0].device), 64, 32)
    assert mask.to_dense().cpu().equal(visible)
    assert mask.to("cpu").to_dense().equal(visible)
    check(lists, given, lambda lists, q, k, v: run(mask, (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_have_no_kernel(make_qkv, dtype):
    case = Case(64, 64, dtype=dtype)
    q, k, v = make_qkv(*case.sizes())
    with pytest.raises(
        TypeError, match=f"q must have dtype .*float16 or .*bfloat16 on cuda, got {dtype}"
    ):
        run(case.lists().mask(q.device), (q, k, v))
    with pytest.raises(RuntimeError, match=f"no kernel for arch={other_archs.in_use()}"):
        op(q, k, v, *case.lists().arguments(q.device))


def test_mixed_devices(make_qkv):
    case = Case(200, 300, partial=0.3)
    lists, given = case.lists(), make_qkv(*case.sizes())
    with pytest.raises(ValueError, match=r"must be on .* device"):
        run(lists.mask("cpu"), given)
    for place in range(5):
        arguments = list(lists.arguments(given[0].device))
        arguments[place] = arguments[place].cpu()
        with pytest.raises(RuntimeError, match="device"):
            op(*given, *arguments)


def test_second_device(make_qkv):
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    lists = CASES[1].lists()
    given = make_qkv(*CASES[1].sizes())
    there = [x.to("cuda:1") for x in given]
    results = run(lists.mask("cuda:1"), there)
    assert torch.cuda.current_device() == 0
    assert results[0].device == there[0].device
    assert same([x.cpu() for x in results], [x.cpu() for x in attend(lists, *given)])
