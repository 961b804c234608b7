"""Softmax skipping: thresholds, statistics, and the law that calibrations fit."""

from sparse_fmha.skipping.thresholds import SkipStats, check, threshold_of

__all__ = ["SkipStats", "check", "threshold_of"]
