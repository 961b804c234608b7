"""What a model of diffusers holds, and the one way to enable it of the tests of its state."""

from sparse_fmha.integrations import diffusers as sparse

NAME = "sparse_fmha"


def image(model):
    """All that an object of the model holds, by identity."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, dict)
            state[name, key] = (dict(value), list(value)) if plain else value
        processor = getattr(module, "processor", None)
        if processor is not None:
            state[name, "processor's"] = dict(vars(processor))
    return state


def same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] is value or found[key] == value, key
    for key, value in expected.items():  # not equal only: the very objects
        if key[1] == "processor":
            assert found[key] is value


def windowed(tiny, **options):
    sparse.enable(tiny.model, "neighborhood", window=tiny.window, **options)
