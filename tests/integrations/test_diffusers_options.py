"""Dense steps as numbers and shares, short calls, and what `enable` says about them."""

import copy
import types
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import make

from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_steps import Request, Steps

TIMES = (1000, 900, 800, 700, 600, 500, 400, 300, 200, 100)


class Pipeline:
    def __init__(self, model, times=TIMES, begin=None):
        self.transformer = model
        timesteps = torch.tensor(times, dtype=torch.float32)
        self.scheduler = types.SimpleNamespace(timesteps=timesteps, begin_index=begin)


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [
        (2, 0, range(2)),
        (0, 3, range(7, 10)),
        (0.2, 0.0, range(2)),
        (0.25, 0, range(3)),
        (1, 0.1, (0, 9)),
        (0.01, 0.01, (0, 9)),
        (0.5, 5, range(10)),
        (1.0, 0, range(10)),
        (0.0, 0, ()),
    ],
)
def test_first_and_last_steps(first, last, dense):
    """Of two runs, with two calls in each step."""
    steps, text = Steps(first, last, lambda: 10), torch.ones(1)
    for _ in range(2):
        for i, t in enumerate(TIMES):
            for _ in range(2):
                assert steps.is_dense(torch.tensor(t), text, None) == (i in dense)


def test_a_share_of_the_steps_of_a_pipeline():
    tiny = make("wan")
    dense = [tiny(t) for t in TIMES]
    pipe = Pipeline(tiny.model)
    options = {"first_dense_steps": 0.2, "last_dense_steps": 1}
    sparse.enable(pipe, "neighborhood", window=tiny.window, **options)
    found = [tiny(t).equal(expected) for t, expected in zip(TIMES, dense, strict=True)]
    assert found == [True] * 2 + [False] * 7 + [True]
    # Another schedule; one of an image, by its strength; one with two calls a step (Heun's).
    for times, begin, expected in (
        (TIMES[:5], None, [True] + [False] * 3 + [True]),
        (TIMES, 5, [True] + [False] * 3 + [True]),
        (sorted(2 * TIMES[:4], reverse=True)[:-1], 0, [True, False, False, True]),
    ):
        pipe.scheduler = Pipeline(None, times, begin).scheduler
        with sparse.Request():
            taken = list(dict.fromkeys(times[begin or 0 :]))
            found = [tiny(t).equal(dense[TIMES.index(t)]) for t in taken]
        assert found == expected


def test_a_transformer_alone_needs_a_request_for_shares():
    tiny = make("wan")
    expected = [tiny(t) for t in TIMES[:4]]
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, last_dense_steps=0.25)
    message = r"must be known for last_dense_steps = 0\.25: .*Request\(steps\)"
    with pytest.raises(ValueError, match=message):
        tiny(900)
    with pytest.raises(ValueError, match=message), Request():
        tiny(900)
    with Request(4):
        found = [tiny(t).equal(e) for t, e in zip(TIMES[:4], expected, strict=True)]
    assert found == [False] * 3 + [True]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Request(0)


def test_a_copy_has_no_pipeline():
    tiny = make("wan")
    pipe = Pipeline(tiny.model)
    sparse.enable(pipe, "neighborhood", window=tiny.window, first_dense_steps=0.5)
    tiny(900)
    tiny.model = copy.deepcopy(tiny.model)
    with pytest.raises(ValueError, match=r"must be known for first_dense_steps = 0\.5"):
        tiny(900)


def test_runs_that_cannot_be_distinguished_with_last_steps():
    """Which step a call is always matters to the last ones."""
    steps, text = Steps(0, 1, lambda: 10), torch.ones(1)
    for t in (900, 800, 700, 850):
        steps.is_dense(torch.tensor(t), text, None)
    with pytest.raises(RuntimeError, match="runs with last_dense_steps = 1, one text"):
        steps.is_dense(torch.tensor(600), text, None)


