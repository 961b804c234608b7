"""Attention of a few new tokens over the keys of a cache."""

from sparse_fmha.decode.attention import decode_attention

__all__ = ["decode_attention"]
