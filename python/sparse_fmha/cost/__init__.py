"""The cost of a call: tile counts, predicted time and kernel names."""
