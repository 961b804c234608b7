"""Denoising runs that take turns on one transformer: each has its own first steps."""

import copy
import gc
import itertools
import threading
import types

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_diffusion import MAKERS, make

from sparse_fmha.integrations import diffusers as sparse
from sparse_fmha.integrations._diffusion_steps import Request, Steps

SCHEDULES = {
    "same": [(900, 700, 400, 100)] * 2,
    "other lengths": [(1000, 750, 500, 250), tuple(range(1000, 100, -100))],
    "one begins lower": [(900, 700, 400, 100), (600, 300, 50)],
}
text = "encoder_hidden_states"


def request(tiny, times, out, *, request=None, **inputs):
    """A run that hands back control after each call, two calls a step."""
    for t in times:
        for _ in range(2):
            if request is None:
                out.append(tiny(t, **inputs))
            else:
                with request:
                    out.append(tiny(t, **inputs))
            yield


def orders(lengths):
    """Ways to take turns: one after the other, in turn, and in bursts."""
    yield [0] * lengths[0] + [1] * lengths[1]
    turns = itertools.zip_longest([0] * lengths[0], [1] * lengths[1])
    yield [i for pair in turns for i in pair if i is not None]
    yield [0] * 5 + [1] * lengths[1] + [0] * (lengths[0] - 5)
    yield [0] * 3 + [1] * 4 + [0] * 2 + [1] * (lengths[1] - 4) + [0] * (lengths[0] - 5)


def alone(tiny, times, dense, **inputs):
    """What a run gives on its own."""
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=dense)
    out = []
    for _ in request(tiny, times, out, **inputs):
        pass
    sparse.disable(tiny.model)
    return out


def equal(found, expected):
    assert len(found) == len(expected)
    return [a.equal(b) for a, b in zip(found, expected, strict=True)] == [True] * len(found)


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("told_by", ["text", "request"])
def test_generators_in_one_thread(schedules, told_by):
    tiny = make("wan")
    texts = [{text: torch.randn_like(tiny.inputs[text])} for _ in range(2)]
    requests = [None, None]
    if told_by == "request":
        texts = [texts[0]] * 2
    expected = [alone(tiny, times, 2, **x) for times, x in zip(schedules, texts, strict=True)]
    for order in orders([2 * len(times) for times in schedules]):
        sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
        if told_by == "request":
            requests = [sparse.Request(), sparse.Request()]
        out = [[], []]
        runs = [
            request(tiny, times, o, request=r, **x)
            for times, o, r, x in zip(schedules, out, requests, texts, strict=True)
        ]
        for i in order:
            next(runs[i])
        sparse.disable(tiny.model)
        assert equal(out[0], expected[0])
        assert equal(out[1], expected[1])


@pytest.mark.parametrize("name", MAKERS)
def test_generators_with_one_text(name):
    """Runs of one schedule do not overtake each other, so the timestep tells them apart."""
    tiny = make(name)
    times = SCHEDULES["same"][0]
    expected = alone(tiny, times, 2)
    for order in orders([2 * len(times)] * 2):
        sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
        out = [[], []]
        runs = [request(tiny, times, o) for o in out]
        for i in order:
            next(runs[i])
        sparse.disable(tiny.model)
        assert equal(out[0], expected)
        assert equal(out[1], expected)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
def test_threads_with_one_text(name, schedules):
    tiny = make(name)
    expected = [alone(tiny, times, 1) for times in schedules]
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=1)
    out, turn = [[], []], threading.Barrier(2)

    def work(i):
        for _ in request(tiny, schedules[i], out[i]):
            if len(out[i]) < 6:
                turn.wait(60)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal(out[0], expected[0])
    assert equal(out[1], expected[1])


def test_copies_count_by_themselves():
    tiny = make("wan")
    dense = tiny(700)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=1)
    tiny(900)
    other = copy.copy(tiny)
    other.model = copy.deepcopy(tiny.model)
    other(900)
    assert not tiny(700).equal(dense)
    assert not other(700).equal(dense)


