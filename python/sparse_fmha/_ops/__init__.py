"""The ops: loading their library, and their registrations in Python. Independent of mask types."""

from sparse_fmha._ops.registration import MECHANISMS, register
from sparse_fmha._ops.shapes import anchor_words

__all__ = ["MECHANISMS", "anchor_words", "register"]
