"""Benchmarks that are programs of their own. Uses all other folders."""
