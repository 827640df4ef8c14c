"""Persistent sparse kernels for GPUs, in Triton."""
