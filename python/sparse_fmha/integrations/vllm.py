"""An attention backend for vLLM (v1), on `decode_attention`.

    from sparse_fmha.integrations import vllm
    vllm.register()

and then `attention_backend="CUSTOM"`. In a plug-in of vLLM's, call `register` in its entry point,
so that worker processes have it, too.

Written against vLLM's published interface, and tested against stubs with its signatures only: no
run in vLLM itself has been made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_fmha import _build, _checks
from sparse_fmha.integrations import _serving

try:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadataBuilder,
        AttentionType,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
except ImportError as error:
    raise ImportError(
        f"{__name__} needs a vLLM with the module vllm.v1.attention.backend: {error}"
    ) from error

__all__ = ["SparseFmhaBackend", "register"]


def register() -> None:
    """Makes this backend vLLM's `CUSTOM` one."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{SparseFmhaBackend.__name__}")


class SparseFmhaBackend(AttentionBackend):  # type: ignore[misc]
    """Paged decode and prefill, sliding windows, sinks; NHD caches with blocks of any size.

    Requests of one token are one call, which CUDA graphs capture; all prompts and parts of prompts
    are another one, which copies their pages.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SparseFmhaImpl]:
        return SparseFmhaImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFmhaMetadataBuilder]:
        return SparseFmhaMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        # Blocks stand before layers: pages of a layer may be far apart.
        return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 8 <= head_size <= _checks.MAX_HEAD_DIM and head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        from sparse_fmha._extension import _C

        if capability is None:  # no GPU
            return True
        here = (capability.major, capability.minor)
        archs = {row["arch"] for row in _build.kernels() if row["pass"] == "decode"}
        return any(name in archs and here in list(own) for name, own in _C.gpu_archs().items())


@dataclass
class SparseFmhaMetadata:
    """Of a batch, for all layers with one cache layout."""

    batch: _serving.Batch
    tokens: int  # that the batch has
    slot_mapping: Tensor  # row of the cache of each token; negative: none
    causal: bool


class SparseFmhaMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1  # requests of one token come first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            raise NotImplementedError("sparse_fmha does not support decode context parallelism")

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SparseFmhaMetadata:
        common = common_attn_metadata
        if isinstance(common.causal, Tensor):
            raise NotImplementedError("sparse_fmha does not support causal for each request")
        counts = torch.diff(common.query_start_loc_cpu).tolist()
        decodes = 0
        while decodes < len(counts) and counts[decodes] == 1:
            decodes += 1
        batch = _serving.Batch(
            common.block_table_tensor,
            common.seq_lens,
            decodes,
            counts[decodes:],
            common.query_start_loc[decodes:] - decodes,
            int(common.max_seq_len),
        )
        return SparseFmhaMetadata(
            batch, common.num_actual_tokens, common.slot_mapping, bool(common.causal)
        )


class SparseFmhaImpl(AttentionImpl):  # type: ignore[misc]
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError("sparse_fmha does not support alibi_slopes")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"sparse_fmha does not support attention of type {attn_type}")
        if kv_cache_dtype not in SparseFmhaBackend.supported_kv_cache_dtypes:
            raise NotImplementedError(f"sparse_fmha does not support caches of {kv_cache_dtype}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.shares_cache = kv_sharing_target_layer_name is not None
        sink = None if sinks is None else sinks.float()
        self.heads = _serving.Heads(self.scale, sliding_window, sink, float(logits_soft_cap or 0))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: SparseFmhaMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the new tokens into the cache, and their attention into `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sparse_fmha does not support a quantized output")
        if attn_metadata is None:  # vLLM's run to measure memory
            return output.fill_(0)
        k_cache, v_cache = kv_cache.unbind(1)
        if not self.shares_cache and key is not None and value is not None:
            ops.reshape_and_cache_flash(
                key,
                value,
                k_cache,
                v_cache,
                attn_metadata.slot_mapping,
                self.kv_cache_dtype,
                layer._k_scale,
                layer._v_scale,
            )
        tokens = slice(attn_metadata.tokens)
        rows = (x.view(-1, self.num_heads, self.head_size)[tokens] for x in (query, output))
        q, out = rows
        batch, causal = attn_metadata.batch, attn_metadata.causal
        _serving.attend(q, k_cache, v_cache, batch, self.heads, causal, out)
        return output
