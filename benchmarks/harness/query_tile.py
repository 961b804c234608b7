"""Which of the rows that differ in their query tile a call takes on this machine's GPU."""

from __future__ import annotations

import torch


def query_tile(
    causal: bool, head_dim: int, instances: int, length: int, multiprocessors: int | None = None
) -> int:
    """The tile_q of the row for dense or causal attention; `instances` are heads of batch entries.

    Without `multiprocessors` those of the GPU that is here, or of an H100.
    """
    from sparse_fmha import _C

    if multiprocessors is None:
        here = torch.cuda.is_available()
        multiprocessors = torch.cuda.get_device_properties().multi_processor_count if here else 132
    times = _C.row_times(causal, head_dim, instances, length, length, multiprocessors)
    return min(times, key=lambda row: row[2])[0]
