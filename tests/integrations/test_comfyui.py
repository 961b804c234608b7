"""The node for ComfyUI, against stubs of the parts of ComfyUI that it is called by."""

import importlib.util
import logging
import types

import pytest
import torch

from sparse_fmha import reference
from sparse_fmha.integrations import _comfyui_attention, comfyui

HEADS, DIM = 2, 16


class Patcher:
    """ComfyUI's ModelPatcher: clones have options of their own."""

    def __init__(self, model, options=None, wrappers=()):
        self.model, self.wrappers = model, list(wrappers)
        self.model_options = {"transformer_options": dict(options or {})}

        self.callbacks = []

    def clone(self):
        return Patcher(self.model, self.model_options["transformer_options"], self.wrappers)

    def get_model_object(self, name):
        assert name == "model_sampling"
        return types.SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def add_callback_with_key(self, kind, key, callback):
        assert (kind, key) == ("on_prepare_state", "sparse_fmha")
        self.callbacks.append(callback)

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert (kind, key) == ("diffusion_model", "sparse_fmha")
        self.wrappers.append(wrapper)

    def __call__(self, latent, text, **options):
        for callback in self.callbacks:
            callback(self, None, self.model_options)
        options = {**self.model_options["transformer_options"], **options}
        call = self.model.forward
        for wrapper in reversed(self.wrappers):
            executor = Executor(call, self.model)
            call = lambda *args, w=wrapper, e=executor: w(e, *args)  # noqa: E731
        return call(latent, torch.tensor([1.0]), text, options)


class Executor:
    def __init__(self, call, class_obj):
        self.call, self.class_obj = call, class_obj

    def __call__(self, *args):
        return self.call(*args)


def own_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
                  skip_output_reshape=False, **kwargs):  # fmt: skip
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scale = kwargs.get("scale")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(options, *args, **kwargs):
    """As ComfyUI's decorator of attention functions calls an override."""
    kwargs["transformer_options"] = options
    override = options.get("optimized_attention_override")
    if override is None:
        return own_attention(*args, **kwargs)
    return override(own_attention, *args, **kwargs)


class Model:
    """Attention over the latent's tokens and those of the text, in four blocks."""

    def __init__(self, patch_size, before=None, reshaped=False, mask=None):
        self.patch_size, self.before, self.reshaped = patch_size, before, reshaped
        self.mask = mask

    def forward(self, latent, timestep, text, options):
        x = latent.flatten(2).transpose(1, 2).contiguous()
        for index in range(4):
            options["block_index"] = index
            x = torch.nn.functional.layer_norm(x, x.shape[-1:])  # as of residual blocks
            joint = x
            if self.before is not None:
                joint = torch.cat([text, x] if self.before else [x, text], 1)
            given = dict(heads=HEADS, mask=self.mask)
            if self.reshaped:
                heads = joint.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                out = attention(
                    options, heads, heads, heads, skip_reshape=True, skip_output_reshape=True,
                    **given,
                )  # fmt: skip
                out = out.transpose(1, 2).flatten(2)
            else:
                out = attention(options, joint, joint, joint, **given)
            if self.before is not None:
                start = text.shape[1] if self.before else 0
                out = out[:, start : start + x.shape[1]]
            x = x + out
            x = x + attention(options, x, text, text, heads=HEADS)  # cross-attention
        return x


def kind(name, *args, **options):
    return type(name, (Model,), {})(*args, **options)


GRID, IMAGE = (3, 6, 7), (9, 11)
MODELS = {
    "Wan": lambda **o: (kind("WanModel", (1, 1, 1), **o), GRID, 0),
    "Hunyuan": lambda **o: (kind("HunyuanVideo", (1, 1, 1), False, **o), GRID, 5),
    "Flux": lambda **o: (kind("Flux", 1, True, **o), IMAGE, 5),
}
DEFAULTS = {
    name: spec[1].get("default") if len(spec) > 1 else None
    for inputs in comfyui.SparseAttention.INPUT_TYPES().values()
    for name, spec in inputs.items()
}
SMALL = {"window_frames": 2, "window_height": 3, "window_width": 4, "min_tokens": 0,
         "start_percent": 0.0}  # fmt: skip


