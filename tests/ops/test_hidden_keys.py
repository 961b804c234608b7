"""What hidden keys may hold, on the CPU."""

import hidden_keys
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hidden_keys.LISTS)
def test_padding_may_hold_anything_in_k(name, dtype):
    hidden_keys.check(name, "cpu", dtype)
