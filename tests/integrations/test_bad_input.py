"""What users give by mistake to the functions that take settings: an error of one line that names
the argument, or no error; nothing is written or enabled."""

import inspect
import json

import pytest
import tiny_diffusion
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")

from sparse_fmha import explore
from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations import transformers
from sparse_fmha.integrations._diffusion_table import METHODS, options_of

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(-2, 9), st.just(float("nan")),
    st.sampled_from(["", "x", "0-1", "3x3", "default", "layer 0"]), st.just(b"x"), st.just(object),
)  # fmt: skip
keys = st.one_of(st.integers(-1, 2), st.sampled_from(["a", "default", "layer 0"]))
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.lists(scalars, max_size=3).map(tuple),
    st.dictionaries(keys, scalars, max_size=2),
    st.lists(st.dictionaries(keys, scalars, max_size=2), max_size=2),
    st.dictionaries(keys, st.dictionaries(keys, scalars, max_size=2), max_size=2),
)
WAN = tiny_diffusion.make("wan").model
PATHS = ("out", "preset", "layers")  # a path of no file is an OSError
DEFAULTS = {
    "enable": (lambda **x: sparse.enable(WAN, **x), sparse.enable, {"method": "sol"}),
    "presets": (lambda **x: sparse.presets(WAN, **x), sparse.presets, {}),
    "calibrate": (
        lambda **x: sparse.calibrate(WAN, **x),
        sparse.calibrate,
        {"runs": lambda: None, "method": "cube_top_k"},
    ),
    "register": (transformers.register, transformers.register, {}),
    "explore": (explore, explore, {"grid": (4, 4), "window": (3, 3), "out": "/nowhere/x.html"}),
}
# Arguments by which another one is wrong: a grid of one axis has no window of two.
# And the runs of "calibrate" here call no layer.
ALSO = {"grid": ("window",), "values": ("keep",), "by_step": ("options of method",)}
CASES = [
    (name, argument)
    for name, (_, function, _) in DEFAULTS.items()
    for argument, about in inspect.signature(function).parameters.items()
    if argument != "pipe_or_transformer" and about.kind != inspect.Parameter.VAR_KEYWORD
]


def message_of(call):
    """Of the error that a call raises, if it raises one."""
    try:
        call()
    except (TypeError, ValueError, OSError) as error:
        return error, str(error)
    finally:
        if sparse.is_enabled(WAN):
            sparse.disable(WAN)
    return None, ""


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A path that is drawn is of a file there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("drawn"))
        yield


@pytest.mark.parametrize(("name", "argument"), CASES)
@given(value=values)
@settings(max_examples=40, deadline=None)
def test_an_error_names_the_argument_in_one_line(name, argument, value):
    call, _, defaults = DEFAULTS[name]
    options = {**defaults, argument: value}
    if name == "enable" and argument in ("preset", "layers"):
        options.pop("method")
    error, message = message_of(lambda: call(**options))
    if isinstance(error, OSError):
        assert argument in PATHS or options.get("out") == "/nowhere/x.html"
    elif error is not None and not (
        argument in ("method", "layers") and "must be given" in message
    ):
        runs = ("runs must call layer 0",) if name == "calibrate" else ()
        assert "\n" not in message
        assert any(word in message for word in (argument, *ALSO.get(argument, ()), *runs))


NEEDED = {
    "neighborhood": {"window": 3},
    "block_sparse": {"mask": lambda q, k: None},
    "sliding_tile": {"tile": (1, 1, 1), "window": (1, 1, 1)},
    "skip": {"threshold": 0.1},
}
OPTIONS = [(method, option) for method in METHODS for option in options_of(method)]


@pytest.mark.parametrize(("method", "option"), OPTIONS)
@given(value=values)
@settings(max_examples=40, deadline=None)
def test_an_error_names_the_option_in_one_line(method, option, value):
    options = {**NEEDED.get(method, {}), option: value}
    error, message = message_of(lambda: sparse.enable(WAN, method, **options))
    if error is not None and not isinstance(error, OSError):  # skip's calibration is a path
        assert "\n" not in message
        assert option in message or any(word in message for word in BESIDE.get(option, ()))


# Words of errors about options that are not what the value itself is: how it goes with others.
BESIDE = {
    "block": ("block_q",),
    "threshold": ("sparsity",),
    "extra_tokens": ("rest",),
}
GOOD = {"models": ["WanTransformer3DModel"], "source": "s", "figure": "f", "method": "sol"}


@pytest.mark.parametrize("key", [*GOOD, "options", "layers", "by_step", "grid", "dense_layers"])
@given(value=values)
@settings(max_examples=40, deadline=None)
def test_an_error_of_a_preset_file(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("presets") / "mine.json"
    path.write_text(json.dumps({**GOOD, key: value}, default=str), encoding="utf-8")
    error, message = message_of(lambda: sparse.enable(WAN, preset=path))
    if error is not None:
        assert "\n" not in message
        assert any(word in message for word in (key, "preset", "method", "options"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "{}"])
def test_a_file_that_is_no_preset(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"preset must be a JSON file.*mine\.json"):
        sparse.enable(WAN, preset=path)
    with pytest.raises((ValueError, TypeError), match="layers"):
        transformers.register("mine", layers=path)


def test_one_run_is_as_a_list_of_one(tmp_path):
    tiny = tiny_diffusion.make("wan")
    options = {"method": "cube_top_k", "error": 0.5, "values": (0.5, 1.0)}
    for name, runs in (("one", tiny), ("listed", [tiny])):
        sparse.calibrate(tiny.model, runs, **options).save(tmp_path / f"{name}.json")
    one, listed = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("one", "listed"))
    assert one == listed
