"""Any denoising runs that take turns or follow each other: each counts its own steps."""

import warnings

import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sparse_fmha.integrations._diffusion_steps import Steps


def schedules():
    """Timesteps that fall, as few as 1."""
    values = st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True)
    return values.map(lambda v: sorted(map(float, v), reverse=True))


def take_turns(steps, runs, random):
    """Each run is timesteps and the texts of its calls in each step."""
    turns = [i for i, (times, _) in enumerate(runs) for _ in times]
    random.shuffle(turns)
    places = [0] * len(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in turns:
            times, texts = runs[i]
            for each in texts:
                dense = steps.is_dense(times[places[i]], each, None)
                assert dense == (places[i] < steps.first), (i, times[places[i]])
            places[i] += 1


@settings(max_examples=100, deadline=None)
@given(st.lists(schedules(), min_size=1, max_size=4), st.integers(1, 5), st.randoms())
def test_any_runs_of_different_texts_take_turns(times, dense, random):
    """Each step with the prompt and without. None begins where another one stands later:
    its text would be taken for one that comes later in that run."""
    later = {t for each in times for t in each[1:]}
    assume(not any(each[0] in later for each in times))
    runs = [(each, (torch.zeros(1), torch.zeros(1))) for each in times]
    take_turns(Steps(dense), runs, random)


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.randoms())
def test_any_runs_of_one_text_and_schedule_take_turns(times, runs, calls, dense, random):
    texts = [torch.zeros(1)] * calls
    take_turns(Steps(dense), [(times, texts)] * runs, random)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
@example([(1, 0.0), (8, 0.0), (8, 0.875)], 1, False, True)  # one run of one step is over
def test_any_runs_one_after_the_other(runs, dense, kept, parts):
    """Of any number of steps; the text is one that is kept, or made anew in each step.

    Whole schedules that go beyond the dense steps are counted right. Parts of one, from an image,
    may begin where an earlier run was left: they are counted right, or an error, but for the one
    case that the documentation names.
    """
    text, steps, last, done = torch.zeros(1), Steps(dense), 0.0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count, strength in runs:
            count = count if parts else count + dense
            times = [1000 * (1 - i / count) for i in range(count)]
            part = times[int(count * (1 - strength)) :]
            if parts and part and part[0] > last:
                times = part
            # It may be the next step of a run that was left, as far as its schedule is known.
            left = [[*run, times[0]] for run in done]
            assume(not any(run[: len(next_)] == next_ for run in done for next_ in left))
            done.append(times)
            for place, t in enumerate(times):
                given = text if kept else torch.zeros(1)
                try:
                    assert steps.is_dense(t, given, None) == (place < dense), (t, place)
                except RuntimeError:
                    assert parts
                    return
                del given
            last = times[-1]
