"""What a results file calls things, for its writers and its readers."""

OURS = "sparse_fmha"
MATMUL = "matmul"  # the matrix rate that the others are compared with
DENSE = " dense"  # ends the name of an op that computes dense attention of a neighborhood case


NO_MASK = "has no mask"  # why a dense peer cannot run a sparse case


class UnavailableError(RuntimeError):
    """Why a peer cannot run a case."""
