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
