"""Benchmarks of sparse_fmha against the other attention kernels that are installed.

`python -m benchmarks --help` from the root of the repository.
"""