def told(tiny, *timesteps, **options):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sparse.enable(tiny.model, "neighborhood", window=tiny.window, **options)
        for t in timesteps:
            tiny(t)
        sparse.disable(tiny.model)
    return [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


def test_few_tokens_stay_dense_and_that_is_said_once():
    tiny = make("wan")
    dense = tiny()
    (message,) = told(tiny, 900, 700, min_tokens=121)
    assert message == (
        "WanTransformer3DModel: a call stays dense, as its 120 tokens are fewer than min_tokens = "
        "121"
    )
    sparse.enable(tiny.model, "neighborhood", window=(9, 9, 9), min_tokens=121)
    assert tiny().equal(dense)
    sparse.disable(tiny.model)
    assert not told(tiny, 900, min_tokens=120)


def test_videos_have_a_least_number_of_tokens(monkeypatch):
    monkeypatch.undo()  # what the other tests set
    assert sparse.MIN_TOKENS == 12288
    tiny, image = make("wan"), make("flux")
    dense = tiny()
    (message,) = told(tiny, 900)
    assert "fewer than min_tokens = 12288" in message
    assert not told(image, 900)
    sparse.enable(tiny.model, "dense")  # our kernel is as good for few tokens
    assert not tiny().equal(dense)


def test_reasons():
    tiny = make("wan", layers=3)
    options = {"first_dense_steps": 1, "dense_layers": [1], "verbose": True}
    assert told(tiny, 900, 900, 700, 400, 900, **options) == [
        "WanTransformer3DModel: the call at timestep 900 stays dense, by first_dense_steps = 1",
        "WanTransformer3DModel: blocks [1] stay dense, by dense_layers",
        "WanTransformer3DModel: blocks [0, 2] of 3 run Neighborhood: the grid 4x5x6 has 120 "
        "tokens, with 0 of text and references 120",
    ]


def test_the_time_that_is_told_is_the_model_s_own():
    """Also where it rises in a run."""
    tiny_images = pytest.importorskip("tiny_images")
    tiny = tiny_images.z_image()
    first, _ = told(tiny, 900, 800, first_dense_steps=1, verbose=True)
    assert first.startswith("ZImageTransformer2DModel: the call at timestep 0.1 stays dense")


def test_options_by_step():
    """The last holds for all steps from there on; two calls in each step; dense steps before."""
    tiny, shares = make("wan"), (0.9, 0.5, 0.25)
    outs = {}
    for keep in shares:
        sparse.enable(tiny.model, "cube_top_k", keep=keep)
        outs.update({(keep, t): tiny(t) for t in TIMES[:6]})
        sparse.disable(tiny.model)
    dense = tiny(TIMES[0])
    given = {"by_step": [{"keep": keep} for keep in shares], "keep": 1.0}
    for first in (0, 1):
        sparse.enable(tiny.model, "cube_top_k", **given, first_dense_steps=first)
        for _ in range(2):
            for step, t in enumerate(TIMES[:6]):
                for _ in range(2):
                    keep = shares[min(step - first, 2)]
                    expected = dense if step < first else outs[keep, t]
                    assert tiny(t).equal(expected)
        sparse.disable(tiny.model)
    for error, match, options in (
        (TypeError, "by_step must be given with a method", {"layers": {"default": {
            "method": "dense"}}, "by_step": [{"keep": 0.5}]}),
        (TypeError, "options of method 'sol' must be among", {"method": "sol",
                                                              "by_step": [{"keep": 0.5}]}),
        (ValueError, "keep must be", {"method": "cube_top_k", "by_step": [{"keep": 2.0}]}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            sparse.enable(tiny.model, **options)


def test_a_preset_by_step():
    preset = next(p for p in sparse.presets() if p.name == "cube-minimax-h3")
    assert len(preset.by_step) == 18
    assert preset.by_step[0] == {"keep": 0.55}
    assert preset.by_step[-1] == {"keep": 0.05}