def inputs(grid):
    torch.manual_seed(0)
    return torch.randn(2, HEADS * DIM, *grid), torch.randn(2, 5, HEADS * DIM)


def patched(model, method="window", **changed):
    given = {**DEFAULTS, **SMALL, **changed, "method": method, "model": Patcher(model)}
    (found,) = comfyui.SparseAttention().apply(**given)
    assert found is not given["model"]
    assert not given["model"].wrappers
    assert not given["model"].model_options["transformer_options"]
    return found


def masked(model, grid, plain, visible):
    """What the model gives with masked attention over grid and text."""
    before = plain if model.before else 0
    model.mask = torch.nn.functional.pad(
        visible, (before, plain - before, before, plain - before), value=True
    )
    out = Patcher(model)(*inputs(grid))
    model.mask = None
    return out


@pytest.mark.parametrize("reshaped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_window_is_masked_attention(name, reshaped):
    model, grid, plain = MODELS[name](reshaped=reshaped)
    window = (2, 3, 4)[-len(grid) :]
    expected = masked(model, grid, plain, reference.neighborhood_mask(grid, window))
    dense = Patcher(model)(*inputs(grid))
    assert not torch.allclose(dense, expected, atol=1e-2)
    found = patched(model)(*inputs(grid))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = patched(model, window_frames=0, window_height=99, window_width=0)(*inputs(grid))
    torch.testing.assert_close(whole, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sol-attn", {"tau": 0.0}),
        ("sla", {"keep_percent": 100.0}),
        ("vsa", {"keep_percent": 100.0}),
        ("subblock", {"keep_percent": 100}),
    ],
)
def test_methods(name, method, options):
    model, grid, _ = MODELS[name]()
    dense = Patcher(model)(*inputs(grid))
    found = patched(model, method, **options)(*inputs(grid))
    if method != "sol-attn":
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()


def blocks_of(x):
    return x.split(64, 2)


