"""A model in the shape of BiFormer-T, beside the same model with torch's attention of each token's
routed keys."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import biformer_model
from benchmarks.harness import report
from benchmarks.studies import vision
from sparse_fmha.patterns import BiFormerLayout


def of_routed_tokens(q, k, v, stage, scale):
    """Region by region: SDPA of its tokens with those of its top-k regions, by definition."""
    batch, tokens, heads, dim = q.shape
    if stage.top_k is None:
        return biformer_model.dense(q, k, v, stage, scale)
    size = stage.side // stage.regions
    row, column = (torch.arange(stage.side) // size for _ in range(2))
    region = (row[:, None] * stage.regions + column).flatten()
    number = stage.regions**2
    own = [(region == r).nonzero()[:, 0] for r in range(number)]
    with torch.no_grad():
        means = [torch.stack([x[:, i].flatten(2).mean(1) for i in own], 1) for x in (q, k)]
        best = (means[0] @ means[1].transpose(1, 2)).topk(stage.top_k).indices
    out = torch.zeros_like(q)
    rows = []
    for b in range(batch):
        for r, queries in enumerate(own):
            keys = torch.cat([own[s] for s in best[b, r].tolist()])
            part = [x[b : b + 1].transpose(1, 2) for x in (q[:, queries], k[:, keys], v[:, keys])]
            found = scaled_dot_product_attention(*part, scale=scale)
            rows.append((b, queries, found[0].transpose(0, 1)))
    where = [torch.cat([torch.full_like(i, b) for b, i, _ in rows])]
    where.append(torch.cat([i for _, i, _ in rows]))
    assert len(where[0]) == batch * tokens
    return out.index_put(tuple(where), torch.cat([x for _, _, x in rows]).view(-1, heads, dim))


@pytest.mark.parametrize("pixels", [224, 512])
def test_outputs_and_gradients(pixels):
    torch.manual_seed(0)
    model = biformer_model.BiFormer(pixels, channels=32, depths=(1, 1, 1, 1), classes=5)
    images = biformer_model.drawn(pixels, 1, "cpu", torch.float32, 1).requires_grad_()
    leaves = [images, *model.parameters()]
    found = []
    for attend in (biformer_model.routed, of_routed_tokens, biformer_model.dense):
        logits = model(images, attend)
        loss = (logits * torch.arange(1.0, 6)).sum()
        found.append((logits.detach(), torch.autograd.grad(loss, leaves)))
    (ours, grads), (theirs, expected), (other, _) = found
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (other - theirs).abs().max() > 1e-4  # routing leaves something out
    for own, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_regions_of_the_stages():
    """Tokens of a region, and what makes the mask, as BiFormer has them at both sizes."""
    for pixels, tokens in ((224, [64, 16, 4, 1]), (512, [256, 64, 16, 4])):
        stages = biformer_model.stages(pixels, "cpu")
        assert [(s.side // s.regions) ** 2 for s in stages] == tokens
        kinds = [isinstance(s.layout, BiFormerLayout) for s in stages]
        assert kinds == [t % 64 == 0 for t in tokens[:3]] + [False]
        assert stages[3].layout is None
        assert [s.top_k for s in stages] == [1, 4, 16, None]


def test_the_study(tmp_path):
    out = tmp_path / "results.json"
    assert vision.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = {row["op"]: row for row in report.load(out)["rows"]}
    assert len(rows) == 4
    ms = {op: row["ms"]["median"] for op, row in rows.items()}
    for passes in ("forward", "gradients"):
        ratio = ms[f"SDPA, dense, {passes}"] / ms[f"routed, {passes}"]
        assert rows[f"routed, {passes}"]["speedup"] == pytest.approx(ratio)
