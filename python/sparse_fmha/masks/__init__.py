"""Block masks and stripe masks: their lists, builders and checks."""
