"""Masks of blocks and of single keys: their lists, and what makes and checks them."""
