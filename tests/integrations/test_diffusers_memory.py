"""Sparse calls of models need no more memory than dense ones, in the shapes that people run.

Tensors are on the meta device: what is allocated outside of the ops is as on a GPU, and nothing is
computed.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import live_bytes
import pytest
import tiny_diffusion
import torch

pytest.importorskip("diffusers.models.transformers.transformer_kandinsky6")  # the newest of them

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.cases.models import CASES
from sparse_fmha import _sizes
from sparse_fmha.integrations import _diffusion_models, _diffusion_presets, _diffusion_state
from sparse_fmha.integrations import _diffusion_table as table
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_layout import Layout
from sparse_fmha.integrations._diffusion_methods import Dense

MIB = 2**20
KEPT = 4 * MIB  # masks and orders that are kept for a grid: most where no test before made them
# Of models: tokens before and after the grid, and heads, if their case is not among CASES; their
# own grid where a preset has none.
SHAPES = {
    "Flux2Transformer2DModel": ((128, 128), 512, 0, 24, 128),
    "FluxTransformer2DModel": ((256, 256), 512, 0, 24, 128),
    "CosmosTransformer3DModel": ((16, 44, 80), 0, 0, 32, 128),
    "Kandinsky5Transformer3DModel": ((31, 48, 80), 0, 0, 28, 64),
    "HunyuanVideoTransformer3DModel": ((30, 48, 80), 0, 256, 24, 128),
    "WanTransformer3DModel": ((21, 45, 80), 0, 0, 40, 128),
    "LTX2VideoTransformer3DModel": ((16, 34, 60), 0, 0, 32, 128),
    "MiniMaxH3Transformer3DModel": ((37, 24, 42), 561, 0, 56, 128),
}
WHOLE = {
    "minimax-h3-768p": "MiniMaxH3Transformer3DModel",
    "wan-14b-720p": "WanTransformer3DModel",
    "ltx2-1080p": "LTX2VideoTransformer3DModel",
    "hunyuan-video-720p": "HunyuanVideoTransformer3DModel",
    "flux2-klein-2048": "Flux2Transformer2DModel",
}
PRESETS = _diffusion_presets.known()


@pytest.fixture
def meta(monkeypatch):
    """Models run on the meta device, where no grid, timestep or mask can be read."""
    live_bytes.allow_meta(monkeypatch)
    for case, name in WHOLE.items():
        grid = CASES[case].grid
        others = SHAPES[name][1:3]
        row = dataclasses.replace(
            _diffusion_models.MODELS[name],
            grid=lambda model, given, grid=grid: grid,
            others=lambda model, given, grid, others=others: others,
            step=lambda given: (torch.tensor(500.0), given["encoder_hidden_states"]),
        )
        monkeypatch.setitem(_diffusion_models.MODELS, name, row)
    monkeypatch.setattr(
        _diffusion_state.Call, "_read", lambda call, mask, batch: [call.layout.all_runs()] * batch
    )


def each_call():
    """Each model that a preset names, with each of its different methods; calls of FLUX.2 are too
    small to be computed in parts."""
    for name, preset in PRESETS.items():
        each = [{"method": preset.method, **preset.options}] if preset.method else []
        kinds = {repr(x): x for x in (*each, *filter(None, preset.layers.values()))}
        for n, options in enumerate(kinds.values()):
            for model in SHAPES:
                if model not in preset.models or model == "Flux2Transformer2DModel":
                    continue
                yield pytest.param(preset, options, model, id=f"{name}-{n}-{model}")


@pytest.mark.parametrize(("preset", "options", "model"), list(each_call()))
def test_attention_needs_a_few_times_its_output(preset, options, model, monkeypatch):
    """Beside q, k and v, and at most two more of its size than dense attention: before it, models
    need as much for their embeddings of positions in fp32."""
    live_bytes.allow_meta(monkeypatch)
    grid, before, after, heads, dim = SHAPES[model]
    layout = Layout(preset.grid or grid, before, after)
    shape = 1, layout.tokens, heads, dim
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    own = table.as_given({key: value for key, value in options.items() if key != "method"})
    method = table.make(options["method"], own).prepared(layout, q.device)

    def peak(method):
        return live_bytes.peak_bytes(lambda: method(q, k, v, layout, [layout.all_runs()], None))

    dense = peak(Dense())
    assert dense < 1.1 * q.nbytes
    assert peak(method) < dense + 2 * q.nbytes


@pytest.mark.parametrize("case", WHOLE)
def test_no_preset_needs_more_than_the_dense_model(meta, case):
    """Whole calls of two blocks of each kind."""
    with torch.device("meta"):
        model, inputs = CASES[case].make(2, False)
    model = model.to(torch.bfloat16).requires_grad_(False)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            inputs[name] = x.to("meta", torch.bfloat16 if x.is_floating_point() else None)

    def peak(**options):
        sparse.enable(model, min_tokens=0, first_dense_steps=0, **options)
        try:
            return live_bytes.peak_bytes(lambda: model(**inputs, return_dict=False))
        finally:
            sparse.disable(model)

    original = live_bytes.peak_bytes(lambda: model(**inputs, return_dict=False))
    dense = peak(method="dense")
    assert dense == pytest.approx(original, rel=1e-3)
    found = {
        name: peak(preset=name, dense_layers=())
        for name, preset in PRESETS.items()
        if WHOLE[case] in preset.models
    }
    assert found
    assert not {name: bytes_ / MIB for name, bytes_ in found.items() if bytes_ > dense + KEPT}


def test_a_compiled_block_needs_no_more_than_with_dense_attention():
    """Of FLUX.2: attention's output and that of another layer come into one tensor, which takes
    the peak; whatever attention holds until then adds to it. Text is before the grid."""
    torch.compiler.reset()
    model, inputs = klein()

    def peak(**options):
        sparse.enable(model, min_tokens=0, first_dense_steps=0, **options)
        try:
            return allocated(lambda: model(**inputs, return_dict=False))
        finally:
            sparse.disable(model)
            torch.compiler.reset()

    model.compile_repeated_blocks(fullgraph=True)
    with torch.inference_mode():
        assert peak(preset="sol-comfyui") <= 1.01 * peak(method="dense")


def klein():
    from diffusers import Flux2Transformer2DModel

    side, words, text = 32, 64, 64
    model = Flux2Transformer2DModel(
        num_layers=0,
        num_single_layers=1,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=text,
        guidance_embeds=False,
        axes_dims_rope=(16, 16, 16, 16),
    ).requires_grad_(False)
    axis, one = torch.arange(side), torch.zeros(1, dtype=torch.long)
    return model, {
        "hidden_states": torch.randn(1, side * side, 128),
        "encoder_hidden_states": torch.randn(1, words, text),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(one, axis, axis, one).float()[None],
        "txt_ids": torch.zeros(1, words, 4),
        "guidance": None,
    }


def allocated(call):
    """The most bytes that a second call has at once, those inside of compiled graphs too."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(e.nbytes() for e in events))


