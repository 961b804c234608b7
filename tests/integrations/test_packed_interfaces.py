"""The interfaces of torch's varlen and of flash_attn against SDPA of each sequence."""

import inspect

import bias_oracle
import pytest
import torch
from packed_cases import Packed, in_pages
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sparse_fmha.integrations.flash_attn import flash_attn_varlen_func
from sparse_fmha.integrations.torch_varlen import varlen_attn

varlen = pytest.importorskip("torch.nn.attention.varlen")

# As published with version 2 of flash_attn.
FLASH_ATTN = (
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None)"
)
CASE = Packed(lengths=((70, 90, 80), (33, 200, 10), (20, 5, 5), (0, 4, 4)))
PLACES = ("q", "k", "v", "cu_q", "cu_k", "max_q", "max_k")
WINDOWS = [(-1, -1), (-1, 0), (9, 0), (9, 7), (0, -1), (-1, 3), (0, 0)]


def positional(given):
    return [given[x] for x in PLACES]


def by_sdpa(given, lengths, window, scale=None, gap=(0, 0)):
    """Every sequence by torch's own attention, with a window and without the keys of a gap."""
    outs = []
    for b, used in enumerate(lengths):
        rows, keys = (slice(*given[x][b : b + 2].tolist()) for x in ("cu_q", "cu_k"))
        q = given["q"][rows].transpose(0, 1)
        k, v = (given[x][keys][:used].transpose(0, 1) for x in "kv")
        apart = torch.arange(used) - torch.arange(q.shape[1])[:, None] - (used - q.shape[1])
        mask = torch.ones_like(apart, dtype=torch.bool)
        if window[0] >= 0:
            mask &= apart >= -window[0]
        if window[1] >= 0:
            mask &= apart <= window[1]
        mask[:, slice(*gap)] = False
        out = sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outs.append(out.masked_fill(~mask.any(-1)[:, None], 0).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_torch_varlen(window):
    given, _ = CASE.arguments(torch.float64)
    lengths = [x[1] for x in CASE.lengths]
    inputs = [given[x].requires_grad_() for x in "qkv"]
    options = {"window_size": window, "enable_gqa": True, "scale": 0.2}
    out, lse = varlen_attn(*positional(given), return_aux=varlen.AuxRequest(lse=True), **options)
    expected = by_sdpa(given, lengths, window, 0.2)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (CASE.heads, len(out))
    assert lse.dtype == torch.float32
    dout = torch.randn_like(out)
    sees = lse.mT != -torch.inf  # torch has NaN for the others
    found, wanted = (
        torch.autograd.grad(x, inputs, dout * sees[..., None], retain_graph=True)
        for x in (out, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn(window, causal):
    given, _ = CASE.arguments()
    lengths = [x[1] for x in CASE.lengths]
    out, lse, probs = flash_attn_varlen_func(
        *positional(given), causal=causal, window_size=window, return_attn_probs=True
    )
    expected = by_sdpa(given, lengths, (window[0], 0) if causal else window)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (CASE.heads, len(out))
    assert probs.shape == (0,)


def test_keys_in_use_and_pages():
    given, _ = CASE.arguments()
    lengths = [x[2] for x in CASE.lengths]
    used = torch.tensor(lengths, dtype=torch.int32)
    for window in ((-1, 0), (9, 4)):
        out = varlen_attn(*positional(given), seqused_k=used, window_size=window, enable_gqa=True)
        torch.testing.assert_close(out, by_sdpa(given, lengths, window))
    paged = in_pages({**given, "seqused_k": used}, 16)
    rest = {"seqused_k": used, "block_table": paged["page_table"], "enable_gqa": True}
    for window in ((-1, 0), (9, 4), (9, 0), (0, -1)):
        out = varlen_attn(*positional(paged), window_size=window, **rest)
        torch.testing.assert_close(out, by_sdpa(given, lengths, window))
    whole = in_pages(given, 16)
    whole["cu_k"] = given["cu_k"]
    out = flash_attn_varlen_func(*positional(whole), block_table=whole["page_table"])
    torch.testing.assert_close(out, by_sdpa(given, [x[1] for x in CASE.lengths], (-1, -1)))


@pytest.mark.parametrize("window", [(20, 3), (70, 0), (5, -1), (-1, 8)])
def test_windows_reach_over_pages_that_do_not_exist(window):
    given, _ = CASE.arguments()
    paged = in_pages({**given, "seqused_k": None}, 16)
    paged["page_table"][:, 3] = -1
    rest = {"seqused_k": paged["seqused_k"], "block_table": paged["page_table"], "enable_gqa": True}
    out = varlen_attn(*positional(paged), window_size=window, **rest)
    lengths = [x[1] for x in CASE.lengths]
    torch.testing.assert_close(out, by_sdpa(given, lengths, window, gap=(48, 64)))


def test_signature_of_torch():
    own, theirs = (inspect.signature(f).parameters for f in (varlen_attn, varlen.varlen_attn))
    assert list(own) == list(theirs)
    for name, parameter in own.items():
        assert (parameter.kind, parameter.default) == (theirs[name].kind, theirs[name].default)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_capped_scores(window, paged):
    given, _ = CASE.arguments(torch.float64)
    lengths = [x[1] for x in CASE.lengths]
    expected = []
    for b, used in enumerate(lengths):
        rows, keys = (slice(*given[x][b : b + 2].tolist()) for x in ("cu_q", "cu_k"))
        q, k, v = given["q"][rows], given["k"][keys][:used], given["v"][keys][:used]
        apart = torch.arange(used) - torch.arange(len(q))[:, None] - (used - len(q))
        mask = (apart >= -window[0]) | torch.tensor(window[0] < 0)
        mask = mask & ((apart <= window[1]) | torch.tensor(window[1] < 0))
        expected.append(bias_oracle.attend(q[None], k[None], v[None], mask, softcap=1.5)[0][0])
    options = {"window_size": window, "softcap": 1.5}
    if paged:
        given = in_pages(given, 16) | {"cu_k": given["cu_k"]}
        options["block_table"] = given["page_table"]
    found = flash_attn_varlen_func(*positional(given), **options)
    torch.testing.assert_close(found, torch.cat(expected))


def test_signature_of_flash_attn():
    signature = inspect.signature(flash_attn_varlen_func)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == FLASH_ATTN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
        ({"softcap": -30.0}, "softcap must be at least 0, got -30.0"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes must be None, got Tensor"),
        ({"window_size": (-2, 3)}, "window_size must be at least -1, got -2"),
        ({"window_size": (3,)}, r"window_size must be \(left, right\), got \(3,\)"),
    ],
)
def test_what_flash_attn_has_and_this_has_not(options, message):
    given, _ = CASE.arguments()
    with pytest.raises(ValueError, match=f"^{message}"):
        flash_attn_varlen_func(*positional(given), **options)


def test_what_torch_has_and_this_has_not():
    given, _ = CASE.arguments()
    with pytest.raises(ValueError, match=r"^num_splits must be None, got 1"):
        varlen_attn(*positional(given), enable_gqa=True, num_splits=1)
    with pytest.raises(ValueError, match=r"^key must have the 4 heads of query unless"):
        varlen_attn(*positional(given))
