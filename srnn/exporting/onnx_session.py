"""An ONNX file of srnn's that runs in onnxruntime, as a network.

Shapes: T steps, B streams, L layers times directions.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.errors import UserError


def require_onnx(*packages: str) -> None:
    """Raises UserError if onnx, onnxruntime or another package of the extra is missing."""
    missing = [name for name in ("onnx", "onnxruntime", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'srnn[onnx]'.")


def open_session(model: Path | bytes) -> Any:
    """A session of onnxruntime on the CPU, with torch's number of threads as it is now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads would go on spinning after a call, at the cost of what is run, and timed, next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # what is fatal: errors are raised, and some trials of an export are to fail
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@contextmanager
def without_logs() -> Iterator[None]:
    """Without what exporters and quantisers log about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class OnnxNetwork(nn.Module):
    """A network in onnxruntime, on the CPU, with torch's number of threads at the time it is made.

    It is called as the network it was made from: ``outputs, state = network(inputs, state)``.

    Args:
        model: the file, or its bytes.

    Raises:
        UserError: onnxruntime is not installed.
    """

    def __init__(self, model: Path | bytes) -> None:
        super().__init__()
        require_onnx()
        self.session = open_session(model)
        self.states: dict[str, str] = json.loads(self.session.get_modelmeta().custom_metadata_map["states"])
        self.shapes = {given.name: given.shape for given in self.session.get_inputs()}
        self.input_name = next(name for name in self.shapes if name not in self.states)

    def run(self, inputs: Tensor, states: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs, and the states after them by their names; None starts from zero."""
        if states is None:
            streams = inputs.shape[self.shapes[self.input_name].index("batch")] if self.states else 0
            shapes = {name: (self.shapes[name][0], streams, self.shapes[name][2]) for name in self.states}
            given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        else:
            given = {name: states[name].numpy() for name in self.states}
        tokens = not inputs.is_floating_point()  # int64 is what a graph takes
        feed = {self.input_name: (inputs.long() if tokens else inputs).numpy()} | given
        outputs, *after = self.session.run(["outputs", *self.states.values()], feed)
        return torch.from_numpy(outputs), {n: torch.from_numpy(a) for n, a in zip(self.states, after, strict=True)}

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As torch's modules: the state is a tensor, or a tuple where there are several; None starts from zero."""
        several = None if state is None else state if isinstance(state, tuple) else (state,)
        outputs, after = self.run(inputs, None if several is None else dict(zip(self.states, several, strict=True)))
        ends = tuple(after.values())
        return outputs, ends[0] if len(ends) == 1 else ends

    def step(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step of each stream, [B] tokens or [B, I]."""
        time = self.shapes[self.input_name].index("time")
        outputs, after = self(inputs.unsqueeze(time), state)
        return (outputs.squeeze(time) if outputs.dim() == 3 else outputs), after
