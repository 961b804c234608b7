"""The plug-in for vLLM-Omni, against a stub of its dispatcher (tests/support/server_stubs.py has
those of other servers). vLLM-Omni itself does not run here."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from sparse_fmha import reference
from sparse_fmha.integrations import vllm_omni

GRID, SCALE = (4, 5, 6), 0.3
WINDOW = {"window": [3, 3, 2], "min_tokens": 0}


class Dispatcher:
    """Merges the parameters of a configuration, a call and a model, as vLLM-Omni's does."""

    def __init__(self, function, **static):
        self.function, self.static = function, static

    def __call__(self, q, k, v, step=None, total=None, extra=None, grid=GRID):
        samples = q.shape[0]
        per_forward = {
            "denoise_step_idx": None if step is None else torch.full((samples,), step),
            "total_denoise_steps": None if total is None else torch.full((samples,), total),
            "latent_shape": torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]] * samples),
            "patch_size": torch.tensor([[1, 2, 2]] * samples),
            "total_latent_frames": grid[0],
            "patches_per_frame": grid[1] * grid[2],
        }
        merged = {**self.static, **per_forward, **(extra or {})}
        params = {name: value for name, value in merged.items() if value is not None}
        return self.function(q, k, v, params, is_causal=False, softmax_scale=SCALE)


def plug_in():
    """The function that the entry point names."""
    tomllib = pytest.importorskip("tomllib")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["vllm_omni.sparse_attn"]
    module, _, name = points["sparse_fmha"].partition(":")
    return getattr(importlib.import_module(module), name)


def inputs(others=0):
    torch.manual_seed(0)
    return [torch.randn(2, 120 + others, heads, 16) for heads in (4, 2, 2)]


def exact(q, k, v, window=None, before=0, behind=0):
    tokens = q.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    if window is not None:
        image = reference.neighborhood_mask(GRID, window)
        mask = torch.nn.functional.pad(image, (before, behind) * 2, value=True)
    return reference.attention(q, k, v, mask, SCALE)[0].float()


def close(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_signature():
    names = list(inspect.signature(plug_in()).parameters)
    assert names == ["query", "key", "value", "params", "is_causal", "softmax_scale"]
    # Masks and spans are not taken: the dispatcher then refuses calls that have them.
    assert not hasattr(plug_in(), "capabilities")


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (3, 0), (0, 3), (2, 5)])
def test_a_window(before, behind):
    given = inputs(before + behind)
    found = Dispatcher(plug_in(), **WINDOW, before=before)(*given)
    close(found, exact(*given, (3, 3, 2), before, behind))
    assert (found - exact(*given)).abs().max() > 0.01


@pytest.mark.parametrize(
    "options", [{"method": "subblock", "keep": 0.5}, {"method": "cube_top_k", "keep": 0.5},
                {"method": "skip", "threshold": 0.0}]
)  # fmt: skip
def test_other_methods(options):
    given = inputs()
    found = Dispatcher(plug_in(), min_tokens=0, **options)(*given)
    assert found.isfinite().all()
    assert ((found - exact(*given)).abs().max() < 1e-4) == (options["method"] == "skip")


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [
        (2, 0, {0, 1}),
        (0.25, 0, {0, 1}),
        (0, 1, {4}),
        (0.2, 0.2, {0, 4}),
        (1.0, 0, set(range(5))),
        (0, 1.0, set(range(5))),
    ],
)
def test_dense_steps(first, last, dense):
    given = inputs()
    call = Dispatcher(plug_in(), **WINDOW, first_dense_steps=first, last_dense_steps=last)
    full, sparse = exact(*given), exact(*given, (3, 3, 2))
    for step in range(5):
        close(call(*given, step=step, total=5), full if step in dense else sparse)


def test_names_that_servers_add_are_ignored(monkeypatch):
    """As vLLM-Omni asks of plug-ins; a warning, once, as it may be a slip of the pen."""
    monkeypatch.setattr(vllm_omni, "REPORTS", vllm_omni.Reports())
    given, extra = inputs(), {"kv_cache_dtype": "fp8", "new": torch.zeros(2), "strde": 2}
    call = Dispatcher(plug_in(), **WINDOW)
    with pytest.warns(UserWarning, match="params of vLLM-Omni have") as warned:
        found = [call(*given, extra=extra) for _ in range(2)]
    close(torch.cat(found), exact(*given, (3, 3, 2)).repeat(2, 1, 1, 1))
    assert [str(x.message).partition(",")[0] for x in warned] == [
        f"params of vLLM-Omni have {name!r}" for name in ("new", "strde")
    ]
    with pytest.raises(TypeError, match="window must be given"):
        Dispatcher(plug_in(), min_tokens=0)(*given, extra={"windw": 3})


def test_few_tokens_are_dense():
    given = inputs()
    close(Dispatcher(plug_in(), window=[3, 3, 2])(*given), exact(*given))


@pytest.mark.parametrize(
    ("error", "match", "static", "call"),
    [
        (ValueError, "method must be one of", {"method": "none"}, {}),
        (ValueError, "params must have denoise_step_idx", {"first_dense_steps": 1}, {}),
        (ValueError, "params must have denoise_step_idx", {"last_dense_steps": 1}, {"step": 1}),
        (ValueError, "query must have at least the 210 tokens of the grid", {},
         {"grid": (7, 5, 6)}),
        (ValueError, "window", {"window": [5, 3, 2]}, {}),
    ],
)  # fmt: skip
def test_what_is_refused(error, match, static, call):
    with pytest.raises(error, match=match):
        Dispatcher(plug_in(), **{**WINDOW, **static})(*inputs(), **call)


def test_calls_that_are_not_self_attention_of_a_grid():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="key must have the 120 tokens of query, got 7"):
        Dispatcher(plug_in(), **WINDOW)(q, k[:, :7], v[:, :7])
    with pytest.raises(NotImplementedError, match="causal"):
        vllm_omni.attend(q, k, v, {}, True, SCALE)
    with pytest.raises(ValueError, match="latent_shape and patch_size"):
        vllm_omni.attend(q, k, v, {"window": 3}, False, SCALE)
    mixed = {"denoise_step_idx": torch.tensor([0, 3]), "first_dense_steps": 1}
    with pytest.raises(ValueError, match="must be dense or sparse for all samples"):
        Dispatcher(plug_in(), **WINDOW)(q, k, v, extra=mixed)
