"""The benchmark cases with block lists: what they count, are compared with, and what is shown."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import sparse_fmha
from sparse_fmha import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import run  # noqa: E402
from benchmarks.cases import block_lists, selection  # noqa: E402
from benchmarks.cases.block_lists import Lists  # noqa: E402
from benchmarks.cases.case import Case  # noqa: E402
from benchmarks.cases.catalogue import CASES  # noqa: E402
from benchmarks.harness import report  # noqa: E402
from benchmarks.harness.names import UnavailableError  # noqa: E402
from benchmarks.peers import flex, vsa  # noqa: E402
from benchmarks.peers import registry as peers  # noqa: E402
from benchmarks.tables import rates, readme, targets, terminal  # noqa: E402

LENGTH = 640
DRAWN = [
    Lists(64, 64, 0.3),
    Lists(128, 16, 0.5),
    Lists(128, 128, 0.4, "uniform"),
    Lists(64, 64, 0.12, "heavy"),
    Lists(64, 64, 0.3, "similar"),
    Lists(128, 128, 0.5, "partial"),
    Lists(64, 32, 0.3, "partial"),
]
SELECTED = Lists(64, 32, 0.3, "selected")


def small(lists, **changes):
    fields = {"dtype": "float32", "batch": 1, "heads_q": 3, "heads_kv": 3, "head_dim": 16}
    fields |= {"lists": lists} | changes
    return Case("bs/small/1", "cpu", length=LENGTH, **fields)


def tensors(case):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(case.batch, case.length, heads, case.head_dim, generator=generator)
        for heads in (case.heads_q, case.heads_kv, case.heads_kv)
    ]


def token_mask(case):
    return block_lists.row_masks(case, torch.arange(case.heads_q), torch.arange(case.length))


@pytest.mark.parametrize("lists", DRAWN, ids=str)
def test_drawn_lists_have_what_the_case_counts(lists):
    case = small(lists)
    blocks, bits = block_lists.draw(lists, 3, LENGTH, "cpu")
    assert blocks.shape == (3, *lists.grid(LENGTH))
    assert blocks.sum((1, 2)).tolist() == [lists.total(LENGTH)] * 3
    assert not blocks[0].equal(blocks[1])
    mask = token_mask(case)
    assert mask.sum((1, 2)).tolist() == [case.visible_pairs] * 3
    assert case.executed_flops(None) == 4 * 3 * 16 * lists.listed_pairs(LENGTH)
    counts = blocks.sum(-1)
    if lists.kind in ("uniform", "similar"):
        assert counts.max() - counts.min() <= 1
    elif lists.kind == "heavy":
        top = counts.sort(-1, descending=True).values[:, : -(-counts.shape[1] // 10)]
        assert top.sum(-1).tolist() == [lists.total(LENGTH) // 2] * 3
    else:
        assert counts.unique().numel() > 1
    if bits is not None:
        assert case.useful_flops * 2 == case.executed_flops(None)
        within = mask.unflatten(1, (-1, lists.block_q)).unflatten(3, (-1, lists.block_kv))
        assert within.any((2, 4)).equal(blocks)


def test_neighboring_rows_of_similar_lists_agree():
    blocks = block_lists.draw(Lists(64, 64, 0.1, "similar"), 4, 8192, "cpu").blocks.float()
    total = blocks.sum()
    assert 0.7 < (blocks[:, 1:] * blocks[:, :-1]).sum() / total < 0.8
    assert (blocks[:, 64:] * blocks[:, :-64]).sum() / total < 0.15
    other = block_lists.draw(Lists(64, 64, 0.1), 4, 8192, "cpu").blocks.float()
    assert (other[:, 1:] * other[:, :-1]).sum() / total < 0.15


def test_lists_that_cannot_be():
    with pytest.raises(ValueError, match="no multiple of the block of 128"):
        Lists(128, 64, 0.5).grid(1000)
    with pytest.raises(ValueError, match="would list 12 of 5 blocks"):
        Lists(128, 128, 1.0, "heavy").row_counts(LENGTH)
    with pytest.raises(ValueError, match="selected are not drawn"):
        block_lists.draw(SELECTED, 1, LENGTH, "cpu")
    four = block_lists.half_bytes().tolist()
    assert sorted(four) == [x for x in range(256) if x.bit_count() == 4]


@pytest.mark.parametrize("lists", DRAWN, ids=str)
def test_our_mask_is_the_one_that_rows_are_checked_with(lists):
    case = small(lists)
    mask = block_lists.mask(case)
    assert (mask.block_q, mask.block_kv) == (lists.block_q, lists.block_kv)
    partial = ()
    if lists.kind == "partial":
        places = torch.arange(8, dtype=torch.uint8)
        pairs = ((mask.partial_bits[..., None] >> places) & 1).flatten(-2).bool()
        partial = mask.partial_counts, mask.partial_indices, pairs
    visible = reference.block_sparse_mask(
        *(mask.counts, mask.indices, LENGTH, LENGTH, lists.block_q, lists.block_kv), *partial
    )
    assert visible[0].equal(token_mask(case))
    heads, rows = torch.tensor([0, 2]), torch.tensor([0, 17, 300, LENGTH - 1])
    assert block_lists.row_masks(case, heads, rows).equal(visible[0][heads][:, rows])


def test_cases():
    cases = {c.name: c for c in CASES if c.lists and c.device == "cuda"}
    for case in cases.values():
        assert case.length % case.lists.block_q == case.length % case.lists.block_kv == 0
        assert 3 <= case.dense_iterations <= 20
        assert case.dense.mechanism == "dense"
        if case.lists.kind in ("uniform", "heavy"):
            case.lists.row_counts(case.length)  # there are so many blocks
    assert cases["bs/128x16/25"].useful_flops == 4 * 24 * 128 * 32768**2 // 4
    assert cases["bs/heavy/10"].useful_flops == cases["bs/uniform/10"].useful_flops
    assert cases["select/128k"].mechanism == "selection"
    assert cases["select/128k"].useful_flops == 2 * 32 * 128 * 1024**2
    others = {other for other, _ in targets.RELATIVE.values()}
    assert {*targets.RATES, *targets.RELATIVE, *targets.SHARES, *others} <= set(cases)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("lists", DRAWN, ids=str)
def test_flex_computes_the_same(lists, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = small(lists)
    q, k, v = tensors(case)
    exact, _ = reference.attention(q, k, v, token_mask(case)[None])
    torch.testing.assert_close(flex.flex(case, q, k, v)(), exact.float())
    mask = flex.lists_mask(case)
    assert (lists.block_q, lists.block_kv) == mask.BLOCK_SIZE
    counts, full = mask.kv_num_blocks.sum(), mask.full_kv_num_blocks.sum()
    total = 3 * lists.total(LENGTH)
    assert (counts, full) == ((total, 0) if lists.kind == "partial" else (0, total))
    blocks = block_lists.draw(lists, 3, LENGTH, "cpu").blocks
    assert mask.to_dense()[0].bool().equal(blocks)
    with pytest.raises(UnavailableError, match="flex is the same"):
        flex.flex_tiled(case, q, k, v)


def test_flex_has_tiles_that_divide_the_blocks():
    assert flex.kernel_options(small(Lists(128, 128, 0.3))) is None
    assert flex.kernel_options(small(Lists(64, 64, 0.3))) == {"BLOCK_M": 64, "BLOCK_N": 64}
    assert flex.kernel_options(small(Lists(128, 16, 0.3))) == {"BLOCK_M": 128, "BLOCK_N": 16}


def test_fastvideo_peer_is_given_lists(monkeypatch):
    case = small(Lists(64, 64, 0.3), dtype="bfloat16", head_dim=64)
    given = {}

    def forward(q, k, v, indices, counts, sizes):
        given.update(q=q, indices=indices, counts=counts, sizes=sizes)
        return v.clone(), None

    monkeypatch.setattr(vsa, "load", lambda: forward)
    q, k, v = tensors(case)
    assert vsa.vsa(case, q, k, v)().equal(v)
    assert given["q"].is_contiguous()
    assert given["q"].shape == (1, 3, LENGTH, 64)
    assert given["sizes"].tolist() == [64] * 10
    assert {given[name].dtype for name in ("indices", "counts", "sizes")} == {torch.int32}
    mask = reference.block_sparse_mask(given["counts"], given["indices"], LENGTH, LENGTH, 64, 64)
    assert mask[0].equal(token_mask(case))
    for change, reason in (
        ({"lists": Lists(128, 128, 0.3)}, "blocks of 64x64"),
        ({"lists": Lists(64, 64, 0.3, "partial")}, "full blocks"),
        ({"lists": None}, "full blocks"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"heads_kv": 1}, "as many key heads"),
    ):
        with pytest.raises(UnavailableError, match=reason):
            vsa.check(dataclasses.replace(case, **change))


def test_a_driver_that_is_older_than_the_bundled_one_is_refused():
    bundled = Path("libcuda-266916da.so.580.173.02")
    for driver in ("580.173.02", "590.10"):
        vsa.check_driver(bundled, [driver])
    vsa.check_driver(Path("libcuda.so.1"), None)
    for driver in (["580.159.04"], ["570.200"], None):
        with pytest.raises(UnavailableError, match="brings"):
            vsa.check_driver(bundled, driver)


def test_a_selection_is_judged_by_its_scores():
    case = small(SELECTED)
    q, k, v = tensors(case)
    oracle = selection.Oracle(case, q, k, v)
    mask = selection.select(case, q, k, v)()
    assert mask.counts.eq(6).all()
    assert oracle.error(mask)["rel_rms"] < 1e-6
    scores = selection.pooled_scores(case, q, k, torch.float64)
    rows = q.view(1, 10, 64, 3, 16).mean(2)[0, 4, 2].double()
    assert scores[0, 2, 4, 7] == pytest.approx(
        (rows * k[0, 7 * 32 : 8 * 32, 2].mean(0)).sum().item()
    )

    def made(top):
        return type("Mask", (), {"counts": torch.full(top.shape[:3], 6), "indices": top.int()})

    worst = scores.topk(6, largest=False).indices.sort(-1).values
    assert oracle.error(made(worst))["rel_rms"] > 0.5
    best = scores.topk(6).indices.sort(-1).values
    assert oracle.error(made(best))["rel_rms"] < 1e-12
    for wrong in (best.flip(-1), best.clamp(max=3), best + 20):
        assert oracle.error(made(wrong))["rel_rms"] == float("inf")
    fewer = made(best)
    fewer.counts = fewer.counts - 1
    assert oracle.error(fewer)["max_abs"] == float("inf")


OPTIONS = {"l2": ["cold"], "iterations": 4, "warmup": 1, "seed": 0}


@pytest.mark.parametrize("lists", DRAWN, ids=str)
def test_lists_beside_dense_attention(lists):
    case = small(lists, dense_iterations=2)
    record = run.run_case(case, peers.choose("cpu", "auto"), [], **OPTIONS)
    runs = rates.by_op(record, "cold")
    assert sorted(runs) == ["sparse_fmha", "sparse_fmha dense", "torch", "torch dense"]
    assert record["shape"]["lists"] == dataclasses.asdict(lists)
    for one in runs.values():
        assert one["error"]["rel_rms"] < 1e-5  # each against what it computes
    ours, dense = (runs[name]["ms"]["median"] for name in ("sparse_fmha", "sparse_fmha dense"))
    density = lists.listed_pairs(LENGTH) / LENGTH**2
    assert rates.percent_of_dense(runs) == pytest.approx(100 * dense * density / ours)
    assert rates.share_of_dense(runs) == pytest.approx(100 * ours / dense)


def test_a_selection_beside_dense_attention():
    case = small(SELECTED, dense_iterations=2)
    record = run.run_case(case, peers.choose("cpu", "auto"), [], **OPTIONS)
    runs = rates.by_op(record, "cold")
    assert sorted(runs) == ["sparse_fmha", "sparse_fmha dense", "torch dense"]
    assert runs["sparse_fmha"]["error"]["rel_rms"] < 1e-6
    assert rates.percent_of_dense(runs) is None
    assert rates.share_of_dense(runs) > 0


def record(name, ms, **others):
    (case,) = (c for c in CASES if c.name == name)

    def one(op, ms, flops=case.useful_flops, **fields):
        spread = {"median": ms, "p10": ms, "p90": ms}
        error = {"rel_rms": 1e-3, "max_abs": 1e-3}
        return {"op": op, "l2": "cold", "ms": spread, "useful_tflops": flops / ms * 1e-9,
                "gbps": 1.0, "percent_of_matmul": 1.0, "error": error} | fields  # fmt: skip

    dense = case.dense.useful_flops
    ours = one("sparse_fmha", ms)
    if case.mechanism == "block_sparse":
        ours["executed_tflops"] = case.executed_flops(None) / ms * 1e-9
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in case.shape().items()}
    runs = [one("matmul", 1.5), ours, one("sparse_fmha dense", 20.0, dense)]
    runs += [one("fa3 dense", 22.0, dense), *(one(op, t) for op, t in others.items())]
    return {"name": name, "shape": shape, "skipped": {}, "runs": runs}


@pytest.fixture
def results():
    """Dense attention takes 20 ms, so 5.5 ms for a quarter of the blocks is 91% of its rate."""
    cases = [
        record("bs/128x128/25", 5.5, flex=11.0),
        record("bs/64x64/5", 2.0, vsa=3.0),
        record("bs/partial/25", 10.0),
        record("select/128k", 0.1),
    ]
    return {
        "schema": report.SCHEMA, "timestamp": "2026-01-01T00:00:00+00:00", "cases": cases,
        "commit": "0123456789abcdef", "dirty": False, "failed": {}, "versions": {"torch": "2.11"},
        "device": {"type": "cuda", "name": "GPU"}, "settings": {"l2": ["cold"], "iterations": 20},
    }  # fmt: skip


def test_readme_table(results, tmp_path):
    report.save(results, tmp_path / "a.json")
    text = readme.section(tmp_path)
    assert "2026-01-01, commit 0123456789" in text
    assert [x for x in text.splitlines() if x.startswith("##")] == [
        "## All cells beside the fastest other kernel",
        "## Block-sparse attention",
    ]
    tokens = "of 32768 tokens, 24 heads, D=128"
    assert text.splitlines()[-6:] == [
        "| case | blocks | listed | ms | of our dense time | of our dense rate | target | over "
        "FlashAttention-3 dense | over FlexAttention | over fastvideo-kernel |",
        "|" + " --- |" * 10,
        f"| bs/128x128/25 | 128x128 {tokens} | 25% | 5.5 | 27.5% | 91% | rate >= 93% | 4.00x | "
        "2.00x |  |",
        f"| bs/64x64/5 | 64x64 {tokens} | 5% | 2 | 10.0% | 50% |  | 11.00x |  | 1.50x |",
        f"| bs/partial/25 | 128x128 {tokens} | 25% | 10 | 50.0% | 50% | rate >= 55% | 2.20x |  "
        "|  |",
        "| select/128k | 128x128 of 131072 tokens, 32 heads, D=128 | 10% | 0.1 | 0.5% |  | "
        "time < 3% |  |  |  |",
    ]


def test_targets_relative_to_a_case_that_is_not_there(results):
    cases = [c for c in results["cases"] if c["name"] != "bs/128x128/25"]
    (partial,) = (c for c in cases if c["name"] == "bs/partial/25")
    assert rates.target(partial, cases, "cold") == ""


def test_printed_table(results):
    header, rows = terminal.table_rows(results)
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["target"] for row in shown][1:] == ["", "rate >= 55%", "time < 3%"]
    assert shown[0]["% dense"] == "90.9"
    assert [row["% dense time"] for row in shown] == ["27.5", "10", "50", "0.5"]
    assert shown[3]["% dense"] == ""


def test_library_has_what_the_cases_use():
    assert callable(sparse_fmha.BlockMask.from_indices)
    assert callable(sparse_fmha.block_sparse_attention)