def routed(q, k, v, exact, extra_tokens=0):
    """[B, H, N, D]: keys of exact blocks `[n, n]` and single ones, and a mean for each other
    block; in fp64, for a number of tokens that 64 divides."""
    q, k, v = q.double(), k.double(), v.double()
    tokens = torch.arange(k.shape[2])
    out = []
    for i, rows in enumerate(blocks_of(q)):
        mean = rows.mean(2, keepdim=True)
        left = ~exact[i]
        scores = (mean @ k.mT).masked_fill(exact[i][tokens // 64], -torch.inf)
        best = scores.topk(min(extra_tokens, int(left.sum()) * 64), -1).indices
        single = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        seen = single | exact[i][tokens // 64]
        scale = q.shape[-1] ** -0.5
        logits = (scale * rows @ k.mT).masked_fill(~seen, -torch.inf)
        counts = (~seen).unflatten(-1, (-1, 64)).sum(-1).clamp(min=1)
        means = [
            (x[:, :, None] * (~seen)[..., None]).unflatten(3, (-1, 64)).sum(4)[:, :, 0]
            / counts.transpose(-1, -2)
            for x in (k, v)
        ]
        rest = (scale * mean @ means[0].mT + counts.log()).expand(-1, -1, rows.shape[2], -1)
        none = (~seen).unflatten(-1, (-1, 64)).any(-1).logical_not()
        logits = torch.cat([logits, rest.masked_fill(none, -torch.inf)], -1)
        out.append(logits.softmax(-1) @ torch.cat([v, means[1]], 2))
    return torch.cat(out, 2)


def near(n):
    at = torch.arange(n)
    return (at[:, None] - at).abs() <= 1


LARGE = (5, 8, 16)  # 640 tokens


def override_of(method, **changed):
    node = patched(kind("WanModel", (1, 1, 1)), method, **changed)
    return node.model_options["transformer_options"]["optimized_attention_override"]


def heads_of(tokens):
    torch.manual_seed(1)
    return [torch.randn(1, HEADS, tokens, DIM) for _ in range(3)]


@pytest.mark.parametrize("extra_tokens", [0, 64, 256])
@pytest.mark.parametrize(
    ("method", "options"), [("sol-attn", {"tau": 4.0}), ("sla", {"keep_percent": 0.5})]
)
def test_extra_tokens(method, options, extra_tokens):
    """Of blocks that are not exact; `sla` has one beside the diagonal, which it may be of."""
    override = override_of(method, extra_tokens=extra_tokens, **options)
    override.running.place = _comfyui_attention.Place("WanModel", LARGE, 0)
    q, k, v = heads_of(640)
    found = override(own_attention, q, k, v, HEADS, skip_reshape=True, skip_output_reshape=True)
    if method == "sol-attn":
        expected = routed(q, k, v, near(10), extra_tokens)
    else:
        means = [torch.stack([x.mean(2) for x in blocks_of(t)], 2) for t in (q, k)]
        best = (means[0] @ means[1].mT).argmax(-1)
        exact = near(10) | (best[..., None] == torch.arange(10))
        expected = torch.cat(
            [
                routed(*(x[:, h : h + 1] for x in (q, k, v)), exact[0, h], extra_tokens)
                for h in range(HEADS)
            ],
            1,
        )
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sink_conditioning", ["exact_kv", "exact_kv_and_rows", "off"])
@pytest.mark.parametrize("audio", [True, False])
def test_conditioning_of_minimax_h3(sink_conditioning, audio):
    """192 tokens before the video are keys of all; the audio's from 100 on, or all, see all."""
    override = override_of("sol-attn", tau=4.0, extra_tokens=0, sink_conditioning=sink_conditioning)
    middle = [(100, 192, "audio")] if audio else [(100, 192, "ref")]
    segments = [(0, 100, "text"), *middle, (192, 832, "video")]
    options = {"minimax_h3_layout": h3(segments, 832, LARGE)}
    q, k, v = heads_of(832)
    found = override(
        own_attention, q, k, v, HEADS, skip_reshape=True, skip_output_reshape=True,
        transformer_options=options,
    )  # fmt: skip
    exact = near(13)
    if sink_conditioning != "off":
        exact[:, :3] = True
    if sink_conditioning == "exact_kv_and_rows":
        exact[1 if audio else 0 : 3] = True
    torch.testing.assert_close(found.double(), routed(q, k, v, exact), atol=2e-5, rtol=2e-5)


def test_conditioning_has_no_effect_where_there_is_none():
    q, k, v = heads_of(640)
    outs = []
    for sink_conditioning in ("exact_kv", "exact_kv_and_rows", "off"):
        override = override_of("sol-attn", sink_conditioning=sink_conditioning)
        override.running.place = _comfyui_attention.Place("WanModel", LARGE, 0)
        outs.append(override(own_attention, q, k, v, HEADS, skip_reshape=True))
    assert outs[0].equal(outs[1])
    assert outs[0].equal(outs[2])


@pytest.mark.parametrize("method", ["window", "vsa", "subblock"])
def test_what_has_no_effect_is_told(method, caplog):
    patched(kind("WanModel", (1, 1, 1)), method, verbose=True)
    assert caplog.messages == [
        "sparse_fmha: extra_tokens and sink_conditioning have no effect on the method "
        f"{method!r}, where other tokens are exact"
    ]
    caplog.clear()
    patched(kind("WanModel", (1, 1, 1)), "sol-attn", verbose=True)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"method": "sol"}, ValueError, "method must be window, sol-attn, sla, vsa or subblock"),
        ({"sink_conditioning": "on"}, ValueError,
         "sink_conditioning must be exact_kv, exact_kv_and_rows or off, got 'on'"),
        ({"extra_tokens": -64}, ValueError, "extra_tokens must be at least 0, got -64"),
        ({"extra_tokens": "many"}, TypeError, "extra_tokens must be an int, got 'many'"),
        ({"dense_blocks": "first"}, ValueError, "dense_blocks must be like"),
    ],
)  # fmt: skip
def test_bad_inputs(changed, error, message):
    with pytest.raises(error, match=message):
        patched(kind("WanModel", (1, 1, 1)), **changed)


