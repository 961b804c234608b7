"""The backends for vLLM and SGLang against stubs of their interfaces (tests/support/server_stubs).

Neither server runs here.
"""

import importlib
import inspect
import sys
from types import SimpleNamespace

import bias_oracle
import pytest
import server_stubs as stubs
import torch

from sparse_fmha import reference

HEADS, HEADS_KV, DIM, SCALE = 4, 2, 16, 0.3
PREFIXES = [20, 7, 0, 33]  # tokens of each request that are in the cache already
COUNTS = [1, 1, 9, 40]  # new tokens, one-token requests first


@pytest.fixture
def module(monkeypatch, request):
    """The backend's module, imported over the stubs."""
    name = f"sparse_fmha.integrations.{request.param}"
    stubs.install(monkeypatch)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


vllm = pytest.mark.parametrize("module", ["vllm"], indirect=True)
sglang = pytest.mark.parametrize("module", ["sglang"], indirect=True)


def requests(counts, prefixes, seed=0):
    """q, k and v of all tokens of each request; the new ones are at the end."""
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, HEADS_KV, HEADS_KV)
    return [
        [
            torch.randn(rows, h, DIM, generator=generator)
            for rows, h in zip((n, prefix + n, prefix + n), heads, strict=True)
        ]
        for n, prefix in zip(counts, prefixes, strict=True)
    ]


def expected(drawn, window=None, sinks=None, causal=True, softcap=0.0):
    """By definition, packed."""
    outs = []
    for q, k, v in drawn:
        mask = reference.causal_mask(len(q), len(k))
        if not causal:
            mask = torch.ones_like(mask)
        if window is not None:
            at = torch.arange(len(q))[:, None] + len(k) - len(q)
            mask = mask & (torch.arange(len(k)) > at - window)
        out, lse = bias_oracle.attend(q[None], k[None], v[None], mask, SCALE, softcap=softcap)
        if sinks is not None:
            out = out * torch.sigmoid(lse - sinks)[..., None]
        outs.append(out[0].float())
    return torch.cat(outs)


