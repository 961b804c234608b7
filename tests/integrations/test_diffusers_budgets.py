"""Budgets by layer and head from runs of a model, and the record of what a run computes."""

import math
import re

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import make, torch_attention_with

from sparse_fmha.calibration import Calibration
from sparse_fmha.integrations import _diffusion_budgets as budgets
from sparse_fmha.integrations import diffusers as sparse

VALUES = (0.25, 0.5, 0.75)


def runs_of(tiny, seeds=(1, 2, 3)):
    def run(seed):
        latents = tiny.inputs["hidden_states"]
        generator = torch.Generator().manual_seed(seed)
        for t in (900, 600):
            tiny(t, hidden_states=torch.randn(latents.shape, generator=generator))

    return [lambda seed=seed: run(seed) for seed in seeds]


def heads_of(tiny, layer):
    """What the heads of a layer give, `[B, tokens, heads, D]`, in each call."""
    outs = []
    project = tiny.model.blocks[layer].attn1.to_out[0]
    handle = project.register_forward_pre_hook(
        lambda module, args: outs.append(args[0].unflatten(-1, (2, 16)).double())
    )
    return outs, handle


def test_budgets_are_the_first_whose_error_is_allowed():
    """By the definition: the first layer has the same q, k and v in sparse runs."""
    tiny, wanted = make("wan"), 0.4
    found = sparse.calibrate(tiny.model, runs_of(tiny), error=wanted, values=VALUES)
    assert not sparse.is_enabled(tiny.model)
    outs, handle = heads_of(tiny, 0)

    def run(keep=None):
        outs.clear()
        if keep is not None:
            sparse.enable(tiny.model, "cube_top_k", keep=keep)
        for one in runs_of(tiny):
            one()
        if keep is not None:
            sparse.disable(tiny.model)
        return torch.stack(outs)

    dense = run()
    size = dense.square().sum((0, 1, 2, 4)).sqrt()
    errors = [(run(keep) - dense).square().sum((0, 1, 2, 4)).sqrt() / size for keep in VALUES]
    handle.remove()
    for head in range(2):
        of_head = [*(error[head].item() for error in errors), 0.0]
        first = next(n for n, error in enumerate(of_head) if error <= wanted)
        assert found.chosen[0, head] == (*VALUES, 1.0)[first]
        assert found.error[0, head].item() == pytest.approx(of_head[first], rel=1e-4, abs=1e-5)
    assert found.chosen.shape == (2, 2)
    assert len({*found.chosen.flatten().tolist()}) > 1


def test_a_run_is_dense_while_it_is_tried():
    tiny = make("hunyuan_video", lengths=(10, 4))
    expected, outs = tiny(), []
    sparse.calibrate(
        tiny.model, [lambda: outs.append(tiny())], "subblock", values=[0.5], error=1, block=64
    )
    torch.testing.assert_close(outs[0], expected, rtol=1e-4, atol=1e-4)
    assert tiny().equal(expected)


def test_a_file_is_a_preset(tmp_path):
    tiny = make("wan")
    found = sparse.calibrate(
        tiny.model, runs_of(tiny), error=0.4, values=VALUES, first_dense_steps=1, cube=(4, 4, 4)
    )
    path = found.save(tmp_path / "mine.json")
    dense = tiny(900)
    sparse.enable(tiny.model, layers=found.layers)
    expected = tiny(600)
    sparse.disable(tiny.model)
    assert not expected.equal(tiny(600))
    for preset in (path, found.preset):
        sparse.enable(tiny.model, preset=preset)
        assert tiny(900).equal(dense)
        assert tiny(600).equal(expected)
        sparse.disable(tiny.model)
    note = r"by 3 runs: the same keep for \d+% of heads, spread .* at most "
    assert re.search(note, found.preset.note)
    with pytest.raises(ValueError, match=r"path must end in \.json"):
        found.save(tmp_path / "mine")


def measured(*runs):
    """Of one layer with one head, from errors of two values in each call of runs."""
    calls = [[(torch.tensor(e)[:, None].double() ** 2, torch.ones(1).double()) for e in run]
             for run in runs]  # fmt: skip
    return budgets.Measured(calls)


def made(*layers, wanted=0.1):
    return budgets.made("M", "subblock", {}, (0.1, 0.5), wanted, layers)


def test_stability_over_runs_and_halves():
    steady = measured([(0.05, 0.01)] * 2, [(0.06, 0.01)] * 2)
    found = made(steady)
    assert found.chosen.tolist() == [[0.1]]
    assert found.error.item() == pytest.approx(math.sqrt((0.05**2 + 0.06**2) / 2))
    assert (found.groups, found.same, found.spread) == ("2 runs", 1.0, 0.0)
    assert found.unseen == pytest.approx(0.06)

    found = made(measured([(0.05, 0.01)], [(0.4, 0.2)]), steady)
    assert found.chosen.tolist() == [[1.0], [0.1]]
    assert (found.same, found.spread) == (0.5, pytest.approx(0.45))
    assert found.unseen == pytest.approx(0.4)  # the second run with the first one's budget

    found = made(measured([(0.05, 0.01), (0.3, 0.05)]))
    assert (found.groups, found.same) == ("the halves of one run", 0.0)
    assert found.chosen.tolist() == [[0.5]]
    assert found.unseen == pytest.approx(0.3)
    found = made(measured([(0.05, 0.01)]))
    assert (found.same, found.unseen) == (1.0, 0.0)


