"""What tests of models set, and put back, in the libraries that these come from."""

import pytest


@pytest.fixture
def default():
    """The default attention backend of diffusers is afterwards what it was."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    with dispatch.attention_backend(dispatch._AttentionBackendRegistry.get_active_backend()[0]):
        yield


@pytest.fixture(scope="module")
def registered():
    """transformers knows the attention by its name."""
    pytest.importorskip("transformers")
    from sparse_fmha.integrations import transformers

    transformers.register()


@pytest.fixture(autouse=True)
def few_tokens(request, monkeypatch):
    """Tiny videos have few tokens, with which `enable` of diffusers would leave them dense."""
    if "diffus" in request.path.name:
        pytest.importorskip("diffusers")
        from sparse_fmha.integrations import diffusers as sparse

        monkeypatch.setattr(sparse, "MIN_TOKENS", 0)
