"""The study of decode attention at its tiny size, with a timer and peers that are made up."""

import json
import sys
import types

import pytest
import torch

import sparse_fmha
from benchmarks.cases import decode as cases
from benchmarks.cases import packed
from benchmarks.harness.timing import Spread
from benchmarks.studies import decode
from benchmarks.tables import decode as tables

NAMES = [case.name for case in (*cases.CASES, *packed.CASES)]


@pytest.fixture(autouse=True)
def timer(monkeypatch):
    """Runs each op once: the first takes 1 ms, the next one 2 ms, and so on."""

    def measure(ops, **options):
        assert options["l2"] == "clean"
        for op in ops.values():
            op()
        return {name: Spread(i, i / 2, 2 * i, 1) for i, name in enumerate(ops, 1)}

    monkeypatch.setattr(decode.timing, "measure", measure)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, cu_seqlens_q=None,
    max_seqlen_q=None, causal=False,
):  # fmt: skip
    """With the names that fa3-fwd has for what is used of it."""
    assert causal
    caches = (k_cache, v_cache)
    if cu_seqlens_q is None:
        return sparse_fmha.decode_attention(q, *caches, cache_seqlens, page_table=page_table)
    most = page_table.shape[1] * k_cache.shape[1]
    return sparse_fmha.varlen_attention(
        q, *caches, cu_seqlens_q, None, max_seqlen_q, most, causal=True, seqused_k=cache_seqlens,
        page_table=page_table,
    )  # fmt: skip


class BatchDecode:
    """As FlashInfer's wrapper is called."""

    def __init__(self, workspace, layout, use_tensor_cores, backend):
        assert (workspace.numel(), layout, use_tensor_cores, backend) == (
            128 << 20,
            "NHD",
            True,
            "fa2",
        )

    def plan(self, indptr, indices, last, heads_q, heads, dim, page, q_data_type, kv_data_type):
        counts = torch.diff(indptr)
        self.lens = ((counts - 1) * page + last).to(torch.int32)
        rows = indices.split(counts.tolist())
        self.table = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        self.shape = heads_q, heads, dim, page

    def run(self, q, caches):
        k, v = caches
        assert self.shape == (q.shape[1], k.shape[2], k.shape[3], k.shape[1])
        return sparse_fmha.decode_attention(q[:, None], k, v, self.lens, page_table=self.table)[
            :, 0
        ]


