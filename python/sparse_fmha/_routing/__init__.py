"""Intercepts a model's calls of attention functions, to run them here or to measure them."""