def test_thresholds_of_layers(tmp_path):
    tiny = make("wan")
    found = sparse.calibrate(tiny.model, runs_of(tiny), "skip", error=0.3, every=2)
    assert found.chosen.shape == (2, 2)
    assert found.chosen[:, 0].equal(found.chosen[:, 1])
    assert found.layers["layer 1"] == {"method": "skip", "threshold": found.chosen[1, 0].item()}
    sparse.enable(tiny.model, preset=found.save(tmp_path / "a.json"))
    assert tiny().isfinite().all()


def test_skip():
    """At 0 it is dense; with text, too; a calibration gives thresholds by the keys."""
    for name in ("wan", "hunyuan_video"):
        tiny = make(name)
        dense = tiny()
        sparse.enable(tiny.model, "skip", threshold=0.0)
        with pytest.warns(UserWarning, match="threshold = 0 has no effect"):
            out = tiny()
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
        sparse.disable(tiny.model)
        sparse.enable(tiny.model, "skip", threshold=0.5)
        assert tiny().isfinite().all()
        sparse.disable(tiny.model)
    calibration = Calibration([("prefill", n, t, s, 1000) for n, t, s in
                               ((100, 1e-3, 0.2), (100, 1e-2, 0.5), (100, 0.1, 0.8))])  # fmt: skip
    sparse.enable(tiny.model, "skip", sparsity=0.5, calibration=calibration)
    assert tiny().isfinite().all()
    sparse.disable(tiny.model)
    with pytest.raises(ValueError, match="exactly one of threshold and sparsity"):
        sparse.enable(tiny.model, "skip")
    with pytest.raises(ValueError, match="sparsity and calibration must be given together"):
        sparse.enable(tiny.model, "skip", sparsity=0.5)


def test_a_record_of_windows_and_text():
    """The share of a window is known; text sees and is seen by all."""
    tiny = make("hunyuan_video", layers=1)
    sparse.enable(tiny.model, "neighborhood", window=(3, 3, 2), dense_layers=[1])
    expected = tiny()
    with sparse.record(tiny.model, error=True) as found:
        assert tiny().equal(expected)
    assert tiny().equal(expected)
    tokens, image, text = 130, 120, 10
    pairs = image * (18 + text) + text * tokens
    assert found.density[0].tolist() == [pytest.approx(pairs / tokens**2)] * 2
    assert found.density[1].tolist() == [1.0, 1.0]
    assert (found.error[0] > 0.01).all()
    assert (found.error[1] == 0).all()
    assert [layer.name for layer in found.layers] == ["0", "1"]


def test_a_record_of_heads():
    tiny = make("wan")
    sparse.enable(tiny.model, "cube_top_k", keep=(0.25, 1.0), first_dense_steps=1)
    latents = torch.randn(1, 4, 4, 16, 16)  # 1 x 2 x 2 cubes
    with sparse.record(tiny.model) as found:
        tiny(900, hidden_states=latents)
        tiny(700, hidden_states=latents)
    assert [len(layer.pairs) for layer in found.layers] == [1, 1]
    assert (found.density[:, 1] == 1).all()
    assert (found.density[:, 0] == 0.25).all()
    assert not found.error.any()


def test_a_record_by_step():
    tiny = make("wan", layers=1)
    shares = [{"keep": keep} for keep in (0.75, 0.25)]
    sparse.enable(tiny.model, "cube_top_k", by_step=shares)
    latents = torch.randn(1, 4, 4, 16, 16)
    with sparse.record(tiny.model) as found:
        for t in (900, 700, 400):
            tiny(t, hidden_states=latents)
    (layer,) = found.layers
    assert [pairs[0].item() for pairs in layer.pairs] == [0.75, 0.25, 0.25]


def test_a_record_of_routed_blocks():
    """All ops of a call count; blocks that are not chosen are one pooled key each."""
    tiny = make("wan", layers=1)
    sparse.enable(tiny.model, "sol", tau=0.5)
    with sparse.record(tiny.model) as found, torch_attention_with():
        tiny()
    assert ((found.density > 0.3) & (found.density <= 1.1)).all()


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "method must be one of .'cube_top_k'", {"method": "radial"}),
        (TypeError, "runs must be functions", {"runs": []}),
        (TypeError, "runs must be functions", {"runs": ["a cat"]}),
        (ValueError, "values must have at least one budget", {"values": ()}),
        (TypeError, "keep must not be given", {"keep": 0.5}),
        (ValueError, "error must be", {"error": 2}),
        (ValueError, "runs must call layer 0 of Wan", {"runs": [lambda: None]}),
    ],
)
def test_arguments(error, match, given):
    tiny = make("wan")
    given = {"runs": runs_of(tiny), **given}
    with pytest.raises(error, match=match):
        sparse.calibrate(tiny.model, **given)
    assert not sparse.is_enabled(tiny.model)
    with (
        pytest.raises(RuntimeError, match="must be enabled for record"),
        sparse.record(tiny.model),
    ):
        pass