def test_what_stays_dense(caplog):
    model, grid, _ = MODELS["Wan"]()
    dense = Patcher(model)(*inputs(grid))
    late, early = {"sigmas": torch.tensor([0.3])}, {"sigmas": torch.tensor([1.0])}
    for changed, options, reason in (
        ({"min_tokens": 127}, {}, "126 tokens are fewer than min_tokens"),
        ({"dense_blocks": "0, 1-3"}, {}, "of dense_blocks"),
        ({"start_percent": 0.2}, early, "of start_percent and end_percent"),
        ({"end_percent": 0.6}, late, "of start_percent and end_percent"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = patched(model, verbose=True, **changed)(*inputs(grid), **options)
        assert found.equal(dense)
        assert caplog.messages[1:] == [f"sparse_fmha: attention stays dense: {reason}"]
    assert not patched(model, start_percent=0.2)(*inputs(grid), **late).equal(dense)
    assert not patched(model, dense_blocks="0,2-3")(*inputs(grid)).equal(dense)


def test_tokens_of_unknown_places_stay_dense(caplog):
    model = kind("Other", (1, 1, 1), True)
    dense = Patcher(model)(*inputs(GRID))
    assert patched(model, verbose=True)(*inputs(GRID)).equal(dense)
    assert "5 tokens of Other are not of the grid (3, 6, 7)" in caplog.text
    model = kind("Other", None)
    dense = Patcher(model)(*inputs(GRID))
    assert patched(model, verbose=True)(*inputs(GRID)).equal(dense)
    assert "of an unknown kind" in caplog.text


def test_why_a_model_is_never_sparse_is_told_once_without_verbose(caplog):
    """Not what the settings keep dense."""
    found = {}
    for name, model, grid in (
        ("others", kind("Other", (1, 1, 1), True), GRID),
        ("unknown", kind("Other", None), GRID),
        ("mask", MODELS["Wan"](mask=torch.rand(126, 126) < 0.5)[0], GRID),
        ("settings", MODELS["Wan"]()[0], GRID),
    ):
        caplog.clear()
        node = patched(model, min_tokens=127 if name == "settings" else 0)
        for _ in range(2):
            node(*inputs(grid))
        found[name] = caplog.messages
    start = "sparse_fmha: attention stays dense: "
    assert found == {
        "others": [start + "5 tokens of Other are not of the grid (3, 6, 7)"],
        "unknown": [start + "the model or its latent is of an unknown kind"],
        "mask": [start + "there is a mask"],
        "settings": [],
    }


def test_blocks_without_numbers(caplog):
    """Dense blocks cannot be found then, which is told."""

    class Unnumbered(Model):
        def forward(self, latent, timestep, text, options):
            options = Silent(options)
            return super().forward(latent, timestep, text, options)

    class Silent(dict):
        def __setitem__(self, key, value):
            assert key == "block_index"

    model = Unnumbered((1, 1, 1))
    expected = patched(model)(*inputs(GRID))
    assert not caplog.messages
    assert patched(model, dense_blocks="0-3")(*inputs(GRID)).equal(expected)
    assert caplog.messages == [
        "sparse_fmha: dense_blocks has no effect, as Unnumbered does not tell numbers of blocks"
    ]


def test_fewer_heads_of_keys():
    """With enable_gqa, as Krea 2 has them: [B, N, Hkv * D] beside [B, N, H * D]."""
    node = comfyui.SparseAttention()
    (found,) = node.apply(
        **{**DEFAULTS, **SMALL, "method": "window", "model": Patcher(MODELS["Wan"]()[0])}
    )
    override = found.model_options["transformer_options"]["optimized_attention_override"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 126, heads * DIM) for heads in (4, 2, 2))
    override.running.place = _comfyui_attention.Place("WanModel", GRID, 0)
    out = override(own_attention, q, k, v, 4, enable_gqa=True)
    visible = reference.neighborhood_mask(GRID, (2, 3, 4))
    given = (x.unflatten(-1, (-1, DIM)) for x in (q, k, v))
    expected = reference.attention(*given, visible)[0].flatten(2).float()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    text = torch.randn(1, 5, 2 * DIM)  # cross-attention goes on as it came

    def own(func_q, func_k, func_v, heads, **options):
        assert (func_q.equal(q), func_k.equal(text), func_v.equal(text)) == (True,) * 3
        assert (heads, options["enable_gqa"]) == (4, True)
        return func_q

    assert override(own, q, text, text, 4, enable_gqa=True).equal(q)


def test_masks_and_earlier_overrides():
    model, grid, _ = MODELS["Wan"](mask=torch.rand(126, 126) < 0.5)
    dense = Patcher(model)(*inputs(grid))
    assert patched(model)(*inputs(grid)).equal(dense)
    calls = []

    def earlier(func, *args, **kwargs):
        calls.append(kwargs["mask"])
        return func(*args, **kwargs)

    given = Patcher(model, {"optimized_attention_override": earlier})
    (found,) = comfyui.SparseAttention().apply(given, "window", 2, 3, 4, 1.0, 0.5, **{
        name: {**DEFAULTS, **SMALL}[name]
        for name in ("start_percent", "end_percent", "dense_blocks", "min_tokens", "verbose")
    })  # fmt: skip
    assert found(*inputs(grid)).equal(dense)
    assert len(calls) == 8


def test_the_folder_is_loaded_as_comfyui_does(tmp_path):
    folder = comfyui.write_node(tmp_path)
    spec = importlib.util.spec_from_file_location("nodes_of_ours", folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module, types.ModuleType)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (node,) = module.NODE_CLASS_MAPPINGS.values()
    assert node.RETURN_TYPES == ("MODEL",)
    assert callable(getattr(node(), node.FUNCTION))


def test_dense_blocks():
    assert _comfyui_attention.blocks_of("0, 1, 47-49") == {0, 1, 47, 48, 49}
    assert _comfyui_attention.blocks_of("5 - 3,7 -8") == {3, 4, 5, 7, 8}  # as ComfyUI's own node
    assert _comfyui_attention.blocks_of("") == set()
    for text in ("a", "3-", "-3", "1-2-3"):
        with pytest.raises(ValueError, match="dense_blocks must be like '0, 1, 47-49'"):
            _comfyui_attention.blocks_of(text)


def test_the_node_stays_on_top():
    """A node that comes later is what stays dense runs on."""
    model, grid, _ = MODELS["Wan"]()
    sparse = patched(model)(*inputs(grid))
    found, calls = patched(model), []

    def later(func, *args, **kwargs):
        calls.append(None)
        return func(*args, **kwargs)

    found.model_options["transformer_options"]["optimized_attention_override"] = later
    for _ in range(2):
        assert found(*inputs(grid)).equal(sparse)
    assert len(calls) == 8  # cross-attention


def h3(segments, tokens, grid):
    signature = (5, grid[0], 2 * grid[1], 2 * grid[2], 4)
    return types.SimpleNamespace(segments=segments, seq_len=tokens, signature=signature)


def test_minimax_h3_says_where_its_video_is():
    """Text, audio and video in one sequence, which the latent does not show."""
    model = kind("MiniMaxH3Model", None, True)
    expected = masked(model, GRID, 5, reference.neighborhood_mask(GRID, (2, 3, 4)))
    segments = [(0, 2, "text"), (2, 5, "audio"), (5, 131, "video")]
    node = patched(model)
    found = node(*inputs(GRID), minimax_h3_layout=h3(segments, 131, GRID))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    dense = Patcher(model)(*inputs(GRID))
    for layout in (
        h3(segments, 130, GRID),
        h3(segments[:2], 131, GRID),
        h3(segments, 131, (3, 6, 6)),
    ):
        assert node(*inputs(GRID), minimax_h3_layout=layout).equal(dense)


def test_names_and_defaults_of_comfyui_itself():
    """Of its node "Model Sparse Attention"."""
    own = {"tau": 1.3, "keep_percent": 10.0, "start_percent": 0.2, "end_percent": 1.0,
           "dense_blocks": "", "min_tokens": 12288, "verbose": False,
           "extra_tokens": 256, "sink_conditioning": "exact_kv_and_rows"}  # fmt: skip
    assert {name: DEFAULTS[name] for name in own} == own
    assert {"sol-attn", "sla", "vsa"} < set(comfyui.METHODS)


def test_a_latent_of_video_and_audio_shows_no_grid():
    calls = []
    (wrapper,) = patched(kind("Other", (1, 1, 1))).wrappers
    executor = Executor(lambda *args: calls.append(args), kind("Other", (1, 1, 1)))
    wrapper(executor, [torch.zeros(1), torch.zeros(1)], torch.tensor([1.0]), None)
    assert len(calls) == 1
