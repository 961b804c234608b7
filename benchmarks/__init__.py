"""Benchmarks of sparse_fmha against the other attention kernels that are installed.

`python -m benchmarks --help` from the root of the repository. A folder uses what stands before it:

    harness  times, the environment, results files; knows no case and no peer
    cases    what is measured: inputs, masks, work, and what is exact; knows no harness
    peers    how ours and the others are called on a case
    tables   what is shown of results files; knows no case and no peer
    studies  programs of their own

`results` has the results files, `cpp` times kernels without torch.
"""
