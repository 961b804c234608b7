"""What a type checker says of calls; mypy reads this file, and nothing runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from typing_extensions import assert_type

import sparse_fmha
from sparse_fmha import BlockGrid, BlockMask, SkipStats, StripeMask, patterns
from sparse_fmha.calibration import Calibration
from sparse_fmha.distributed import all_gather_kv, pass_kv, ulysses

Pair = tuple[Tensor, Tensor]
WithStats = tuple[Tensor, SkipStats]
All = tuple[Tensor, Tensor, SkipStats]
Output = Tensor | tuple[Tensor, Tensor | SkipStats] | All


def dense(q: Tensor, k: Tensor, v: Tensor, flag: bool) -> None:
    f = sparse_fmha.attention
    assert_type(f(q, k, v), Tensor)
    assert_type(f(q, k, v, causal=True, scale=1.0, skip_threshold=q), Tensor)
    assert_type(f(q, k, v, return_lse=False, return_stats=False), Tensor)
    assert_type(f(q, k, v, key_bias=q, sink=q, return_lse=True), Pair)
    assert_type(f(q, k, v, return_lse=True), Pair)
    assert_type(f(q, k, v, return_stats=True), WithStats)
    assert_type(f(q, k, v, return_lse=True, return_stats=True), All)
    assert_type(f(q, k, v, return_lse=flag), Output)


def neighborhood(q: Tensor, k: Tensor, v: Tensor, flag: bool) -> None:
    f = sparse_fmha.neighborhood_attention
    assert_type(f(q, k, v, 3), Tensor)
    assert_type(f(q, k, v, (3, 5), stride=(1, 2), causal=[True, False]), Tensor)
    assert_type(f(q, k, v, 3, extra_k=k, extra_v=v, skip_threshold=0.1), Tensor)
    assert_type(f(q, k, v, 3, return_lse=True), Pair)
    assert_type(f(q, k, v, 3, return_stats=True), WithStats)
    assert_type(f(q, k, v, 3, return_lse=True, return_stats=True), All)
    assert_type(f(q, k, v, 3, return_stats=flag), Output)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, flag: bool) -> None:
    f = sparse_fmha.block_sparse_attention
    assert_type(f(q, k, v, mask), Tensor)
    assert_type(f(q, k, v, mask, key_bias=q, row_threshold=q, sink=q), Tensor)
    assert_type(f(q, k, v, mask, return_lse=True), Pair)
    assert_type(f(q, k, v, mask, return_stats=True), WithStats)
    assert_type(f(q, k, v, mask, return_lse=True, return_stats=True), All)
    assert_type(f(q, k, v, mask, return_lse=flag, return_stats=flag), Output)


def decode(q: Tensor, lengths: Tensor, flag: bool) -> None:
    f = sparse_fmha.decode_attention
    assert_type(f(q, q, q, lengths), Tensor)
    assert_type(f(q, q, q, lengths, blocks=(lengths, lengths, 64), out=q), Tensor)
    assert_type(f(q, q, q, lengths, tokens=(lengths, None), return_lse=True), Pair)
    assert_type(f(q, q, q, lengths, page_table=lengths, return_stats=True), WithStats)
    assert_type(f(q, q, q, lengths, return_lse=True, return_stats=True), All)
    assert_type(f(q, q, q, lengths, return_lse=flag), Output)


def stripe(q: Tensor, k: Tensor, v: Tensor, mask: StripeMask, flag: bool) -> None:
    f = sparse_fmha.stripe_attention
    assert_type(f(q, k, v, mask), Tensor)
    assert_type(f(q, k, v, mask, return_lse=True), Pair)
    assert_type(f(q, k, v, mask, return_stats=True), WithStats)
    assert_type(f(q, k, v, mask, return_lse=True, return_stats=True), All)
    assert_type(f(q, k, v, mask, return_lse=flag), Output)


def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, flag: bool) -> None:
    f = sparse_fmha.varlen_attention
    assert_type(f(q, k, v, cu, cu, 9, 9), Tensor)
    assert_type(f(q, k, v, cu, None, 9, 9, seqused_k=cu, page_table=cu, out=q), Tensor)
    assert_type(f(q, k, v, cu, cu, 9, 9, return_lse=True), Pair)
    assert_type(f(q, k, v, cu, cu, 9, 9, return_lse=flag), Tensor | Pair)
    g = sparse_fmha.varlen_neighborhood_attention
    assert_type(g(q, k, v, [(3, 4), (5,)], 3), Tensor)
    assert_type(g(q, k, v, [(3, 4), (5, 6)], [(3, 3), (1, 2)], causal=(True, False)), Tensor)
    assert_type(g(q, k, v, [(3, 4)], 3, return_lse=True), Pair)
    assert_type(g(q, k, v, [(3, 4)], 3, return_lse=flag), Tensor | Pair)


def sequence_parallel(
    q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor, Tensor], BlockMask], flag: bool
) -> None:
    assert_type(ulysses(q, k, v, mask=mask), Tensor)
    assert_type(ulysses(q, k, v, causal=True, return_lse=True), Pair)
    assert_type(ulysses(q, k, v, return_lse=flag), Tensor | Pair)
    assert_type(all_gather_kv(q, k, v, mask=mask), Tensor)
    assert_type(all_gather_kv(q, k, v, causal=True, return_lse=True), Pair)
    assert_type(all_gather_kv(q, k, v, return_lse=flag), Tensor | Pair)
    assert_type(pass_kv(q, k, v, key_bias=q, sink=q, skip_threshold=0.5), Tensor)
    assert_type(pass_kv(q, k, v, causal=True, return_lse=True), Pair)
    assert_type(pass_kv(q, k, v, return_lse=flag), Tensor | Pair)


def heads_with_methods(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, flag: bool) -> None:
    methods: list[tuple[Sequence[int], patterns.HeadMethod]] = [
        (range(3), mask),
        ([3], patterns.vertical_slash),
    ]
    assert_type(patterns.per_head_attention(q, k, v, methods), Tensor)
    assert_type(patterns.per_head_attention(q, k, v, methods, return_lse=True), Pair)
    assert_type(patterns.per_head_attention(q, k, v, methods, return_lse=flag), Tensor | Pair)
    assert_type(patterns.join_heads([(range(4), mask)], 4), BlockMask | StripeMask)
    assert_type(patterns.ssa_streams(q, k, v, mask).alignment, Tensor)
    assert_type(sparse_fmha.score_sums(q, k, reduce="blocks_max"), Tensor)


def others(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    assert_type(sparse_fmha.sdpa(q, k, v, is_causal=True), Tensor)
    assert_type(sparse_fmha.merge([q, k], [q, k]), Pair)
    assert_type(mask.to("cuda"), BlockMask)
    assert_type(mask | mask, BlockMask)
    assert_type(BlockGrid.of(q, k).local(64), Tensor)
    assert_type(patterns.anchor_attention(q, k, v).out, Tensor)
    assert_type(patterns.rectified(q, k).mask, BlockMask)
    assert_type(patterns.psa_attention(q, k, v, patterns.psa_levels(q, k, {1: 0.1})), Tensor)
    assert_type(patterns.pka_attention(q, k, v, (4, 4), spatial=[(k, v)], window=3), Tensor)
    assert_type(patterns.nabla(q, k, patterns.CubeOrder((8, 8), (8, 8)).to("cuda")), BlockMask)
    assert_type(Calibration.load("points.json"), Calibration)
    assert_type(sparse_fmha.build_info()["archs"], list[str])
    assert_type(sparse_fmha.kernels()[0]["head_dim"], int)
    with sparse_fmha.route_sdpa() as routes:
        assert_type(routes, sparse_fmha.route_sdpa)
