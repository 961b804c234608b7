"""Attention as the raw ops take it, by `reference` in fp64, which autograd differentiates."""

import bias_oracle
import torch

from sparse_fmha import reference

GRADIENTS = ("q", "k", "v", "extra_k", "extra_v", "key_bias")  # what ops have gradients for


def bits_to_masks(bits):
    """uint8 [..., block_q, block_kv / 8] as bool [..., block_q, block_kv], the lowest bit first."""
    places = torch.arange(8, device=bits.device)
    return (bits[..., None] >> places & 1).flatten(-2).bool()


def mask_of(name, arguments):
    """Which query sees which key, without extra tokens."""
    if name == "varlen":
        return packed_mask(arguments)
    q_len, kv_len = (arguments[x].flatten(1, -3).shape[1] for x in "qk")
    device = arguments["q"].device
    causal = arguments.get("causal", False)
    if name == "fmha":
        if causal:
            return reference.causal_mask(q_len, kv_len, device)
        return torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if name == "neighborhood":
        options = [arguments[x] for x in ("window", "stride", "dilation", "causal")]
        return reference.neighborhood_mask(arguments["q"].shape[1:-2], *options, device=device)
    if name == "block_sparse":
        partial = [arguments.get(f"partial_{x}") for x in ("counts", "indices", "bits")]
        if partial[0] is not None:
            partial[2] = bits_to_masks(partial[2])
        sizes = q_len, kv_len, arguments["block_q"], arguments["block_kv"]
        lists = arguments["counts"], arguments["indices"]
        return reference.block_sparse_mask(*lists, *sizes, *partial, causal)
    assert name == "stripe"
    lists = arguments["columns"], arguments["counts"]
    runs = arguments.get("range_starts"), arguments.get("range_counts")
    size = arguments.get("range_size", 64)
    return reference.stripe_mask(*lists, q_len, kv_len, arguments["block_q"], *runs, size, causal)


def packed_mask(arguments):
    """The mask of packed sequences, [Tq, Tk], one sequence after the other."""
    q, k, cu_q, cu_k = (arguments[x] for x in ("q", "k", "cu_q", "cu_k"))
    mask = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    lengths = cu_k.diff() if arguments.get("seqused_k") is None else arguments["seqused_k"]
    for b, used in enumerate(torch.minimum(cu_k.diff(), lengths).tolist()):
        first, last, key = (int(x) for x in (cu_q[b], cu_q[b + 1], cu_k[b]))
        own = torch.ones(last - first, used, dtype=torch.bool, device=q.device)
        if arguments.get("causal", False):
            own = reference.causal_mask(last - first, used, q.device)
        mask[first:last, key : key + used] = own
    return mask


def attend(name, arguments):
    """out and lse of a mechanism's op in fp64; a lse of -inf is 0, and so has no gradient."""
    q, k, v = (arguments[x] for x in "qkv")
    mask = mask_of(name, arguments)
    if arguments.get("extra_k") is not None:
        k = torch.cat([k.flatten(1, -3), arguments["extra_k"]], 1)
        v = torch.cat([v.flatten(1, -3), arguments["extra_v"]], 1)
        mask = torch.nn.functional.pad(mask, (0, arguments["extra_k"].shape[1]), value=True)
    if name == "varlen":
        q, k, v = q[None], k[None], v[None]
    scale, bias = arguments.get("scale"), arguments.get("key_bias")
    softcap = arguments.get("softcap", 0)
    if bias is None and not softcap:
        out, lse = reference.attention(q, k, v, mask, scale)
    else:
        tokens = (x.flatten(1, -3) for x in (q, k, v))
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[-1]))
        more = bias, arguments.get("row_threshold")
        out, lse = bias_oracle.attend(*tokens, mask, scale, *more, softcap=softcap)
        out, lse = out.reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])
    if name == "varlen":
        out, lse = out[0], lse[0]
    return out, lse.masked_fill(lse == -torch.inf, 0)


def gradients(name, arguments, dout, dlse):
    """In fp64, by the names of the arguments; None for a gradient of the outputs is zero."""
    wide = {
        n: arguments[n].detach().double().requires_grad_()
        for n in GRADIENTS
        if arguments.get(n) is not None
    }
    out, lse = attend(name, {**arguments, **wide})
    loss = out.new_zeros(())
    if dout is not None:
        loss = loss + (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.double()).sum()
    found = torch.autograd.grad(loss, list(wide.values()), materialize_grads=True)
    return dict(zip(wide, found, strict=True))
