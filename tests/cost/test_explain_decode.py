"""What explain() says of decode calls: the kernel, the bytes that are read, the parts."""

import decode_cases
import decode_oracle
import pytest
import torch

import sparse_fmha
from sparse_fmha import decode_attention, explain

pytest.importorskip("sparse_fmha._C")


def read_bytes(call):
    """Keys and values of the rows that some query sees, and q and out."""
    q = call["q"]
    rows = len(set(decode_oracle.seen_rows(call))) + q.shape[:-1].numel()
    return 2 * rows * q.shape[-1] * q.element_size()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("len_q", [1, 3])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("form", [x for x in decode_cases.FORMS if x != "tokens by query"])
def test_bytes(form, page, len_q, window):
    for seed in range(4):
        options = {"bad": False, "by_head": seed % 2 == 1}
        call = decode_cases.draw(seed, form, page, len_q, window=window, **options)
        assert explain(decode_attention, **call).read_bytes == read_bytes(call)


@pytest.mark.parametrize("form", decode_cases.FORMS)
def test_entries_out_of_range_are_not_counted(form):
    for seed in range(4):
        call = decode_cases.draw(seed, form, None, 1)
        assert explain(decode_attention, **call).read_bytes == read_bytes(call)


def test_a_list_for_each_query_is_read_for_each():
    call = decode_cases.draw(0, rows=50, len_q=2, lengths=[50, 50, 50, 50])
    entries = decode_cases.int32([[3, 7, 9], [7, 1, -1]])[None, :, None].expand(4, 2, 2, 3)
    found = explain(decode_attention, **call, tokens=(entries, None))
    q = call["q"]
    assert found.read_bytes == 2 * (4 * 2 * 5 + q.shape[:-1].numel()) * 16 * 4


def cache(lengths, rows=5000, heads=(8, 2), dtype=torch.bfloat16, device="cpu", len_q=1):
    q = torch.empty(len(lengths), len_q, heads[0], 128, dtype=dtype, device=device)
    k = torch.empty(len(lengths), rows, heads[1], 128, dtype=dtype, device=device)
    return q, k, k, torch.tensor(lengths, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, 2 * (5 + 1)),
        ({"split_tokens": 512}, 2 * (10 + 2)),
        ({"split_tokens": 512, "window": 600}, 2 * (2 + 2)),
    ],
)
def test_parts(options, parts):
    found = explain(decode_attention, *cache([5000, 700, 0]), **options)
    assert found.parts == parts
    assert found.predicted_ms is None
    assert found.kernel == "cpu_decode_bfloat16"
    assert f"in {parts} parts" in str(found)


def test_parts_on_a_gpu():
    split = {"arch": "sm90", "split_tokens": 64}
    assert explain(decode_attention, *cache([5000, 700]), **split).parts == 2 * (79 + 11)
    many = {"rows": 140000}  # a request may have so many keys that parts are planned
    assert explain(decode_attention, *cache([5000, 700], **many), arch="sm90").parts == 180
    assert explain(decode_attention, *cache([100, 0], **many), arch="sm90").parts == 4
    # Few rows: 2 requests of 2 heads, and the most blocks that share one.
    assert explain(decode_attention, *cache([5000, 700]), arch="sm90").parts == 4 * 8
    # 40 tokens of 4 heads are three groups of rows.
    assert explain(decode_attention, *cache([60], len_q=40), arch="sm90").parts == 2 * 3


def test_time_on_a_gpu():
    q, k, v, lens = cache([4096], 4096)
    blocks = decode_cases.int32([[[0, 5, 63]]]), decode_cases.int32([[3]]), 64
    found = explain(decode_attention, q, k, v, lens, blocks=blocks, arch="sm90")
    size, dense = ((2 * tokens * 2 + 2 * 8) * 128 * 2 for tokens in (192, 4096))
    assert found.read_bytes == size
    assert found.predicted_ms == pytest.approx(size / 4.361e9)
    assert found.dense_ms == pytest.approx(dense / 4.361e9)
    assert found.speedup == pytest.approx(dense / size)
    assert "us on an H200, at the rate of a read-only stream; all keys: " in str(found)
    assert "predicted on an H100" not in str(found)
    if sparse_fmha.build_info()["archs"]:
        few, any_call = "sm90_decode_dense_bfloat16_d128_q16", "sm90_decode_dense_bfloat16_d128"
        assert found.kernel == few
        assert found.rejected[any_call] == "is for more rows"
        found = explain(decode_attention, q, k, v, lens, split_tokens=512, arch="sm90")
        assert found.kernel == any_call
        assert found.rejected[few] == "is for few rows"
    else:
        assert found.why == "this build has no decode kernel for sm90: the call raises"


def test_on_meta_caches_and_lists_are_full():
    given = cache([1, 1], 640, device="meta")
    lists = torch.empty(2, 1, 3, dtype=torch.int32, device="meta")
    blocks = lists, lists[..., 0], 64
    full = explain(decode_attention, *given, arch="sm90")
    some = explain(decode_attention, *given, blocks=blocks, arch="sm90")
    own = 2 * 8
    assert full.read_bytes == (2 * 2 * 640 + own) * 2 * 128 * 2
    assert some.read_bytes == (2 * 2 * 3 * 64 + own) * 2 * 128 * 2
    assert "lengths and lists count as full" in str(full)


def test_skipping_takes_rows_that_do():
    found = explain(decode_attention, *cache([100]), skip_threshold=0.1)
    assert found.kernel == "cpu_decode_bfloat16_skip"
    assert "what skipping key tiles saves is not in the time" in str(found)


@pytest.mark.parametrize("arch", ["cpu", "sm80", "sm90"])
@pytest.mark.parametrize("skip_threshold", [0.0, 0.1])
def test_a_cap_takes_the_kernel_of_other_calls(arch, skip_threshold):
    options = {"arch": arch, "skip_threshold": skip_threshold}
    found = explain(decode_attention, *cache([100]), softcap=50.0, **options)
    assert found == explain(decode_attention, *cache([100]), **options)
    assert found.kernel or arch not in ("cpu", *sparse_fmha.build_info()["archs"])


def test_a_gradient_has_no_kernel():
    q, *rest = cache([100])
    assert "no kernel for dq or dk and dv" in str(
        explain(decode_attention, q.requires_grad_(), *rest)
    )


def test_errors():
    q, k, v, lens = cache([100])
    with pytest.raises(TypeError, match="seq_lens must have dtype"):
        explain(decode_attention, q, k, v, lens.long())
    with pytest.raises(ValueError, match="softcap must be at least 0, got -1"):
        explain(decode_attention, q, k, v, lens, softcap=-1.0)
    with pytest.raises(ValueError, match="split_tokens must be a multiple of 64, got 100"):
        explain(decode_attention, q, k, v, lens, split_tokens=100)
    with pytest.raises(ValueError, match="stripe_attention or decode_attention"):
        explain(torch.add, q, k)
