"""Slices of 64 streams, all blocks of a gate in one product: for Hopper GPUs."""