def test_runs_that_cannot_be_told_apart():
    """One thread, one text, two schedules: an error that says what to do, where it matters."""
    tiny = make("wan")
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
    for t in (900, 950, 700):
        tiny(t)
    with pytest.raises(
        RuntimeError, match="runs with first_dense_steps = 2, one text and one thread must have one"
    ):
        tiny(650)
    with sparse.Request():
        tiny(650)
    sparse.disable(tiny.model)
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, first_dense_steps=2)
    for t in (1000, 1000, 750):
        tiny(t)
    with pytest.raises(
        RuntimeError, match=r"timestep 980 that is step 1 .* or step 0 of one that b"
    ):
        tiny(980)


def test_calls_without_a_timestep():
    steps = Steps(1)
    with pytest.raises(
        ValueError, match="timestep must be given to count first_dense_steps = 1, got None"
    ):
        steps.is_dense(None, None, None)


def test_a_text_that_comes_later_in_a_run():
    """Guidance that begins late is in the step that the call before it is in."""
    steps = Steps(2)
    prompt, none = torch.zeros(1), torch.zeros(1)
    model = object()
    assert steps.is_dense(900, prompt, model)
    assert steps.is_dense(700, prompt, model)
    assert not steps.is_dense(400, prompt, model)
    assert not steps.is_dense(400, none, model)
    assert not steps.is_dense(100, none, model)


def test_another_text_begins_another_run():
    """Where the text of a run is kept, one not seen before is not its own."""
    steps, model = Steps(1), object()
    one, two = torch.zeros(1), torch.zeros(1)
    assert steps.is_dense(900, one, model)
    with pytest.warns(
        UserWarning, match="a call at timestep 800, after one at 900, as the first of a run"
    ):
        assert steps.is_dense(800, two, model)
    assert not steps.is_dense(700, one, model)
    assert not steps.is_dense(600, two, model)


def test_views_of_a_text_are_the_text():
    steps, model = Steps(1), object()
    both = torch.zeros(2, 3)
    assert steps.is_dense(900, both[:1], model)
    assert steps.is_dense(900, both[1:], model)
    assert not steps.is_dense(700, both[:1], model)
    assert not steps.is_dense(700, both[1:], model)


def test_a_run_goes_on_in_another_thread_when_its_own_is_over():
    steps, out = Steps(1), []
    kept = torch.zeros(1)
    for t in (900, 700, 400):
        thread = threading.Thread(target=lambda t=t: out.append(steps.is_dense(t, kept, None)))
        thread.start()
        thread.join()
        gc.collect()
    assert out == [True, False, False]


def test_a_request_in_several_threads_and_models():
    steps, one, out = Steps(2), Request(), []

    def call(t, model):
        with one:
            out.append(steps.is_dense(t, torch.zeros(1), model))

    for t in (900, 900, 700, 700, 400, 400, 900):
        thread = threading.Thread(target=call, args=(t, object()))
        thread.start()
        thread.join()
    assert out == [True] * 4 + [False] * 2 + [True]


def test_requests_are_inside_each_other_and_end_after_errors():
    steps, outer, inner = Steps(1), Request(), Request()
    with outer:
        assert steps.is_dense(900, None, None)
        with (
            pytest.raises(
                ValueError, match="timestep must be given to count first_dense_steps = 1, got None"
            ),
            inner,
        ):
            steps.is_dense(None, None, None)
        with inner:
            assert steps.is_dense(800, None, None)
        assert not steps.is_dense(700, None, None)
    with inner:
        assert not steps.is_dense(600, None, None)
    assert steps.is_dense(500, None, None)


def test_many_runs_are_not_kept():
    steps = Steps(1)
    for i in range(600):
        steps.is_dense(900 + i % 2, torch.zeros(1), None)
    assert len(steps.runs) <= 256
    del i


def test_steps_of_two_transformers_of_a_pipeline_are_copied_together():
    one, two = make("wan"), make("wan")
    two.inputs = one.inputs
    dense = two(700)
    pipe = types.SimpleNamespace(transformer=one.model, transformer_2=two.model)
    sparse.enable(pipe, "neighborhood", window=one.window, first_dense_steps=1)
    pipe = copy.deepcopy(pipe)
    one.model, two.model = pipe.transformer, pipe.transformer_2
    one(900)
    assert not two(700).equal(dense)
