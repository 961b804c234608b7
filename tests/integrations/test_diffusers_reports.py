"""Options of the bridge to diffusers that do nothing are reported, once by name."""

import warnings

import pytest

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend
from tiny_diffusion import MAKERS, make

from sparse_fmha.integrations import diffusers as sparse


def warned(tiny, *timesteps, method="neighborhood", **options):
    """What is reported of calls; `enable` may report, too."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sparse.enable(tiny.model, method, **options)
        for t in timesteps:
            tiny(t)
        sparse.disable(tiny.model)
    return [str(w.message) for w in seen if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("name", MAKERS)
def test_a_window_of_the_whole_grid(name):
    tiny = make(name)
    (message,) = warned(tiny, 900, 700, window=tiny.grid)
    assert f"{tiny.name}: window = {tiny.grid} has no effect: it covers the whole grid" in message


@pytest.mark.parametrize("name", MAKERS)
def test_a_stride_where_the_window_is_all_of_an_axis(name):
    tiny = make(name)
    rest = (2,) * (len(tiny.grid) - 1)
    ones = (1,) * len(rest)
    (message,) = warned(tiny, 900, 700, window=(tiny.grid[0], *rest), stride=(2, *ones))
    assert f"stride = {(2, *ones)} has no effect where window" in message
    assert not warned(tiny, 900, window=(tiny.grid[0], *rest), stride=(1, 2, *ones[1:]))


@pytest.mark.parametrize("name", MAKERS)
def test_all_blocks_are_dense(name):
    tiny = make(name)
    (message,) = warned(tiny, 900, window=tiny.window, dense_layers=range(tiny.layers))
    assert (
        message
        == f"method 'neighborhood' has no effect: dense_layers names all blocks of {tiny.name}"
    )
    assert not warned(tiny, 900, window=tiny.window, dense_layers=range(tiny.layers - 1))


@pytest.mark.parametrize("request_", [None, sparse.Request()], ids=["text", "request"])
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_runs_that_are_over_before_the_dense_steps_are(steps, request_):
    tiny, times = make("wan"), (900, 700, 400, 100) * 3
    if request_ is None:
        found = warned(tiny, *times, window=tiny.window, first_dense_steps=steps)
    else:
        with request_:
            found = warned(tiny, *times, window=tiny.window, first_dense_steps=steps)
    if steps < 4:
        assert not found
    else:
        assert found == [
            f"first_dense_steps = {steps} made a whole run dense: it had 4 steps before another "
            "run began"
        ]


@pytest.mark.parametrize("name", MAKERS)
def test_another_backend_chosen_after_enable(name):
    tiny = make(name)
    with attention_backend("native"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sparse.enable(tiny.model, "neighborhood", window=tiny.window, dense_layers=[0])
        tiny()
        assert not seen
        tiny.model.set_attention_backend("native")
        tiny(), tiny()
    (message,) = [str(w.message) for w in seen if "backend" in str(w.message)]
    assert message.startswith(
        f"enable() has no effect on block 1 of {tiny.name}: the attention backend 'native'"
    )


def test_options_that_do_something():
    tiny = make("wan")
    assert not warned(tiny, 900, 700, **tiny.options, dense_layers=[1], first_dense_steps=1)
    assert not warned(tiny, 900, method="dense", grid=tiny.grid)