PARTS = {
    "sol": {"tau": 0.5},
    "subblock": {"keep": (0.3, 0.6)},
    "cube_top_k": {"keep": (0.3, 0.6)},
    "vsa": {"keep": 0.3},
    "draft": {"keep": (0.3, 0.6)},
    "rectified": {"keep": 0.2, "theta": 0.1, "block": 64},
    "psa": {"shares": {1: 0.2, 2: 0.5, 8: 0.8}},
    "svg": {"keep": 0.6, "rows": 16, "block": 64},
    "nabla": {"p": 0.3, "window": (1, 1, 1)},
}


def tiny(name):
    made = tiny_diffusion.make(name)
    if name == "hunyuan_video":  # text behind the grid, and padded in one entry
        made = tiny_diffusion.make(name, lengths=(3, tiny_diffusion.TEXT))
    made.inputs["hidden_states"] = torch.randn(tiny_diffusion.BATCH, 4, 8, 16, 16)
    return made


def heads_in_calls(monkeypatch, model):
    """The numbers of heads of q in each call of the op of block lists."""
    found = []

    class Heads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.sparse_fmha.block_sparse_fwd.default:
                found.append(args[0].shape[2])
            return func(*args, **(kwargs or {}))

    with Heads():
        out = model()
    return out, set(found)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("model", ["wan", "hunyuan_video"])
def test_some_heads_at_a_time_give_the_same(model, name, monkeypatch):
    """Without other tokens, and with text; budgets by head stay with their heads."""
    made = tiny(model)
    sparse.enable(made.model, name, min_tokens=0, **PARTS[name])
    whole, heads = heads_in_calls(monkeypatch, made)
    assert heads == {2}
    monkeypatch.setattr(_sizes, "SLICE", 1)
    parts, heads = heads_in_calls(monkeypatch, made)
    assert 1 in heads  # of Sol-Attn without text the exact part stays whole
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_a_recording_has_all_heads(monkeypatch):
    made = tiny("wan")
    sparse.enable(made.model, "cube_top_k", keep=(0.2, 0.7), min_tokens=0)
    found = []
    for size in (_sizes.SLICE, 1):
        monkeypatch.setattr(_sizes, "SLICE", size)
        with sparse.record(made.model, error=True) as recording:
            made()
        found.append((recording.density, recording.error))
    assert (found[0][0][:, 0] < 0.5 * found[0][0][:, 1]).all()
    torch.testing.assert_close(found[1], found[0])


def test_training_computes_all_heads_together(monkeypatch):
    made = tiny("wan")
    sparse.enable(made.model, "sol", tau=0.5, min_tokens=0)
    monkeypatch.setattr(_sizes, "SLICE", 1)
    grads = []
    for size in (1, 1 << 24):
        monkeypatch.setattr(_sizes, "SLICE", size)
        made.model.zero_grad()
        made.model(**made.inputs, return_dict=False)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in made.model.parameters() if p.grad is not None])
    assert grads[0]
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))