@pytest.fixture
def others(monkeypatch):
    fa3 = types.ModuleType("fa3_fwd_interface")
    fa3.flash_attn_with_kvcache = flash_attn_with_kvcache
    fa3.flash_attn_varlen_func = sparse_fmha.varlen_attention
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = BatchDecode
    for module in (fa3, flashinfer):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def run(tmp_path, *options):
    out = tmp_path / "made.json"
    assert decode.main(["--tiny", "--iterations", "1", "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_every_case_with_all_peers(tmp_path, capsys, others):
    results = run(tmp_path)
    rows = results["rows"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == ["floor", *NAMES]
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group"], set()).add(row["op"])
        assert row.get("bytes", row.get("flops")) >= 0
        # The thresholds are too small to show in out; peers have no threshold.
        assert row.get("error", 0) < 1e-3
    peers = {"fa3", "flashinfer"}
    ours = {"sparse_fmha"}
    assert by_group == {
        "floor": {"read, sum", "read, sums of rows", "read, product", "empty"},
        "dense": ours | peers | {"cudnn"},
        "pages": ours | peers | {"own, page 64", "own, contiguous"},
        "ragged": ours | peers | {"own, uniform"},
        "blocks": ours | peers | {"cudnn", "own, all keys"},
        "select": ours | peers | {"own, all keys"},
        "skip": ours | peers | {"cudnn", "own, no threshold"},
        "prefill": ours | {"fa3", "own, the longest", "own, one call each"},
        "chunks": ours | {"fa3", "fa3, contiguous", "own, contiguous"},
        "grids": ours | {"own, in a loop"},
    }
    skipped = [row["skipped"] for row in rows if "skipped" in row]
    assert skipped[0] == 0
    assert min(skipped[1:]) > 0.2  # of few tiles; the first of a request is kept
    printed = capsys.readouterr().out.splitlines()
    table = [i for i, line in enumerate(printed) if line.startswith("case ")][-1]
    for name, line in zip(NAMES, printed[table + 1 :], strict=False):
        assert line.startswith(name)
    assert printed[-1] == "dense over the best peer: geometric mean 2.000x, least 2.000x"
    assert printed[-2].startswith("R: ")
    absent = [line for line in printed if line.startswith("not measured: ")]
    assert absent == [
        "not measured: cudnn in 16x32k, page 16; 16x32k, page 1; 1x128k + 63x2k and 1 more: takes "
        "no pages and no lengths"
    ]


def test_the_page(tmp_path, others):
    results = run(tmp_path, "--only", "blocks,prefill,grids")
    assert "R, 1 GB/s, is the fastest" in tables.caption(results, "here")
    first, *_, packed_prompts, grids = tables.rows(results)
    assert set(first) == {*tables.COLUMNS}
    assert first["best peer"] == "cudnn, 3000 us"
    assert (first["over the peer"], first["our own"], first["over it"]) == (
        "3.000x", "all keys", "2.000x",
    )  # fmt: skip
    assert "of R" not in {name for name, cell in packed_prompts.items() if cell}
    assert "best peer" not in grids


def test_without_peers_and_for_some_groups(tmp_path, capsys):
    results = run(tmp_path, "--only", "dense,grids", "--peers", "fa3,flashinfer")
    assert {row["group"] for row in results["rows"]} == {"floor", "dense", "grids"}
    assert set(results["skipped"]["1x1k"]) == {"fa3", "flashinfer"}
    printed = capsys.readouterr().out
    assert "fa3 in 1x1k; 1x4k; 1x16k and 22 more: fa3_fwd_interface does not load: " in printed
    assert "geometric mean" not in printed
    assert run(tmp_path, "--only", "ragged", "--peers", "none")["skipped"] == {}


def test_a_case_that_the_gpu_does_not_support(tmp_path, capsys, monkeypatch):
    def refusing(*args, skip_threshold, **options):
        if skip_threshold:
            raise NotImplementedError("there is no such kernel")
        return decode_attention(*args, **options)

    decode_attention = sparse_fmha.decode_attention
    monkeypatch.setattr(sparse_fmha, "decode_attention", refusing)
    results = run(tmp_path, "--only", "skip", "--peers", "none")
    assert {row["op"] for row in results["rows"] if row["group"] == "skip"} == {"own, no threshold"}
    printed = capsys.readouterr().out
    assert printed.count("not supported") == 4
    assert "sparse_fmha in 64x64k 64/4, 0% skipped" in printed
    assert ": there is no such kernel" in printed


def test_limits_of_time_and_memory(tmp_path, monkeypatch):
    results = run(tmp_path, "--only", "dense", "--limit", "-1")
    assert {row["group"] for row in results["rows"]} == {"floor"}
    assert set(results["skipped"]) == {case.name for case in cases.dense_cases()}
    results = run(tmp_path, "--only", "dense", "--memory", "0.001", "--peers", "none")
    assert set(results["skipped"]) == {f"{batch}x128k" for batch in (1, 4, 16, 64, 256)}


def test_a_failing_peer_is_named(tmp_path, others, monkeypatch):
    def fails(*args, **options):
        raise ValueError("no nvcc\nand more")

    monkeypatch.setattr(sys.modules["flashinfer"], "BatchDecodeWithPagedKVCacheWrapper", fails)
    results = run(tmp_path, "--only", "ragged", "--peers", "flashinfer")
    assert results["skipped"] == {"1x128k + 63x2k": {"flashinfer": "ValueError: no nvcc"}}


def test_the_error_is_one():
    cache = cases.Cache(1 << 20, "cpu", torch.float32, 0)
    case = cases.DecodeCase("pages", "", (130, 70), (4, 2), page=16)
    call = cache.call(case)
    out = sparse_fmha.decode_attention(call.q, call.k, call.v, call.seq_lens, **call.options)
    assert cases.error(call, out) < 1e-5
    assert cases.error(call, -out) > 1


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        (cases.DecodeCase("dense", "", (10, 10), (4, 2)), 20),
        (cases.DecodeCase("blocks", "", (1280, 1280), (4, 2), sparsity=80), 2 * 4 * 64),
    ],
)
def test_bytes(case, tokens):
    """Keys, values, q and out of two requests."""
    assert case.read_bytes(2) == 2 * 2 * 128 * (tokens * 2 + 2 * 4)


def test_ratios():
    """Lists are compared by time, ragged lengths by rate."""

    def row(group, op, ms, size):
        return {
            "group": group, "op": op, "bytes": size, "ms": {"median": ms, "p10": ms, "p90": ms},
        }  # fmt: skip

    found = {}
    for group in ("blocks", "ragged"):
        ops = [row(group, "sparse_fmha", 1, 100), row(group, "own, base", 3, 600)]
        ops.append(row(group, "fa3", 4, 600))
        found[group] = tables.line_of(group, ops, 1e-4)
    assert found["blocks"][6:11] == ["base", "3.000", "fa3", "4000", "4.000"]
    assert found["ragged"][6:11] == ["base", "0.500", "fa3", "4000", "4.000"]
    assert found["ragged"][5] == "100.0%"
