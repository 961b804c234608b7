"""Names of ops in a results file that the readers of the file must know."""

OURS = "sparse_fmha"
MATMUL = "matmul"  # the matrix rate that the others are compared with
