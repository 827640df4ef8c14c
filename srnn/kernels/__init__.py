"""Kernel backends: how a packed model runs."""

from srnn.kernels.contract import Kernel
from srnn.kernels.dense import Dense

__all__ = ["Dense", "Kernel"]
