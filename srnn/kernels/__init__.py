"""Kernel backends: how sparse weights run."""

from srnn.cells import Cell
from srnn.kernels.choosing import Auto, Choice, Dense
from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, Recurrence, State
from srnn.kernels.cpu.backend import Cpu
from srnn.kernels.csr import Csr
from srnn.kernels.dense import StepLoopKernel
from srnn.kernels.triton.backend import Triton

__all__ = [
    "Auto",
    "Cell",
    "Choice",
    "Cpu",
    "Csr",
    "Dense",
    "Kernel",
    "Layer",
    "LayerWeights",
    "Product",
    "Recurrence",
    "State",
    "StepLoopKernel",
    "Triton",
]
