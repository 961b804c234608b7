"""The study of backward passes at its tiny size."""

import contextlib
import json
import math
import sys
import types

import pytest
import torch
from torch._inductor.exc import InductorError

from benchmarks.cases import gradients as cases
from benchmarks.cases.gradients import CASES, Case
from benchmarks.harness.names import UnavailableError
from benchmarks.peers import flex as flex_peer
from benchmarks.peers import gradients as peers
from benchmarks.peers import vsa as vsa_peer
from benchmarks.studies import backward
from benchmarks.tables import backward as page
from sparse_fmha import _C


def test_tiny(tmp_path, capsys):
    out = tmp_path / "backward.json"
    assert backward.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {case.name for case in CASES}
    twice = {row["case"] for row in rows if row["op"] == page.DETERMINISTIC}
    assert twice == {x.name for x in CASES if x.causal is not None and x.head_dim <= 128}
    for row in rows:
        assert row["ms"]["median"] > 0
        assert row["useful_flops"] > 0
        assert row["error"] is None or row["error"] < 1e-4
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pairs(case):
    """Those that are counted are those that are visible."""
    small = case.tiny()
    _, visible = cases.attention_of(small, "cpu", 0)
    tokens = math.prod(small.grid)
    heads = visible.shape[-3] if visible.dim() > 2 else 1
    assert small.pairs() * heads == visible.expand(*visible.shape[:-2], tokens, tokens).sum()


@pytest.mark.parametrize("case", [c for c in CASES if c.window], ids=lambda case: case.name)
def test_executed_pairs(case):
    """As the walk of the key tiles counts them, and not many more where windows are aligned."""
    executed = case.executed_pairs(64, 128)
    assert executed % (64 * 128) == 0
    assert case.pairs() <= executed <= 2 * case.pairs()
    if case.name in ("1-D, stride 2048", "HunyuanVideo, stride 16x8x8"):
        assert executed <= 1.3 * case.pairs()


def test_executed_pairs_are_those_of_the_walk():
    case = next(case for case in CASES if case.name == "Cosmos, stride 1x8x16").tiny()
    walk = case.walk()
    box = _C.tiles.max_box(walk[0], walk[3])
    shape = _C.tiles.rank(walk, 64, 128, box, _C.tiles.costs(128), static=True)[0][:2]
    found = _C.walks.Neighborhood(*walk, *shape)
    visits = [found.walk_transposed(i) for i in range(found.num_key_tiles())]
    assert case.executed_pairs(64, 128) == 64 * 128 * sum(len(x[2]) for x in visits)


def test_whose_tiles_are_executed(monkeypatch):
    """Those of the kernel that Hopper takes; of other GPUs they are not known."""
    wide, narrow = (Case("", (4096,), 2, window=(size,)) for size in (600, 100))
    capability, find, asked = [9, 0], _C.find_kernel, []

    def find_or_not(*request):
        asked.append(request)
        with contextlib.suppress(RuntimeError):  # a build for the CPU has no such kernel
            find(*request)
        return {"tile_q": 64, "tile_k": 128}

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_C, "find_kernel", find_or_not)
    for case, direction in ((wide, "backward_fused"), (narrow, "backward_dkv")):
        found = backward.executed_pairs(case, "cuda", torch.bfloat16)
        assert found == case.executed_pairs(64, 128)
        assert asked[-1] == ("sm90", "neighborhood", "bfloat16", 128, False, direction)
    capability[:] = 8, 0
    monkeypatch.setattr(_C, "arch_for_call", _C.arch_of_capability)
    assert backward.executed_pairs(wide, "cuda", torch.bfloat16) is None
    assert backward.executed_pairs(wide, "cpu", torch.float32) is None
    lists = next(case for case in CASES if case.blocks)
    assert backward.executed_pairs(lists, "cuda", torch.bfloat16) == lists.pairs()


def test_a_deterministic_call_leaves_the_setting_as_it_was():
    def fail(*_):
        assert torch.are_deterministic_algorithms_enabled()
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        backward.deterministic(fail, *torch.zeros(3))
    assert not torch.are_deterministic_algorithms_enabled()


def row(case, op, ms, error=None, executed=None):
    spread = dict.fromkeys(("median", "p10", "p90"), ms)
    return {"case": case, "op": op, "ms": spread, "useful_flops": 2e12, "error": error,
            "executed_flops": executed}  # fmt: skip


def test_page_table():
    both, alone, lists = page.rows(
        {
            "rows": [
                row(page.OWN_DENSE, "sparse_fmha", 5.0, 4e-3, 2e12),
                row(page.OWN_DENSE, page.DETERMINISTIC, 6.0),
                row(page.OWN_DENSE, "cuDNN", 4.0),
                row("b", "sparse_fmha", 10.0, 2e-3, 3e12),
                row("b", "FlexAttention", 30.0),
                row("lists", "sparse_fmha", 8.0, 2e-3),
                row("lists", "fastvideo-kernel", 12.0),
            ]
        }
    )
    cells = "5", "400", "6 ms (1.20x)", "0.80x (4 ms)", "4.0e-03"
    assert tuple(both.values()) == (page.OWN_DENSE, *cells)
    assert alone["relative to FlexAttention"] == "3.00x (30 ms)"
    assert (alone["case"], alone["TFLOP/s"], alone["of dense"]) == ("b", "200", "75%")
    assert lists["relative to fastvideo-kernel"] == "1.50x (12 ms)"
    assert "of dense" not in lists
    assert {*both, *alone, *lists} <= set(page.COLUMNS)


