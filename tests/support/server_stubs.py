"""Stubs of vLLM's and SGLang's interfaces to attention backends.

Names, arguments and their order are those that the projects publish (vLLM's
vllm/v1/attention/backend.py and SGLang's base_attn_backend.py of 2026); bodies are made up, and as
short as the tests need.
"""

# ruff: noqa: B027, RUF012  (as there)

import enum
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class VllmBackend(ABC):
    supported_dtypes = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    @abstractmethod
    def get_name(): ...

    @staticmethod
    @abstractmethod
    def get_impl_cls(): ...

    @staticmethod
    @abstractmethod
    def get_builder_cls(): ...

    @staticmethod
    @abstractmethod
    def get_kv_cache_shape(
        num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"
    ): ...

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension=False): ...

    @classmethod
    def supports_head_size(cls, head_size): ...

    @classmethod
    def supports_sink(cls): ...

    @classmethod
    def supports_non_causal(cls): ...

    @classmethod
    def supports_compute_capability(cls, capability): ...


class VllmBuilder(ABC, Generic[T]):
    _cudagraph_support = AttentionCGSupport.NEVER
    reorder_batch_threshold = None

    @abstractmethod
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.device = device

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class VllmImpl(ABC, Generic[T]):
    @abstractmethod
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None,
        sliding_window=None, kv_cache_dtype="auto", logits_soft_cap=None,
        attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None,
    ): ...  # fmt: skip

    @abstractmethod
    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ): ...  # fmt: skip


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: Any = True


class AttentionBackendEnum(enum.Enum):
    CUSTOM = None


OVERRIDES = {}


def register_backend(backend, class_path=None, is_mamba=False):
    OVERRIDES[backend] = class_path


def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
):
    """Rows of negative slots are passed over, as on the device."""
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            at = divmod(slot, key_cache.shape[1])
            key_cache[at], value_cache[at] = key[i], value[i]


class SglangBackend(ABC):
    @abstractmethod
    def init_forward_metadata(self, forward_batch): ...

    def init_cuda_graph_state(self, max_bs, max_num_tokens): ...

    def init_forward_metadata_capture_cuda_graph(
        self, bs, num_tokens, req_pool_indices, seq_lens, encoder_lens, forward_mode, spec_info
    ): ...

    def init_forward_metadata_replay_cuda_graph(
        self, bs, req_pool_indices, seq_lens, seq_lens_sum, encoder_lens, forward_mode, spec_info,
        seq_lens_cpu,
    ): ...  # fmt: skip

    def get_cuda_graph_seq_len_fill_value(self): ...

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        decodes = forward_batch.forward_mode.is_decode()
        run = self.forward_decode if decodes else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True): ...

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True): ...


REGISTERED = {}
CHOICES = ["triton"]


def register_attention_backend(name):
    def decorator(make):
        REGISTERED[name] = make
        return make

    return decorator


MODULES = {
    "vllm": {},
    "vllm._custom_ops": {"reshape_and_cache_flash": reshape_and_cache_flash},
    "vllm.v1.attention.backend": {
        "AttentionBackend": VllmBackend,
        "AttentionCGSupport": AttentionCGSupport,
        "AttentionImpl": VllmImpl,
        "AttentionMetadataBuilder": VllmBuilder,
        "AttentionType": AttentionType,
    },
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": AttentionBackendEnum,
        "register_backend": register_backend,
    },
    "sglang": {},
    "sglang.srt.layers.attention.attention_registry": {
        "register_attention_backend": register_attention_backend
    },
    "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": SglangBackend},
    "sglang.srt.layers.radix_attention": {"AttentionType": AttentionType},
    "sglang.srt.server_args": {"add_attention_backend_choices": CHOICES.extend},
}


def install(patch):
    """Puts the stubs where the packages would be, for as long as the patch lasts."""
    for path, names in MODULES.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                module = types.ModuleType(name)
                module.__path__ = []
                patch.setitem(sys.modules, name, module)
                if i > 1:
                    setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        vars(sys.modules[path]).update(names)
