"""The cases that `python -m benchmarks` measures.

A name says what is computed: fmha/d128/causal/8k. Lengths are tokens in units of 1024. On a grid it
ends with the stride instead: na/hunyuan/s16x8x8; of block lists with the percentage of the blocks
that are listed: bs/128x128/25; of softmax skipping with that of the tiles: skip/full-32k/50.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

from benchmarks.cases.block_lists import Lists
from benchmarks.cases.case import Case

TOKENS = 32 * 1024  # batch x length of a GPU case on sequences
DENSE_FLOPS = 5 * 10**14  # what each dense kernel may spend beside a sparse case: 0.7 s
DENSE_MOST = 4 * 10**15  # of one call; there is none where it would take longer


def _gpu(label: str, head_dim: int, heads_q: int, heads_kv: int, causal: bool, kilo: int, **more):
    name = f"fmha/{label}/{'causal' if causal else 'full'}/{kilo}k"
    length = kilo * 1024
    fields = {"dtype": "bfloat16", "quick": kilo == 8} | more
    return Case(
        name=name, device="cuda", batch=TOKENS // length, length=length, heads_q=heads_q,
        heads_kv=heads_kv, head_dim=head_dim, causal=causal, **fields,
    )  # fmt: skip


def _cpu(label: str, length: int, causal: bool = False, **more):
    suffix = f"{length // 1024}k" if length >= 1024 else str(length)
    name = f"cpu/{label}/{'causal' if causal else 'full'}/{suffix}"
    fields = {"dtype": "float32", "batch": 1, "heads_q": 2, "heads_kv": 2, "head_dim": 64} | more
    return Case(name=name, device="cpu", length=length, causal=causal, **fields)


def _grid(device: str, name: str, grid: tuple[int, ...], window: tuple[int, ...], **more):
    """A neighborhood case; the causal flag, like the others, is of each axis."""
    one = (1,) * len(grid)
    fields = {"stride": one, "dilation": one, "causal": (False,) * len(grid), "batch": 1} | more
    length = math.prod(grid)
    return Case(name, device, length=length, grid=grid, window=window, **fields)


def _neighborhood_cpu(side: int, window: int):
    return _grid(
        "cpu", f"cpu/na2d-w{window}/full/{side}x{side}", (side, side), (window, window),
        dtype="float32", heads_q=2, heads_kv=2, head_dim=64,
    )  # fmt: skip


def _na(
    label: str, grid: tuple[int, ...], heads: int, window: tuple[int, ...],
    stride: tuple[int, ...] | None = None, head_dim: int = 128, **more,
):  # fmt: skip
    stride = stride or (1,) * len(grid)
    shown = "1" if set(stride) == {1} else "x".join(map(str, stride))
    dense_flops = 4 * heads * head_dim * math.prod(grid) ** 2
    return _grid(
        "cuda", f"na/{label}/s{shown}", grid, window, stride=stride, dtype="bfloat16",
        heads_q=heads, heads_kv=heads, head_dim=head_dim,
        dense_iterations=_dense_iterations(dense_flops), **more,
    )  # fmt: skip


def _dense_iterations(flops: int) -> int:
    return 0 if flops > DENSE_MOST else min(max(DENSE_FLOPS // flops, 3), 20)


def _neighborhoods() -> list[Case]:
    """The models that published figures are for, and a few that stand for the rest."""
    flux, hunyuan, cosmos, wan = (256, 256), (30, 48, 80), (16, 44, 80), (18, 48, 80)
    text = (32 * 1024,)
    return [
        _na("flux", flux, 24, (80, 80), quick=True),
        _na("flux", flux, 24, (80, 80), (16, 16)),
        _na("flux-d64", flux, 24, (80, 80), head_dim=64),
        _na("flux-d256", flux, 12, (80, 80), head_dim=256),
        _na("hunyuan", hunyuan, 24, (18, 24, 24)),
        _na("hunyuan", hunyuan, 24, (18, 24, 24), (16, 8, 8), quick=True),
        _na("cosmos", cosmos, 32, (16, 24, 16)),
        _na("cosmos", cosmos, 32, (16, 32, 48), (1, 8, 16)),
        *(_na("1d", text, 16, (2048,), (stride,)) for stride in (1, 256, 2048)),
        _na("1d-causal", text, 16, (4096,), causal=(True,)),
        _na("2d-dilated", (128, 128), 16, (32, 32), dilation=(4, 4)),
        # Stages of LTX-2.5's decoder, 121 frames of 512x768 pixels.
        _na("ltx-3x7x7", (18, 32, 48), 16, (3, 7, 7), head_dim=64),
        _na("ltx-3x5x5", (61, 64, 96), 8, (3, 5, 5), head_dim=64),
        _na("ltx-11x11x11", (121, 128, 192), 4, (11, 11, 11), head_dim=64),
        # Sliding tile attention of 3x3x3 tiles of 6x8x8 tokens, on the grid its kernel knows.
        _na("wan", wan, 24, (18, 24, 24), (6, 8, 8)),
    ]


def _bs(label: str, lists: Lists, head_dim: int = 128, **more):
    length, heads = 32 * 1024, 24
    dense_flops = 4 * heads * head_dim * length**2
    return Case(
        f"bs/{label}/{round(100 * lists.density)}", "cuda", "bfloat16", 1, length, heads, heads,
        head_dim, lists=lists, dense_iterations=min(max(DENSE_FLOPS // dense_flops, 3), 20), **more,
    )  # fmt: skip


def _block_lists() -> list[Case]:
    """Random lists of each head by block and density, and the kinds that differ."""
    cases = []
    for block_q, block_kv in ((128, 128), (64, 64), (128, 16)):
        for density in (0.5, 0.25, 0.1, 0.05):
            lists = Lists(block_q, block_kv, density)
            cases.append(_bs(f"{block_q}x{block_kv}", lists, quick=density == 0.25))
    cases += [_bs(kind, Lists(128, 128, 0.1, kind)) for kind in ("uniform", "heavy")]
    cases += [_bs("64x64-similar", Lists(64, 64, 0.1, "similar"))]
    cases += [_bs("partial", Lists(128, 128, 0.25, "partial"))]
    cases += [_bs("d64", Lists(128, 128, 0.25), head_dim=64)]
    # All of the heads, also of the dense kernel beside it: 0.4 s.
    select = Lists(128, 128, 0.1, "selected")
    cases += [
        Case("select/128k", "cuda", "bfloat16", 1, 128 * 1024, 32, 32, 128, lists=select,
             dense_iterations=3),
    ]  # fmt: skip
    return cases


def _skips() -> list[Case]:
    """Prefill of 64k tokens and full attention of 32k, by the share of tiles that is skipped."""
    kinds = (("causal", 64, 64, 4), ("full", 32, 24, 24))
    return [
        Case(
            f"skip/{kind}-{kilo}k/{percent}", "cuda", "bfloat16", 1, kilo * 1024, heads, heads_kv,
            128, causal=kind == "causal", skip=percent, dense_iterations=3, quick=percent == 50,
        )
        for kind, kilo, heads, heads_kv in kinds
        for percent in (10, 50, 75, 90)
    ]  # fmt: skip


def _block_lists_cpu(density: float, kind: str = "random"):
    label = "bs" if kind == "random" else f"bs-{kind}"
    return Case(
        f"cpu/{label}/128x128/{round(100 * density)}", "cpu", "float32", 1, 4096, 2, 2, 64,
        lists=Lists(128, 128, density, kind), dense_iterations=20,
    )  # fmt: skip


def _all() -> list[Case]:
    lengths = (4, 8, 16, 32)
    cases = []
    for head_dim, heads in ((128, 16), (64, 32), (256, 8)):
        for causal in (False, True):
            cases += [_gpu(f"d{head_dim}", head_dim, heads, heads, causal, n) for n in lengths]
    cases += [_gpu("d128", 128, 16, 16, False, 2)]  # the work of na/1d/s2048
    cases += [_gpu("d96", 96, 16, 16, False, n) for n in lengths]
    cases += [_gpu("d128-fp16", 128, 16, 16, False, 8, dtype="float16")]
    for causal in (False, True):  # the prefill of DeepSeek's models
        cases += [_gpu("d192-v128", 192, 16, 16, causal, n, value_dim=128) for n in (4, 16, 32)]
    cases += [_gpu("d128-gqa4", 128, 32, 8, True, 8)]
    cases += _neighborhoods()
    cases += _block_lists()
    cases += _skips()
    cases += [_cpu("d64", 256, quick=True), _cpu("d64", 1024, causal=True, quick=True)]
    cases += [_cpu("d64", 1024), _cpu("d64", 4096), _cpu("d64", 4096, causal=True)]
    cases += [_cpu("d64-bf16", 1024, dtype="bfloat16")]
    cases += [_neighborhood_cpu(64, 8), _neighborhood_cpu(64, 16), _neighborhood_cpu(64, 32)]
    cases += [_block_lists_cpu(density) for density in (0.5, 0.25, 0.1)]
    cases += [_block_lists_cpu(0.25, "partial"), _block_lists_cpu(0.1, "selected")]
    return cases


CASES = _all()


def select(device: str, globs: list[str], quick: bool) -> list[Case]:
    """The cases of a device whose name matches any glob. ValueError where a glob has none."""
    mine = [c for c in CASES if c.device == device]
    for glob in globs:
        if not any(fnmatchcase(c.name, glob) for c in mine):
            raise ValueError(
                f"--case {glob}: no {device} case has such a name; there are: "
                + ", ".join(c.name for c in mine)
            )
    if globs:
        return [c for c in mine if any(fnmatchcase(c.name, g) for g in globs)]
    return [c for c in mine if c.quick or not quick]
