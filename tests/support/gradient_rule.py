"""How gradients are judged: by the error that torch's own attention makes in the same dtype."""

import bias_oracle
import torch
from gradient_cases import values
from gradient_oracle import GRADIENTS, gradients, mask_of

# Below it a gradient is taken for 0: GPU kernels divide by the scale, and take 1e-30 for 0.
ZERO = 1e-20


def output_gradients(out, lse, seed=7):
    """Gradients of out and lse; 0 of a lse of -inf, which has none."""
    dout = values(*out.shape, seed=seed, dtype=out.dtype, device=out.device)
    dlse = values(*lse.shape, seed=seed + 1, dtype=lse.dtype, device=lse.device)
    return dout, dlse.masked_fill(lse == -torch.inf, 0)


def eager(case, arguments):
    """out of torch's own attention without fusion, in the dtype of the inputs."""
    q, k, v = (arguments[n].flatten(1, -3) for n in "qkv")
    mask = mask_of(case.mechanism, arguments)
    if case.extra:
        k, v = torch.cat([k, arguments["extra_k"]], 1), torch.cat([v, arguments["extra_v"]], 1)
        mask = torch.nn.functional.pad(mask, (0, case.extra), value=True)
    mask = mask.expand(case.batch, case.heads, q.shape[1], k.shape[1])
    added = mask
    if "key_bias" in arguments:
        bias = torch.nn.functional.pad(arguments["key_bias"], (0, case.extra))
        mask = bias_oracle.visible_with(mask, bias.detach(), arguments.get("row_threshold"))
        added = bias[:, :, None].masked_fill(~mask, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if "softcap" in arguments:
        out = _capped(q, k, v, mask, added, arguments)
        return out.transpose(1, 2).reshape(*arguments["q"].shape[:-1], -1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(q, k, v), attn_mask=added, scale=case.scale, enable_gqa=True
        )
    out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
    return out.transpose(1, 2).reshape(*arguments["q"].shape[:-1], -1)


def _capped(q, k, v, mask, added, arguments):
    """The same with capped scores, as models write it."""
    scale = q.shape[3] ** -0.5 if arguments["scale"] is None else arguments["scale"]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = bias_oracle.capped(q @ k.mT * scale, arguments["softcap"])
    scores = scores.masked_fill(~mask, -torch.inf) if added.dtype == torch.bool else scores + added
    weights = scores.softmax(-1, dtype=torch.float32).masked_fill(~mask, 0)
    return weights.to(q.dtype) @ v


def eager_gradients(case, arguments, dout):
    own = {n: arguments[n].detach().requires_grad_() for n in GRADIENTS if n in arguments}
    out = eager(case, {**arguments, **own})
    found = torch.autograd.grad(out, list(own.values()), dout)
    return {n: x.nan_to_num(0) for n, x in zip(own, found, strict=True)}


def _rms(x):
    return x.square().mean().sqrt()


def assert_as_good_as_torch(case, arguments, found, dout, lse):
    """Of each gradient found the error against fp64 is at most twice torch's, plus rounding."""
    __tracebackhide__ = True
    exact = gradients(case.mechanism, arguments, dout, None)
    eager = eager_gradients(case, arguments, dout)
    # Of a lse in fp32, which all weights of its row inherit.
    largest = lse.masked_fill(lse == -torch.inf, 0).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * (1 + largest)
    # A row that sees one key has no gradient of its scores: two sums in fp32 cancel.
    sums = dout.abs().max().item() * arguments["v"].abs().max().item() * arguments["v"].shape[-1]
    cancelled = torch.finfo(torch.float32).eps * sums
    scale, factors = abs(case.scale or 1), {"q": "k", "k": "q"}
    for of, gradient in found.items():
        assert (gradient.shape, gradient.dtype) == (arguments[of].shape, arguments[of].dtype)
        assert gradient.is_contiguous()
        assert gradient.isfinite().all(), f"{of}: {(~gradient.isfinite()).sum()} are not finite"
        ours, theirs = ((x[of].double() - exact[of]).abs() for x in (found, eager))
        # A bias has fp32, but each summand of its gradient comes from a rounded output.
        of_dtype = torch.finfo(arguments["q"].dtype).eps * (2 if of == "key_bias" else 1)
        factor = scale * arguments[factors[of]].abs().max().item() if of in factors else 0
        factor = 1 if of == "key_bias" else factor  # that of a bias is that of its scores
        floor = (of_dtype + rounding) * exact[of].abs().max() + cancelled * factor + ZERO
        for name, figure in {
            "largest": torch.max,
            "rms": lambda x: x.square().mean().sqrt(),
        }.items():
            error, allowed = figure(ours).item(), (2 * figure(theirs) + floor).item()
            assert error <= allowed, (
                f"{name} error of the gradient of {of} is {error:.3g}, {allowed:.3g} is allowed; "
                f"worst at {tuple(map(int, torch.unravel_index(ours.argmax(), ours.shape)))}"
            )