def paged(lengths, page, spare=3, seed=1):
    """A table of pages in random order, -1 behind each request's own, and how many there are."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    for row, own in zip(table, order[: sum(counts)].split(counts), strict=True):
        row[: len(own)] = own
    return table, sum(counts) + spare


def rows_of(table, page, request, positions):
    return table[request].long()[positions // page] * page + positions % page


def matches(ours, theirs, extra=()):
    """Arguments have the names and the order of the interface."""
    for name, function in vars(theirs).items():
        if name.startswith("__") and name != "__init__":
            continue
        if not callable(getattr(theirs, name)) or name not in vars(ours):
            continue
        found = [p.name for p in inspect.signature(getattr(ours, name)).parameters.values()]
        wanted = [p.name for p in inspect.signature(getattr(theirs, name)).parameters.values()]
        assert [x for x in found if x not in extra] == wanted, (name, function)


class Vllm:
    """A layer, a cache and a batch as vLLM hands them over."""

    def __init__(self, module, page, counts, prefixes, pad=0, **options):
        self.drawn = requests(counts, prefixes)
        lengths = [a + b for a, b in zip(counts, prefixes, strict=True)]
        table, pages = paged(lengths, page)
        backend = module.SparseFmhaBackend
        shape = backend.get_kv_cache_shape(pages, page, HEADS_KV, DIM)
        order = backend.get_kv_cache_stride_order()
        self.cache = torch.full([shape[i] for i in order], torch.nan).permute(
            [order.index(i) for i in range(len(order))]
        )
        slots = []
        for b, (_, k, v) in enumerate(self.drawn):
            rows = rows_of(table, page, b, torch.arange(lengths[b]))
            for at, x in enumerate((k, v)):
                old = rows[: prefixes[b]]
                self.cache[old // page, at, old % page] = x[: prefixes[b]]
            slots.append(rows[prefixes[b] :])
        starts = torch.tensor([0, *counts, *[0] * pad]).cumsum(0).int()
        tokens = sum(counts) + pad
        padded = torch.nn.functional.pad
        metadata = stubs.CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths + [0] * pad, dtype=torch.int32),
            num_reqs=len(counts) + pad, num_actual_tokens=tokens, max_query_len=max(counts),
            max_seq_len=max(lengths), causal=options.pop("causal", True),
            block_table_tensor=padded(table, (0, 0, 0, pad), value=-1),
            slot_mapping=padded(torch.cat(slots), (0, pad), value=-1),
        )  # fmt: skip
        parallel = SimpleNamespace(decode_context_parallel_size=1)
        config = SimpleNamespace(parallel_config=parallel)
        builder = backend.get_builder_cls()(None, ["layer"], config, torch.device("cpu"))
        self.metadata = builder.build(0, metadata)
        self.impl = backend.get_impl_cls()(HEADS, DIM, SCALE, HEADS_KV, **options)
        self.layer = SimpleNamespace(_k_scale=torch.ones(()), _v_scale=torch.ones(()))
        fill = torch.zeros(pad, HEADS, DIM)
        self.q = torch.cat([q for q, *_ in self.drawn] + [fill])
        new = [[x[len(x) - len(q) :] for x in (k, v)] for q, k, v in self.drawn]
        self.k, self.v = (torch.cat([*x, fill[:, :HEADS_KV]]) for x in zip(*new, strict=True))

    def run(self):
        output = torch.full((len(self.q), HEADS * DIM), torch.nan)
        inputs = (self.q, self.k, self.v, self.cache, self.metadata, output)
        assert self.impl.forward(self.layer, *inputs) is output
        return output.view(-1, HEADS, DIM)


@vllm
@pytest.mark.parametrize("page", [16, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 6},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"causal": False},
        {"logits_soft_cap": 0.8},
        {"logits_soft_cap": 0.8, "sliding_window": 6},
    ],
    ids=["plain", "window", "sinks", "not causal", "cap", "cap, window"],
)
def test_vllm(module, page, options):
    batch = Vllm(module, page, COUNTS, PREFIXES, **options)
    sinks, causal = options.get("sinks"), options.get("causal", True)
    cap = options.get("logits_soft_cap", 0)
    wanted = expected(batch.drawn, options.get("sliding_window"), sinks, causal, cap)
    torch.testing.assert_close(batch.run(), wanted, rtol=1e-5, atol=1e-5)


@vllm
def test_vllm_decodes_with_padding(module):
    """One call; a padded request has no keys, and its row holds what was there."""
    batch = Vllm(module, 16, [1, 1, 1], [20, 7, 1], pad=2)
    assert batch.metadata.batch.decodes == 3
    out = batch.run()
    torch.testing.assert_close(out[:3], expected(batch.drawn), rtol=1e-5, atol=1e-5)
    assert out[3:].isnan().all()


@vllm
def test_vllm_without_metadata_and_with_a_shared_cache(module):
    batch = Vllm(module, 16, [1, 1], [20, 7])
    written = batch.run()
    shared = Vllm(module, 16, [1, 1], [20, 7], kv_sharing_target_layer_name="layer.0")
    shared.cache = batch.cache
    shared.k = shared.v = torch.full_like(shared.k, torch.nan)
    assert shared.run().equal(written)
    batch.metadata = None
    assert batch.run().eq(0).all()


@vllm
def test_vllm_interface(module):
    backend = module.SparseFmhaBackend
    matches(backend, stubs.VllmBackend)
    matches(backend.get_builder_cls(), stubs.VllmBuilder)
    matches(backend.get_impl_cls(), stubs.VllmImpl, extra=("sinks",))
    module.register()
    path = stubs.OVERRIDES[stubs.AttentionBackendEnum.CUSTOM]
    assert path == "sparse_fmha.integrations.vllm.SparseFmhaBackend"
    assert backend.get_name() == "CUSTOM"
    assert backend.supports_head_size(80)
    assert not backend.supports_head_size(81)
    assert not backend.supports_head_size(264)
    assert backend.supports_compute_capability(None)
    assert not backend.supports_compute_capability(SimpleNamespace(major=7, minor=0))
    layered = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    assert sorted(layered) == list(range(6))
    assert layered[0] != 0


@vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alibi_slopes": [1.0]}, "alibi_slopes"),
        ({"attn_type": stubs.AttentionType.ENCODER_ONLY}, "attention of type"),
        ({"kv_cache_dtype": "fp8"}, "caches of fp8"),
    ],
)
def test_vllm_refuses(module, options, message):
    with pytest.raises(NotImplementedError, match=f"sparse_fmha does not support {message}"):
        module.SparseFmhaImpl(HEADS, DIM, SCALE, HEADS_KV, **options)


class Pool:
    def __init__(self, tokens):
        self.k, self.v = torch.full((2, tokens, HEADS_KV, DIM), torch.nan)

    def set_kv_buffer(self, layer, loc, k, v):
        self.k[loc], self.v[loc] = k.view(-1, HEADS_KV, DIM), v.view(-1, HEADS_KV, DIM)

    def get_key_buffer(self, layer_id):
        return self.k

    def get_value_buffer(self, layer_id):
        return self.v


class Sglang:
    """A runner, a layer and a batch as SGLang hands them over."""

    def __init__(self, module, page, counts, prefixes, window=-1):
        self.drawn = requests(counts, prefixes)
        lengths = [a + b for a, b in zip(counts, prefixes, strict=True)]
        table, pages = paged(lengths, page)
        pool = Pool(pages * page + 1)
        req_to_token = torch.zeros(9, 128, dtype=torch.int32)
        slots = torch.tensor([5, 2, 8, 0, 3][: len(counts)])
        new = []
        for b, (_, k, v) in enumerate(self.drawn):
            rows = rows_of(table, page, b, torch.arange(lengths[b]))
            req_to_token[slots[b], : lengths[b]] = rows.int()
            pool.set_kv_buffer(None, rows[: prefixes[b]], k[: prefixes[b]], v[: prefixes[b]])
            new.append(rows[prefixes[b] :])
        tokens = SimpleNamespace(req_to_token=req_to_token)
        self.backend = module.SparseFmhaAttnBackend(
            SimpleNamespace(page_size=page, req_to_token_pool=tokens)
        )
        decodes = max(counts) == 1
        self.batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: decodes),
            req_pool_indices=slots, seq_lens=torch.tensor(lengths), spec_info=None,
            seq_lens_cpu=torch.tensor(lengths), extend_seq_lens_cpu=counts,
            out_cache_loc=torch.cat(new), token_to_kv_pool=pool,
        )  # fmt: skip
        self.layer = SimpleNamespace(
            layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=HEADS_KV, qk_head_dim=DIM,
            v_head_dim=DIM, scaling=SCALE, sliding_window_size=window, logit_cap=0.0,
            is_cross_attention=False, attn_type=stubs.AttentionType.DECODER,
        )  # fmt: skip
        self.q = torch.cat([q for q, *_ in self.drawn]).flatten(1)
        last = [[x[len(x) - len(q) :] for x in (k, v)] for q, k, v in self.drawn]
        self.k, self.v = (torch.cat(x) for x in zip(*last, strict=True))

    def run(self, **options):
        given = (self.q, self.k, self.v, self.layer, self.batch)
        return self.backend.forward(*given, **options).view(-1, HEADS, DIM)


@sglang
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 1, 9, 40]], ids=["decode", "extend"])
def test_sglang(module, page, window, counts):
    batch = Sglang(module, page, counts, PREFIXES, window)
    batch.backend.init_forward_metadata(batch.batch)
    wanted = expected(batch.drawn, None if window < 0 else window + 1)
    torch.testing.assert_close(batch.run(), wanted, rtol=1e-5, atol=1e-5)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    with_sinks = expected(batch.drawn, None if window < 0 else window + 1, sinks)
    found = batch.run(save_kv_cache=False, sinks=sinks)
    torch.testing.assert_close(found, with_sinks, rtol=1e-5, atol=1e-5)
    batch.layer.logit_cap = 0.8
    with_cap = expected(batch.drawn, None if window < 0 else window + 1, softcap=0.8)
    torch.testing.assert_close(batch.run(save_kv_cache=False), with_cap, rtol=1e-5, atol=1e-5)


@sglang
def test_sglang_buffers_of_graphs(module):
    """A replay changes the tensors that the capture has seen, and no others."""
    batch = Sglang(module, 16, [1, 1, 1], [20, 7, 1])
    backend, given = batch.backend, batch.batch
    backend.init_cuda_graph_state(5, 5)
    zeros, mode = torch.zeros(4, dtype=torch.int64), given.forward_mode
    fill = torch.full((4,), backend.get_cuda_graph_seq_len_fill_value())
    backend.init_forward_metadata_capture_cuda_graph(4, 4, zeros, fill, None, mode, None)
    captured = backend.batch
    slots = torch.nn.functional.pad(given.req_pool_indices, (0, 1))
    lens = torch.nn.functional.pad(given.seq_lens, (0, 1))
    backend.init_forward_metadata_replay_cuda_graph(
        4, slots, lens, int(lens.sum()), None, mode, None, None
    )
    for a, b in ((captured.page_table, backend.batch.page_table), (captured[1], backend.batch[1])):
        assert a.data_ptr() == b.data_ptr()
    backend.batch = captured
    batch.q = torch.nn.functional.pad(batch.q, (0, 0, 0, 1))
    out = batch.run()
    torch.testing.assert_close(out[:3], expected(batch.drawn), rtol=1e-5, atol=1e-5)
    assert out[3].eq(0).all()


@sglang
def test_sglang_interface(module):
    matches(module.SparseFmhaAttnBackend, stubs.SglangBackend, extra=("kwargs",))
    module.register()
    assert stubs.REGISTERED["sparse_fmha"] is module.SparseFmhaAttnBackend
    assert stubs.CHOICES[-1] == "sparse_fmha"


@sglang
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"logit_cap": 9.0, "logit_capping_method": "x"}, {}, "logit_capping_method x"),
        ({"is_cross_attention": True}, {}, "attention of type"),
        ({"v_head_dim": 8}, {}, "values of 8 channels beside 16"),
        ({}, {"q_rope": torch.zeros(1)}, "q_rope"),
    ],
)
def test_sglang_refuses(module, changes, options, message):
    batch = Sglang(module, 16, [1], [4])
    batch.backend.init_forward_metadata(batch.batch)
    vars(batch.layer).update(changes)
    with pytest.raises(NotImplementedError, match=f"sparse_fmha does not support {message}"):
        batch.run(**options)
    batch.batch.spec_info = object()
    with pytest.raises(NotImplementedError, match="does not support speculative decoding"):
        batch.backend.init_forward_metadata(batch.batch)


@pytest.mark.parametrize(("name", "package"), [("vllm", "a vLLM with"), ("sglang", "SGLang with")])
def test_without_the_package(name, package):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ImportError, match=f"sparse_fmha.integrations.{name} needs {package}"):
        importlib.import_module(f"sparse_fmha.integrations.{name}")
