"""The implementations that are timed: ours, and every peer that is installed.

A peer is a function of a case and its tensors q, k, v [B, L, H, D] that returns the op to time: a
function without arguments whose result is out [B, L, H, D]. It raises UnavailableError with the
reason where it cannot run the case. Views, masks and compilation are made outside the op.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import block_lists, selection, skipping
from benchmarks.cases.case import Case
from benchmarks.harness.names import DENSE, NO_MASK, OURS, UnavailableError
from benchmarks.peers import fa3 as fa3_peer
from benchmarks.peers import sta as sta_peer
from benchmarks.peers import vsa as vsa_peer
from benchmarks.peers.fa3 import fa3
from benchmarks.peers.flex import flex, flex_tiled
from benchmarks.peers.sta import sta
from benchmarks.peers.vsa import vsa


def sparse_fmha(case: Case, q, k, v):
    import sparse_fmha as library

    if case.mechanism == "selection":
        return selection.select(case, q, k, v)
    if case.lists:
        mask = block_lists.mask(case)
        return lambda: library.block_sparse_attention(q, k, v, mask)
    if case.window:
        q, k, v = (x.view(x.shape[0], *case.grid, *x.shape[2:]) for x in (q, k, v))
        attend = library.neighborhood_attention
        return lambda: attend(q, k, v, case.window, **case.options).flatten(1, -3)
    if case.skip:
        options = {"causal": case.causal, "skip_threshold": skipping.THRESHOLD}
        return lambda: library.attention(q, k, v, **options)
    return lambda: library.attention(q, k, v, causal=case.causal)


def _sdpa(case: Case, q, k, v, backend: SDPBackend | None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": case.causal}
    if case.heads_q != case.heads_kv:
        options["enable_gqa"] = True
    if case.window or case.lists:
        if backend is not None:
            raise UnavailableError(NO_MASK)
        options |= {"attn_mask": _token_mask(case), "is_causal": False}

    def op():
        if backend is None:
            return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return op


def _token_mask(case: Case) -> torch.Tensor:
    if case.lists:
        heads, rows = (torch.arange(n, device="cpu") for n in (case.heads_q, case.length))
        return block_lists.row_masks(case, heads, rows)
    from sparse_fmha import reference

    return reference.neighborhood_mask(case.grid, case.window, **case.options)


def torch_cpu(case: Case, q, k, v):
    return _sdpa(case, q, k, v, None)


def cudnn(case: Case, q, k, v):
    return _sdpa(case, q, k, v, SDPBackend.CUDNN_ATTENTION)


def flash2(case: Case, q, k, v):
    if case.value_dim:
        raise UnavailableError("takes values of q's head dim only")
    return _sdpa(case, q, k, v, SDPBackend.FLASH_ATTENTION)


Build = Callable[..., Callable[[], torch.Tensor]]
PEERS: dict[str, dict[str, Build]] = {
    "cuda": {
        "cudnn": cudnn,
        "flash2": flash2,
        "fa3": fa3,
        "vsa": vsa,
        "sta": sta,
        "flex": flex,
        "flex_tiled": flex_tiled,
    },
    "cpu": {"torch": torch_cpu, "flex": flex, "flex_tiled": flex_tiled},
}
# The first two compile for tens of seconds per case. fastvideo-kernel 0.3.2 brings a libcuda of its
# own: where that is newer than the driver its kernel ends the process's CUDA context (vsa looks).
ON_REQUEST = {"flex", "flex_tiled", "sta"}
# What loads the peers that are no part of torch; UnavailableError says why one does not load.
LOAD: dict[str, Callable[[], object]] = {
    "fa3": fa3_peer.load,
    "sta": sta_peer.load,
    "vsa": vsa_peer.load,
}
DENSE_TOO = {OURS, "cudnn", "fa3", "torch"}  # also run dense where a case asks for that


def left_out(case: Case, q, k, v):
    raise UnavailableError("left out by --without")


def choose(device: str, wanted: str, without: str = "") -> dict[str, Build]:
    """Builders by name: `auto`, `none`, or a list with commas; ours is always the first. Those in
    the list `without` run no case, and give that as their reason.

    ValueError for an unknown name, and for the listed ones that do not load.
    """
    known = PEERS[device]
    if wanted == "auto":
        names = [name for name in known if name not in ON_REQUEST]
    else:
        names = _names(wanted)
    unwanted = _names(without)
    for option, given in (("--peers", names), ("--without", unwanted)):
        for name in given:
            if name not in known:
                more = ["auto", "none"] if option == "--peers" else []
                raise ValueError(
                    f"{option} {name}: allowed on {device} are {', '.join([*known, *more])}"
                )
    if wanted != "auto":
        _load([name for name in names if name not in unwanted])
    chosen = {name: left_out if name in unwanted else known[name] for name in names}
    return {OURS: sparse_fmha} | chosen


def _names(listed: str) -> list[str]:
    return [] if listed in ("", "none") else listed.split(",")


def _load(names: list[str]) -> None:
    problems = []
    for name in names:
        try:
            LOAD.get(name, lambda: None)()
        except UnavailableError as problem:
            problems.append(f"--peers {name}: {problem}")
    if problems:
        raise ValueError("; ".join(problems))


def idle(wanted: str, without: str, records: list[dict]) -> dict[str, str]:
    """Of the peers that were asked for by name, those that ran no case, with the last reason."""
    asked = [] if wanted == "auto" else [n for n in _names(wanted) if n not in _names(without)]
    ran = {run["op"] for record in records for run in record["runs"]}
    skipped = {name: why for record in records for name, why in record["skipped"].items()}
    return {
        name: skipped.get(name, "no case is for it")
        for name in asked
        if not {name, name + DENSE} & ran
    }