def test_the_first_results_are_read():
    """They have no executed operations."""
    first = row("1-D", "sparse_fmha", 10.0, 2e-3)
    del first["executed_flops"]
    (line,) = page.rows({"rows": [row(page.OWN_DENSE, "sparse_fmha", 5.0, 4e-3), first]})[1:]
    assert "of dense" not in line
    settings = {"iterations": 7, "l2": "cold"}
    assert "Of dense" not in page.caption({"rows": [first], "settings": settings}, "")


def test_printed_table():
    rows = [
        row(page.OWN_DENSE, "sparse_fmha", 5.0, 4e-3, 2e12),
        row("1-D", "sparse_fmha", 10.0, 2e-3, 3e12),
    ]
    _, dense, window = backward.table(rows).splitlines()
    assert "%" not in dense
    assert "75%" in window


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.columns], ids=lambda case: case.name
)
def test_peers_have_the_same_work(case):
    other = case.of_peers("cpu", torch.float32)
    shape = other.batch, other.length, other.heads_q, other.head_dim
    assert shape == (case.batch, math.prod(case.grid), case.heads, case.head_dim)
    assert other.mechanism == (
        "neighborhood" if case.window else "block_sparse" if case.blocks
        else "causal" if case.causal else "dense"
    )  # fmt: skip
    assert other.visible_pairs == case.pairs()


def given(name, device="cpu"):
    case = next(case for case in CASES if case.name == name).tiny()
    *inputs, dout = cases.problem(case, device, torch.float32, 0)
    return case, inputs, dout


def test_cases_that_flex_attention_has_no_kernel_for(monkeypatch):
    def fail(*_):
        raise InductorError(RuntimeError("No choices to select. Provided reason: none"), None)

    monkeypatch.setattr(flex_peer, "flex", fail)
    with pytest.raises(UnavailableError, match=r"^RuntimeError: No choices to select$"):
        peers.flex(*given("lists 64x64"))
    with pytest.raises(UnavailableError, match=r"^lone keys are no blocks$"):
        peers.flex(*given("stripes of 512 rows"))


@pytest.mark.parametrize("message", ["No available kernel. Aborting.", "cuDNN Frontend error: x"])
def test_cases_that_cudnn_has_no_kernel_for(monkeypatch, message):
    def fail(*_, **options):
        assert options == {"is_causal": True, "enable_gqa": True}
        raise RuntimeError(f"{message}\nat a place")

    monkeypatch.setattr(peers, "scaled_dot_product_attention", fail)
    with pytest.raises(UnavailableError) as raised:
        peers.cudnn(*given("D128 causal 8k 32/8 heads"))
    assert str(raised.value) == message


def test_other_errors_of_cudnn_are_raised(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(peers, "scaled_dot_product_attention", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        peers.cudnn(*given("D256 full 8k"))


def test_gradients_of_fastvideo(monkeypatch):
    """The package is handed its layout, and ours comes back."""
    case, inputs, dout = given("lists 64x64")

    def attend(other, q, k, v):
        assert (other.lists.block_q, other.lists.block_kv) == (64, 64)
        assert q.shape == (1, case.heads, *case.grid, case.head_dim)
        assert all(x.is_contiguous() and x.is_leaf and x.requires_grad for x in (q, k, v))
        return 2 * q + 3 * k + 4 * v

    monkeypatch.setattr(vsa_peer, "with_gradients", attend)
    found = peers.vsa(case, inputs, dout)()
    for factor, gradient in zip((2, 3, 4), found, strict=True):
        assert gradient.transpose(1, 2).equal(factor * dout)


def test_the_package_is_asked_for_gradients(monkeypatch):
    case, inputs, _ = given("lists 64x64")
    other = case.of_peers("cpu", torch.bfloat16)
    module = types.ModuleType("fastvideo_kernel")

    def attend(q, k, v, indices, counts, sizes):
        assert indices.shape == (1, case.heads, 4, 1)
        assert counts.tolist() == [[[1] * 4] * case.heads]
        assert sizes.tolist() == [64] * 4
        return v, None

    module.block_sparse_attn_from_indices = attend
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", module)
    monkeypatch.setattr(vsa_peer, "load", lambda: None)
    q, k, v = inputs
    assert vsa_peer.with_gradients(other, q, k, v) is v


def test_a_package_that_is_missing():
    case, inputs, dout = given("lists 64x64")
    bf16 = [x.detach().bfloat16() for x in inputs]
    with pytest.raises(UnavailableError, match="fastvideo-kernel is not installed"):
        peers.vsa(case, bf16, dout.bfloat16())


def test_which_peers_are_tried():
    tried = {case.name: set(peers.peers_of(case, True)) for case in CASES}
    assert tried["lists 64x64"] == {"fastvideo-kernel", "FlexAttention"}
    assert tried["lists 128x128"] == tried["1-D"] == {"FlexAttention"}
    assert tried["D128 causal 16k"] == {"cuDNN", "FlexAttention"}
    assert tried["D128 full 8k 32/8 heads"] == {"cuDNN", "FlexAttention"}
    assert tried["D256 full 8k"] == {"cuDNN"}
    assert sum("FlexAttention" in x for x in tried.values()) < 20  # each compiles for seconds
    assert not any("FlexAttention" in peers.peers_of(case, False) for case in CASES)


def test_chosen_cases(tmp_path):
    out = tmp_path / "backward.json"
    assert backward.main(["--tiny", "--case", "1-D", "--iterations", "1", "--out", str(out)]) == 0
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} == {"1-D"}
