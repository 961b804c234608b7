"""How ours and the others are called on a case. Uses cases and the harness."""
