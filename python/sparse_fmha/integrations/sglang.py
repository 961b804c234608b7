"""An attention backend for SGLang, on `decode_attention`.

    from sparse_fmha.integrations import sglang
    sglang.register()

in the process that starts the server, and then `--attention-backend sparse_fmha`.

Written against SGLang's published interface, and tested against stubs with its signatures only: no
run in SGLang itself has been made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_fmha.integrations import _serving

try:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.server_args import add_attention_backend_choices
except ImportError as error:
    raise ImportError(f"{__name__} needs SGLang with its attention registry: {error}") from error

__all__ = ["SparseFmhaAttnBackend", "register"]

NAME = "sparse_fmha"


def register() -> None:
    """Makes the backend known to SGLang as `sparse_fmha`."""
    register_attention_backend(NAME)(SparseFmhaAttnBackend)
    add_attention_backend_choices([NAME])


class SparseFmhaAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Decode and extend over pages of any size from 1; CUDA graphs.

    Sliding windows, sinks and capped scores are served. Decode is one call, and so is an extension.
    Speculative decoding, encoders and cross attention raise NotImplementedError.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.page = int(model_runner.page_size)
        self.req_to_token: Tensor = model_runner.req_to_token_pool.req_to_token
        self.batch: _serving.Batch | None = None
        self.graph_table: Tensor | None = None
        self.graph_lens: Tensor | None = None

    def _table(self, req_pool_indices: Tensor, tokens: int | None = None) -> Tensor:
        """The pages of requests, from the rows of their first so many tokens."""
        first = self.req_to_token[:, : tokens : self.page]
        return (first[req_pool_indices] // self.page).to(torch.int32)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if forward_batch.spec_info is not None:
            raise NotImplementedError("sparse_fmha does not support speculative decoding")
        lens = forward_batch.seq_lens.to(torch.int32)
        on_host = forward_batch.seq_lens_cpu
        longest = int(max(on_host)) if on_host is not None and len(on_host) else None
        table = self._table(forward_batch.req_pool_indices, longest)
        if forward_batch.forward_mode.is_decode():
            self.batch = _serving.Batch(table, lens, len(lens))
        else:
            counts = [int(n) for n in forward_batch.extend_seq_lens_cpu]
            starts = _serving.starts_of(counts, lens.device)
            room = table.shape[1] * self.page
            self.batch = _serving.Batch(table, lens, 0, counts, starts, longest or room)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        width = self.req_to_token[:, :: self.page].shape[1]
        device = self.req_to_token.device
        self.graph_table = torch.zeros(max_bs, width, dtype=torch.int32, device=device)
        self.graph_lens = torch.zeros(max_bs, dtype=torch.int32, device=device)

    def init_forward_metadata_capture_cuda_graph(
        self,
        bs: int,
        num_tokens: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None,
        forward_mode: Any,
        spec_info: Any,
    ) -> None:
        self._fill(bs, req_pool_indices, seq_lens, forward_mode, spec_info)

    def init_forward_metadata_replay_cuda_graph(
        self,
        bs: int,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_sum: int,
        encoder_lens: Tensor | None,
        forward_mode: Any,
        spec_info: Any,
        seq_lens_cpu: Tensor | None,
    ) -> None:
        self._fill(bs, req_pool_indices, seq_lens, forward_mode, spec_info)

    def _fill(
        self, bs: int, req_pool_indices: Tensor, seq_lens: Tensor, forward_mode: Any, spec_info: Any
    ) -> None:
        """Writes what changes between replays where the captured calls read it."""
        if spec_info is not None or not forward_mode.is_decode():
            raise NotImplementedError("sparse_fmha supports CUDA graphs of plain decoding only")
        if self.graph_table is None or self.graph_lens is None:
            raise RuntimeError("init_cuda_graph_state must be called first")
        table, lens = self.graph_table[:bs], self.graph_lens[:bs]
        table.copy_(self._table(req_pool_indices[:bs]))
        lens.copy_(seq_lens[:bs])
        self.batch = _serving.Batch(table, lens, bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 0

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = [name for name, value in kwargs.items() if value is not None]
        method = getattr(layer, "logit_capping_method", "tanh")
        if layer.logit_cap and method != "tanh":
            given.append(f"logit_capping_method {method}")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            given.append(f"attention of type {layer.attn_type}")
        if layer.qk_head_dim != layer.v_head_dim:
            given.append(f"values of {layer.v_head_dim} channels beside {layer.qk_head_dim}")
        if given:
            raise NotImplementedError(f"sparse_fmha does not support {', '.join(given)}")
        if self.batch is None:
            raise RuntimeError("init_forward_metadata must be called first")
        pool = forward_batch.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        buffers = (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id))
        k_pages, v_pages = (
            x[: len(x) // self.page * self.page].unflatten(0, (-1, self.page)) for x in buffers
        )
        size = layer.sliding_window_size  # keys before a query's own; -1: all
        window = None if size is None or size < 0 else size + 1
        sink = None if sinks is None else sinks.float()
        heads = _serving.Heads(layer.scaling, window, sink, float(layer.logit_cap or 0))
        rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.zeros_like(rows)
        _serving.attend(rows, k_pages, v_pages, self.batch, heads, True, out)
        return out.flatten(1)
