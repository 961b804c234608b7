"""Attention over several GPUs: sequence parallel functions, and sharding rules for DTensor.

`import sparse_fmha.distributed` registers the rules. docs/distributed.md says which one to use.
"""

from __future__ import annotations

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("sparse_fmha.distributed needs a PyTorch built with torch.distributed")

from sparse_fmha.distributed import _pass_ops
from sparse_fmha.distributed._all_gather import all_gather_kv
from sparse_fmha.distributed._dtensor import distribute_mask, register_sharding
from sparse_fmha.distributed._head_order import balanced_heads
from sparse_fmha.distributed._key_plan import KeyPlan, plan_kv
from sparse_fmha.distributed._pass_kv import pass_kv
from sparse_fmha.distributed._sharding import shard, unshard
from sparse_fmha.distributed._shards import Shards
from sparse_fmha.distributed._two_levels import two_levels
from sparse_fmha.distributed._ulysses import ulysses
from sparse_fmha.distributed._weights import head_weights, row_weights
from sparse_fmha.distributed._zigzag import zigzag_shard, zigzag_unshard

__all__ = [
    "KeyPlan",
    "Shards",
    "all_gather_kv",
    "balanced_heads",
    "distribute_mask",
    "head_weights",
    "pass_kv",
    "plan_kv",
    "register_sharding",
    "row_weights",
    "shard",
    "two_levels",
    "ulysses",
    "unshard",
    "zigzag_shard",
    "zigzag_unshard",
]

register_sharding()
_pass_ops.register()
