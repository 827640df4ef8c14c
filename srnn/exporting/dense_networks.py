"""The dense alternatives of a packed network: what it is compared with in a run's report and in ``srnn bench RUN``."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.exporting.chain import Chain
from srnn.exporting.onnx_session import OnnxNetwork, require_onnx
from srnn.exporting.reading import read_chain
from srnn.inference.packing import PackedModel
from srnn.inference.unpacking import unpack
from srnn.kernels import Dense

_DIFFERENT = 1e-3  # of outputs in fp32, as a relative norm: another network, whose times say nothing
# Name in ``dense_networks`` -> what it stands for in words: ``dense`` takes torch or oneDNN for each layer.
RUNTIMES = {"torch": "torch", "dense": "oneDNN", "onnxruntime": "onnxruntime"}


def dense_networks(packed: PackedModel, inputs: Tensor) -> dict[str, Any]:
    """The network in fp32 with its zeros stored, on each runtime for a CPU that is here.

    Args:
        packed: the network.
        inputs: that it can read, tokens_BT or x_BTI; what fails on them, or computes something else, is left out.

    Returns:
        Some of ``RUNTIMES`` -> network. ``onnxruntime`` is left out where it is not installed, or where the network is
        no chain of layers; where it fails, a warning says so.
    """
    found: dict[str, Any] = {"torch": unpack(packed), "dense": unpack(packed, Dense())}
    try:
        require_onnx()
        other = in_onnxruntime(read_chain(found["torch"]))
        _check(other, found["torch"], inputs)
        found["onnxruntime"] = other
    except UserError:
        pass
    except Exception as error:  # of any class; a baseline less is no reason to lose a trained run
        warnings.warn(f"nothing is compared with onnxruntime, which failed: {error}", stacklevel=2)
    return found


def _check(network: OnnxNetwork, like: Any, inputs: Tensor) -> None:
    """Call it, also for a step if the other has one. Raises RuntimeError if it computes something else."""
    with torch.inference_mode():
        (wanted, _), (got, state) = like(inputs), network(inputs)
        error = float((got - wanted).norm() / wanted.norm())
        if hasattr(like, "step") and getattr(like, "directions", 1) == 1:
            network.step(inputs[:, 0], state)
    if not error <= _DIFFERENT:
        raise RuntimeError(f"its outputs are {error:.2g} away from torch's")


def in_onnxruntime(chain: Chain, values: Literal["fp32", "int8"] = "fp32") -> OnnxNetwork:
    """A graph of a whole chain, the zeros stored; in int8 what onnxruntime has int8 for."""
    from srnn.exporting.onnx_graph import onnx_model
    from srnn.exporting.onnx_int8 import quantised

    data = onnx_model(chain).SerializeToString()
    return OnnxNetwork(quantised(data)[0] if values == "int8" else data)
