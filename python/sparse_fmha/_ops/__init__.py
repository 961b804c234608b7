"""The ops: their library, and what Python adds to them. Nothing here knows masks."""

from sparse_fmha._ops.registration import MECHANISMS, register
from sparse_fmha._ops.shapes import anchor_words

__all__ = ["MECHANISMS", "anchor_words", "register"]
