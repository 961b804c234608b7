"""Capped scores on the emulator, whose tanh has the largest error that PTX allows."""

import pytest
import torch
from bias_cases import FORMS, biased
from gradient_cases import CASES, Case, block_lists, plain, stripe_lists, window
from softcap_cases import CAPS, check
from threshold_cases import limited

import sparse_fmha

BF16 = torch.bfloat16
TILES = {
    "dense": Case("fmha", (201,), kv=(170,), heads=4, heads_kv=2),
    "causal": Case("fmha", (201,), plain(causal=True), kv=(170,)),
    "1-D": Case("neighborhood", (291,), window((65,), 3), extra=70),
    "2-D, a negative scale": Case("neighborhood", (13, 17), window((9, 14), (1, 2)), scale=-0.2),
    "blocks 64x64, causal": Case(
        "block_sparse", (200,), block_lists(200, 200, 64, 64, 2, causal=True)
    ),
    "stripes": Case("stripe", (200,), stripe_lists(200, 300, 128), kv=(300,)),
}


@pytest.fixture(autouse=True)
def on_hopper():
    with sparse_fmha.arch_override("sm90"):
        yield


@pytest.mark.parametrize("biased_too", [False, True], ids=["", "key_bias"])
@pytest.mark.parametrize("name", TILES)
def test_several_tiles(name, biased_too):
    """Block lists at the head dim whose rows the default build has."""
    place = list(TILES).index(name)
    case, dim = TILES[name], 128 if name.startswith("blocks") else 64
    arguments = case.arguments(BF16, dim=dim)
    if biased_too:
        case, arguments = biased(case, FORMS[place % 4], BF16, dim=dim)
    check(case, arguments | {"softcap": CAPS[(place + biased_too) % 3]})


def test_with_thresholds_of_rows():
    case, arguments = limited(CASES["blocks 64x16"], dtype=BF16, dim=128)
    check(case, arguments | {"softcap": 0.7})


def test_in_fp16():
    arguments = TILES["dense"].arguments(torch.float16, dim=64)
    for softcap in CAPS:
        check(TILES["dense"], arguments | {"softcap": softcap})


@pytest.mark.parametrize("options", [{"skip_threshold": 0.1}, {"arch": "sm80"}], ids=str)
def test_what_raises(options):
    q = torch.zeros(1, 64, 1, 64, dtype=BF16)
    arch = options.pop("arch", "sm90")
    with (
        sparse_fmha.arch_override(arch),
        pytest.raises(NotImplementedError, match=f"sparse_fmha: softcap runs .* arch={arch}"),
    ):
        sparse_fmha.attention(q, q, q, softcap=5.0, **options)
