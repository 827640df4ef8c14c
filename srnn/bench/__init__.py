"""Timing dense layers against every backend that can run."""
