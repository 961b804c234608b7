"""What explain() says: the kernel that a call takes, and the cost model beside measured times."""

import json
from pathlib import Path

import pytest
import torch

import kernel_list
import sparse_fmha
from sparse_fmha import BlockMask, explain
from sparse_fmha.cost import block_model, explanation, model

_C = pytest.importorskip("sparse_fmha._C")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def tokens(*shape, dtype=torch.bfloat16, device="meta"):
    return torch.empty(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_that_runs(causal):
    q = tokens(1, 70, 4, 40, dtype=torch.float32, device="cpu")
    found = explain(sparse_fmha.attention, q, q, q, causal=causal)
    mechanism = "causal" if causal else "dense"
    assert (found.mechanism, found.arch) == (mechanism, "cpu")
    assert found.kernel == _C.find_kernel("cpu", mechanism, "float32", 40)["name"]
    assert found.rejected[f"cpu_{mechanism}_float16"] == "is for float16, q is float32"
    assert found.predicted_ms is None
    assert found.speedup is None
    assert found.kernel in str(found)


def test_a_hopper_row_or_why_there_is_none():
    q = tokens(1, 4096, 4, 72)
    found = explain(sparse_fmha.attention, q, q, q, arch="sm90")
    rows = [r for r in sparse_fmha.kernels() if r["arch"] == "sm90"]
    if rows:
        assert found.kernel == "sm90_dense_bfloat16_d96"
        assert found.rejected["sm90_dense_bfloat16_d64"] == "takes head dims up to 64, q has 72"
        assert "a smaller row fits" in found.rejected["sm90_dense_bfloat16_d128"]
    else:
        assert found.kernel is None
        assert found.why == "this build has no dense kernel for sm90: the call raises"
    assert found.predicted_ms == found.dense_ms > 0


def all_rows():
    keys = ("name", "head_dim", "value_dim", "dtype", "tile_q", "skips", "key_bias", "dilated")
    return [
        {key: getattr(row, key) for key in keys}
        | {"arch": row.arch.name, "pass": row.direction, "mechanism": row.mechanism_name}
        for row in kernel_list.read_all()
    ]


@pytest.mark.parametrize(("length", "causal", "tile"), [(256, False, 64), (1024, True, 128)])
def test_of_rows_that_differ_in_their_query_tile_the_fastest(monkeypatch, length, causal, tile):
    """The rows of the list, whatever this build has."""
    mechanism = "causal" if causal else "dense"
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    q = tokens(1, length, 16, 128)
    found = explain(sparse_fmha.attention, q, q, q, causal=causal, arch="sm90")
    name = f"sm90_{mechanism}_bfloat16_d128"
    assert found.kernel == f"{name}_q{tile}"
    assert f"tiles of {tile} queries: " in found.why
    assert " waves, " in found.why
    assert found.rejected[name].startswith("tiles of 192 queries: ")
    times = {each.tile_q: each.us for each in model.tile_times(1, 16, length, length, 128, causal)}
    assert min(times, key=times.get) == tile
    assert found.predicted_ms == times[tile] / 1e3
    biased = explain(
        sparse_fmha.attention, q, q, q, causal=causal, arch="sm90",
        key_bias=torch.zeros(1, 1, length, device="meta"),
    )  # fmt: skip
    assert biased.kernel == f"{name}_bias"


def measured(group):
    """(case, milliseconds) of our kernels in the newest results file that has the group."""
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        cases = [c for c in json.loads(path.read_text())["cases"] if c["name"].startswith(group)]
        if cases:
            break
    for case in cases:
        runs = [r for r in case["runs"] if r["op"] == "sparse_fmha" and r["l2"] == "cold"]
        if runs and case["shape"]["dtype"] == "bfloat16":
            yield pytest.param(case["shape"], runs[0]["ms"]["median"], id=case["name"])


@pytest.mark.parametrize(("shape", "ms"), list(measured("fmha/")))
def test_the_model_of_dense_attention_is_near_what_was_measured(shape, ms):
    size = [shape[name] for name in ("batch", "heads_q", "length", "length", "head_dim", "causal")]
    # The model has one clock; under the power limit single cases run 15% slower than others.
    assert model.dense_us(*size) / 1e3 == pytest.approx(ms, rel=0.2)


@pytest.mark.parametrize(("shape", "ms"), list(measured("bs/")))
def test_the_model_of_block_lists_is_near_what_was_measured(shape, ms):
    """On another draw than the measured one; which blocks they are does not matter to the model,
    which counts what neighbors share as fetched by each: lists that are similar are faster."""
    lists, length = shape["lists"], shape["length"]
    sizes = lists["block_q"], lists["block_kv"]
    grid = [length // size for size in sizes]
    generator = torch.Generator().manual_seed(1)
    if lists["kind"] == "heavy":  # a tenth of the rows hold half of the blocks
        count = torch.full((grid[0],), round(grid[1] * lists["density"] * 0.5 / 0.9))
        count[: grid[0] // 10] = round(grid[1] * lists["density"] * 0.5 / 0.1)
        blocks = torch.rand(1, 1, *grid, generator=generator).argsort(-1) < count[:, None]
    else:
        blocks = torch.rand(1, 1, *grid, generator=generator) < lists["density"]
    mask = BlockMask.from_blocks(blocks, length, length, *sizes)
    if lists["kind"] == "partial":
        counts, indices = mask.counts, mask.indices
        bits = torch.zeros(*indices.shape, sizes[0], sizes[1] // 8, dtype=torch.uint8)
        mask = BlockMask(
            *(torch.zeros_like(counts), indices[..., :0].contiguous(), length, length, *sizes),
            partial_counts=counts,
            partial_indices=indices,
            partial_bits=bits,
        )
    tiles = block_model.query_tiles(mask, 1, shape["heads_q"], shape["head_dim"])
    near = 0.15 if lists["kind"] == "similar" else 0.1
    assert model.makespan(tiles) / 1e3 == pytest.approx(ms, rel=near)


def test_neighborhoods_are_what_the_simulator_says():
    q = tokens(2, 64, 96, 8, 128)
    found = explain(
        sparse_fmha.neighborhood_attention, q, q, q, (16, 24), stride=(8, 1), arch="sm90"
    )
    simulated = sparse_fmha.simulate(
        (64, 96), (16, 24), stride=(8, 1), heads=8, batch=2, head_dim=128
    )
    assert found.predicted_ms == simulated.predicted_ms
    assert str(simulated.tile_q) in str(found)


def test_a_causal_window_beyond_the_start():
    q = tokens(1, 4096, 4, 128)
    found, fitting = (
        explain(sparse_fmha.neighborhood_attention, q, q, q, w, causal=True, arch="sm90")
        for w in (5000, 4096)
    )
    assert found == fitting


def drawn(block_q, block_kv, density, causal=False, length=1000, heads=3):
    torch.manual_seed(block_q + block_kv)
    shape = (1, heads, -(-length // block_q), -(-length // block_kv))
    return BlockMask.from_blocks(
        torch.rand(shape) < density, length, length, block_q, block_kv, causal=causal
    )


@pytest.mark.parametrize("tile_k", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_kv", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
def test_stages_are_those_of_the_kernel(block_q, block_kv, causal, tile_k):
    mask = drawn(block_q, block_kv, 0.4, causal)
    stages = block_model.count_stages(mask, tile_k)
    none = torch.zeros(1, dtype=torch.int32).numpy()
    for head in range(3):
        for tile in range(8):
            lists = _C.QueryTileLists(
                mask.q_len, mask.kv_len, block_q, block_kv, causal, tile_k, tile,
                mask.counts[0, head].contiguous().numpy(),
                mask.indices[0, head].contiguous().numpy(),
                mask.indices.shape[-1], none, none, none, 0,
            )  # fmt: skip
            both, *own = lists.stages
            assert stages.both[0, head, tile] == both
            assert stages.own[0, head, tile] == sum(own)
            masked = [
                lists.seen(stream, stage, int(stream == 2))[0]
                for stream, count in enumerate((both, *own))
                for stage in range(count)
            ]
            # The model takes cut blocks to be packed together, and both parts of one that is split
            # to be cut; the kernel meets them as listed, with boxes that are not there at the end.
            few = 3 * max(1, 128 // block_kv) + 3
            assert abs(stages.masked[0, head, tile] - sum(masked)) <= few


def test_break_even():
    length = 16384
    q = tokens(1, length, 8, 128)
    few, many = (drawn(128, 128, d, length=length, heads=8) for d in (0.1, 1.0))
    found = explain(sparse_fmha.block_sparse_attention, q, q, q, few, arch="sm90")
    whole = explain(sparse_fmha.block_sparse_attention, q, q, q, many, arch="sm90")
    assert found.density == pytest.approx(few.block_density)
    assert found.speedup > 4
    assert whole.speedup < 1
    assert 0.6 < found.break_even_density < 1
    assert found.break_even_density == pytest.approx(whole.break_even_density)
    assert f"as long as dense attention at {found.break_even_density:.1%}" in str(found)
    assert found.reachable_density == found.density
    causal = drawn(128, 128, 0.1, True, length=length, heads=8)
    found = explain(sparse_fmha.block_sparse_attention, q, q, q, causal, arch="sm90")
    assert found.reachable_density == pytest.approx(causal.reachable_block_density)
    leaves = f" ({found.reachable_density:.1%} of those that causality leaves); "
    assert f"{found.density:.1%} of blocks are listed{leaves}" in str(found)
    on_cpu = explain(sparse_fmha.block_sparse_attention, q, q, q, few, arch="cpu")
    assert on_cpu.predicted_ms is None
    assert on_cpu.kernel == "cpu_block_sparse_bfloat16"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1024, 2048, 3072, 4096, 9216])
def test_break_even_is_where_full_lists_are_slower_than_dense(length, causal):
    """Dense attention has fewer and longer query tiles: at some lengths they fill the last round of
    the multiprocessors so badly that lists of all blocks are faster."""
    q = tokens(1, length, 8, 128)

    def at(density):
        mask = drawn(128, 128, density, causal, length=length, heads=8)
        return explain(sparse_fmha.block_sparse_attention, q, q, q, mask, arch="sm90")

    none, few, whole = at(0), at(0.1), at(1)
    assert none.break_even_density is None
    assert "of blocks are listed" not in str(none)
    for found in (few, whole):
        if whole.speedup > 1:
            assert found.break_even_density == float("inf")
            assert "faster than dense attention at any density" in str(found)
        else:
            assert 0 < found.break_even_density <= whole.density
            until = f"as long as dense attention at {found.break_even_density:.1%}"
            assert until in str(found)


def test_stripes_have_no_model():
    q = tokens(1, 100, 2, 64)
    lists = torch.zeros(1, 1, 2, 3, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)
    mask = sparse_fmha.StripeMask(*lists, 100, 100, 64)
    found = explain(sparse_fmha.stripe_attention, q, q, q, mask, arch="sm90")
    if sparse_fmha.build_info()["archs"]:
        assert found.kernel == "sm90_stripe_bfloat16_d64"
    else:
        assert found.why == "this build has no stripe kernel for sm90: the call raises"
    assert found.predicted_ms is None
    on_cpu = explain(sparse_fmha.stripe_attention, q, q, q, mask, arch="cpu")
    assert on_cpu.kernel == "cpu_stripe_bfloat16"


@pytest.mark.parametrize("given", [{"skip_threshold": 0.1}, {"return_stats": True}])
def test_calls_that_skip_take_rows_that_do(given):
    q = tokens(1, 100, 2, 128)
    found = explain(sparse_fmha.attention, q, q, q, causal=True, arch="cpu", **given)
    assert found.kernel == "cpu_causal_bfloat16_skip"
    found = explain(sparse_fmha.attention, q, q, q, causal=True, arch="sm90", **given)
    assert "what skipping key tiles saves is not in the time" in str(found)
    if sparse_fmha.build_info()["archs"]:
        assert found.kernel == "sm90_causal_bfloat16_d128_skip"
        assert "sm90_causal_bfloat16_d128" not in found.rejected


def test_errors():
    q = tokens(1, 64, 2, 64)
    with pytest.raises(ValueError, match="function must be attention, neighborhood_attention,"):
        explain(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    with pytest.raises(ValueError, match=r"arch must be cpu or sm90 or .* for q on meta, got None"):
        explain(sparse_fmha.attention, q, q, q)
    with pytest.raises(ValueError, match=r"arch must be .*, got sm100"):
        explain(sparse_fmha.attention, q, q, q, arch="sm100")
    wide = tokens(1, 64, 2, 64, dtype=torch.float32)  # torch's default
    with pytest.raises(TypeError, match=r"q must have dtype torch.float16 or torch.bfloat16 on me"):
        explain(sparse_fmha.attention, wide, wide, wide, arch="sm90")
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        explain(sparse_fmha.attention, [1], q, q)
    with pytest.raises(ValueError, match=r"head dim of v must be a multiple of 8 .*, got 36"):
        explain(sparse_fmha.attention, q, q, tokens(1, 64, 2, 36), arch="sm90")
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        explain(sparse_fmha.attention, q, q, arch="sm90")
    mask = drawn(128, 128, 0.5)
    with pytest.raises(ValueError, match="mask must be for the 64 tokens of q, got one for 1000"):
        explain(sparse_fmha.block_sparse_attention, q, q, q, mask, arch="sm90")


def fused_rows():
    wanted = ("sm90", "backward_fused")
    return [row for row in sparse_fmha.kernels() if (row["arch"], row["pass"]) == wanted]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.skipif(not fused_rows(), reason="this build has no kernels of Hopper")
def test_the_kernel_of_all_gradients_is_named(dim):
    q = torch.randn(1, 40, 4, dim, dtype=torch.bfloat16).requires_grad_()
    found = explain(sparse_fmha.attention, q, q, q, arch="sm90")
    if dim == 256:
        assert found.fused_kernel is None
        assert "results repeat bitwise" in str(found)
    else:
        assert found.fused_kernel == f"sm90_backward_fused_dense_bfloat16_d{dim}"
        assert f"all gradients by {found.fused_kernel}" in str(found)


def test_the_kernel_of_all_gradients_of_other_gpus(monkeypatch):
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    for dim, expected in ((40, 64), (72, 96), (128, 128), (136, 256)):
        q = torch.empty(1, 40, 4, dim, requires_grad=True, dtype=torch.float16, device="meta")
        for causal, mechanism in ((False, "dense"), (True, "causal")):
            for arch in ("sm80", "sm86"):
                found = explain(sparse_fmha.attention, q, q, q, causal=causal, arch=arch)
                name = f"{arch}_backward_fused_{mechanism}_float16_d{expected}"
                assert found.fused_kernel == name
    of_window = explain(sparse_fmha.neighborhood_attention, q, q, q, 21, arch="sm86")
    assert of_window.fused_kernel is None


@pytest.mark.parametrize(
    ("grid", "dilation", "launches"),
    [
        ((704, 704), (11, 11), 121),
        ((704, 704), (8, 7), 1),
        ((704, 704), (16, 1), 2),
        ((600,), (3,), 3),
        ((600,), (2,), 1),
        ((9, 99, 99), (1, 11, 1), 11),
    ],
)
def test_launches_of_dilations(monkeypatch, grid, dilation, launches):
    """One where there is a row for it; the gradients, and calls with biases, take more."""
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    q = torch.empty(1, *grid, 2, 128, dtype=torch.bfloat16, device="meta")
    call = (sparse_fmha.neighborhood_attention, q, q, q, 2)
    found = explain(*call, dilation=dilation, arch="sm90")
    plain, dilated = (f"sm90_neighborhood_bfloat16_d128{end}" for end in ("", "_dilated"))
    note = f" {launches} launches of each kernel, by the dilation"
    if launches == 1:
        assert (found.kernel, found.rejected[dilated]) == (plain, "is for larger dilations")
    else:
        assert (found.kernel, found.rejected[plain]) == (dilated, "is for smaller dilations")
    assert ("its gradients take" + note in found.notes) == (launches > 1)
    assert found.dq_kernel == "sm90_backward_dq_neighborhood_bfloat16_d128"
    assert found.dkv_kernel == "sm90_backward_dkv_neighborhood_bfloat16_d128"
    for options, end in (({"softcap": 30.0}, "_bias"), ({"skip_threshold": 0.1}, "_skip")):
        other = explain(*call, dilation=dilation, arch="sm90", **options)
        assert other.kernel == plain + end
        assert ("it takes" + note in other.notes) == (launches > 1)
    elsewhere = explain(*call, dilation=dilation, arch="sm80")
    assert elsewhere.kernel == "sm80_neighborhood_bfloat16_d128"
    assert not any("launches" in each for each in elsewhere.notes)


@pytest.mark.parametrize(
    ("grid", "options", "why"),
    [
        ((64, 64), {"window": 32}, None),
        ((64, 64), {"window": 22}, "a query sees fewer than 512 keys"),
        ((1024,), {"window": 500, "extra": 12}, None),
        (
            (64, 64),
            {"window": 32, "dilation": (2, 1), "extra": 1},
            "extra tokens have other query tiles than a dilated grid",
        ),
        ((64, 600), {"window": (1, 600), "dilation": (2, 1), "extra": 1}, None),
    ],
)
@pytest.mark.skipif(not fused_rows(), reason="this build has no kernels of Hopper")
def test_why_the_gradients_of_neighborhoods_take_two_kernels(grid, options, why):
    q = torch.randn(1, *grid, 2, 64, dtype=torch.bfloat16).requires_grad_()
    extra = options.pop("extra", 0)
    if extra:
        options["extra_k"] = options["extra_v"] = q.new_zeros(1, extra, 2, 64)
    found = explain(sparse_fmha.neighborhood_attention, q, q, q, **options, arch="sm90")
    assert found.why_two_kernels == why
    if why is None:
        assert found.fused_kernel == "sm90_backward_fused_neighborhood_bfloat16_d64"
    else:
        assert found.fused_kernel is None
        assert f"_neighborhood_bfloat16_d64, as {why}; no atomics" in str(found)


@pytest.mark.parametrize("block_kv", [16, 64, 128])
@pytest.mark.skipif(not fused_rows(), reason="this build has no kernels of Hopper")
def test_why_the_gradients_of_block_lists_take_two_kernels(block_kv):
    q = torch.randn(1, 256, 2, 128, dtype=torch.bfloat16).requires_grad_()
    blocks = torch.ones(1, 2, 2, 256 // block_kv, dtype=torch.bool)
    mask = BlockMask.from_blocks(blocks, 256, 256, 128, block_kv)
    found = explain(sparse_fmha.block_sparse_attention, q, q, q, mask, arch="sm90")
    if block_kv == 128:
        assert found.fused_kernel == "sm90_backward_fused_block_sparse_bfloat16_d128"
    else:
        assert found.fused_kernel is None
        assert found.why_two_kernels == "blocks have fewer than 128 keys"


@pytest.mark.parametrize(
    ("block_q", "width", "options", "why"),
    [
        (512, 100, {}, None),
        (
            512,
            900,
            {},
            "lists have room for so many keys that copies may take longer than all keys",
        ),
        (512, 100, {"skip_threshold": 0.1}, None),
        (512, 200, {"skip_threshold": 0.1}, "lists have room"),
        (64, 200, {}, "lists have room"),
    ],
)
def test_gradients_of_stripes_by_copies(monkeypatch, block_q, width, options, why):
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    q = torch.empty(1, 1024, 2, 128, requires_grad=True, dtype=torch.bfloat16)
    shape = 1, 1, 1024 // block_q
    columns = torch.arange(width, dtype=torch.int32).expand(*shape, width).contiguous()
    counts = torch.full(shape, width, dtype=torch.int32)
    mask = sparse_fmha.StripeMask(columns, counts, 1024, 1024, block_q)
    found = explain(sparse_fmha.stripe_attention, q, q, q, mask, **options, arch="sm90")
    assert found.copies_keys == (why is None)
    if why is None:
        assert found.fused_kernel == "sm90_backward_fused_block_sparse_bfloat16_d128"
        assert "over copies of the keys that each group lists, all gradients by" in str(found)
    else:
        assert found.fused_kernel is None
        assert found.dkv_kernel == "sm90_backward_dkv_stripe_bfloat16_d128"
        assert f"its gradients copy no keys, as {why}" in str(found)
    elsewhere = explain(sparse_fmha.stripe_attention, q, q, q, mask, arch="sm80")
    assert not elsewhere.copies_keys
    biased = {
        name: torch.zeros(1, 1, 1024, dtype=torch.float32) for name in ("key_bias", "row_threshold")
    }
    found = explain(sparse_fmha.stripe_attention, q, q, q, mask, **biased, arch="sm90")
    assert found.copies_keys == (why is None or "skip_threshold" in options)
    if found.copies_keys:
        assert found.fused_kernel is None
        assert found.dq_kernel == "sm90_backward_dq_block_sparse_bfloat16_d128"
    wide = torch.empty(1, 1024, 2, 136, requires_grad=True, dtype=torch.bfloat16)
    found = explain(sparse_fmha.stripe_attention, wide, wide, wide, mask, **biased, arch="sm90")
    assert not found.copies_keys
    assert elsewhere.dkv_kernel == "sm80_backward_dkv_stripe_bfloat16_d128"


def test_kernels_of_the_backward():
    q = torch.randn(1, 40, 4, 72, dtype=torch.bfloat16)
    assert "backward" not in str(explain(sparse_fmha.attention, q, q, q, causal=True))
    found = explain(sparse_fmha.attention, q, q.clone().requires_grad_(), q, causal=True)
    names = {
        name: _C.find_kernel(
            **{"arch": "cpu", "mechanism": "causal", "dtype": "bfloat16", "head_dim": 72},
            **{"pass": name, "skips": False},
        )["name"]
        for name in ("backward_dq", "backward_dkv")
    }
    assert (found.dq_kernel, found.dkv_kernel) == tuple(names.values())
    (line,) = (x for x in str(found).splitlines() if "backward: " in x)
    assert all(name in line for name in names.values())
    with torch.no_grad():
        leaf = q.clone().requires_grad_()
        assert "backward: " not in str(explain(sparse_fmha.attention, leaf, q, q))


def test_a_call_without_backward_kernels_says_so(monkeypatch):
    q = torch.randn(1, 40, 4, 136, requires_grad=True, dtype=torch.bfloat16)
    found = explain(sparse_fmha.attention, q, q, q, skip_threshold=0.1)
    assert found.dq_kernel == "cpu_backward_dq_dense_bfloat16_skip"
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    found = explain(sparse_fmha.attention, q, q, q, skip_threshold=0.1, arch="sm90")
    assert found.dq_kernel == "sm90_backward_dq_block_sparse_bfloat16_d256"
    forward = [row for row in all_rows() if row["pass"] == "forward"]
    monkeypatch.setattr(explanation._build, "kernels", lambda: forward)
    found = explain(sparse_fmha.attention, q, q, q, skip_threshold=0.1, arch="sm90")
    assert found.dq_kernel is None
    assert "no kernel for dq or dk and dv" in str(found)


@pytest.mark.parametrize(
    ("dims", "row"),
    [
        ((192, 128), "d192_v128"),
        ((136, 8), "d192_v128"),
        ((128, 64), "d128"),
        ((64, 96), "d96"),
        ((128, 136), "d256"),
        ((200, 128), "d256"),
    ],
)
def test_values_of_their_own_head_dim(monkeypatch, dims, row):
    """The smallest row that is large enough for q and k, and of these for v."""
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    dim, value_dim = dims
    q, v = (tokens(1, 4096, 2, d) for d in dims)
    found = explain(sparse_fmha.attention, q, q, v, causal=True, arch="sm90")
    assert found.kernel.removesuffix("_q64").removesuffix("_q128") == f"sm90_causal_bfloat16_{row}"
    # What is not measured has no predicted time.
    assert (found.predicted_ms is None) == (row == "d192_v128")
    assert "values" in found.why
    too_small = found.rejected.get("sm90_causal_bfloat16_d64", "")
    if dim <= 64:
        assert too_small == f"takes values of head dims up to 64, v has {value_dim}"
    found = explain(sparse_fmha.neighborhood_attention, q, q, v, 64, arch="sm90")
    wide = "d256" if row == "d192_v128" else row
    assert found.kernel == f"sm90_neighborhood_bfloat16_{wide}"  # which has no such row


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 136])
def test_gradients_of_what_hopper_kept_are_those_of_lists(monkeypatch, causal, dim):
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    q = torch.empty(1, 40, 4, dim, requires_grad=True, dtype=torch.bfloat16, device="meta")
    options = {"causal": causal, "skip_threshold": 0.1}
    found = explain(sparse_fmha.attention, q, q, q, **options, arch="sm90")
    kernels = found.dq_kernel, found.dkv_kernel, found.fused_kernel
    passes = ("backward_dq", "backward_dkv", "backward_fused")
    names = [f"sm90_{name}_block_sparse_bfloat16_d{dim}" for name in passes]
    if dim > 128:
        names = [name.replace(f"d{dim}", "d256") for name in names[:2]] + [None]
    assert list(kernels) == names
    assert explain(sparse_fmha.attention, q, q, q, **options, arch="sm80").dq_kernel is None


@pytest.mark.parametrize("name", ["neighborhood", "block_sparse", "stripe"])
def test_gradients_of_other_calls_that_skip(monkeypatch, name):
    """Those of lists have the kernels of calls that do not skip; neighborhoods have those of
    lists."""
    monkeypatch.setattr(explanation._build, "kernels", all_rows)
    q = torch.empty(1, 256, 4, 128, requires_grad=True, dtype=torch.bfloat16)
    lists = torch.zeros(1, 1, 2, 3, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)
    given = {
        "neighborhood": 64,
        "block_sparse": BlockMask.from_blocks(torch.ones(1, 4, 2, 2).bool(), 256, 256),
        "stripe": sparse_fmha.StripeMask(*lists, 256, 256, 128),
    }[name]
    function = getattr(sparse_fmha, f"{name}_attention")
    found = explain(function, q, q, q, given, skip_threshold=0.1, arch="sm90")
    plain = explain(function, q, q, q, given, arch="sm90")
    assert found.kernel == f"sm90_{name}_bfloat16_d128_skip"
    kernels = [(x.dq_kernel, x.dkv_kernel, x.fused_kernel) for x in (found, plain)]
    passes = "dq", "dkv", "fused"
    of_blocks = tuple(f"sm90_backward_{x}_block_sparse_bfloat16_d128" for x in passes)
    assert kernels[0] == (of_blocks if name == "neighborhood" else kernels[1])
    assert found.why_two_kernels is None or name != "neighborhood"
