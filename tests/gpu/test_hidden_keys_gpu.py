"""What hidden keys may hold, on the GPU."""

import hidden_keys
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hidden_keys.LISTS)
def test_padding_may_hold_anything_in_k(name, dtype):
    hidden_keys.check(name, "cuda", dtype)
