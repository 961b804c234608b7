"""The units of the emulator against CuTe's layouts, and the emulated CUDA runtime's errors."""

import subprocess

import emulated
import pytest
import torch

import sparse_fmha


def test_units():
    done = subprocess.run([emulated.UNIT_TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_calls_take_the_gpu_path():
    """No GPU kernel takes float32, which the CPU's do."""
    q = torch.zeros(1, 8, 1, 64)
    with pytest.raises(NotImplementedError, match="dtype=float32"):
        sparse_fmha.attention(q, q, q)
