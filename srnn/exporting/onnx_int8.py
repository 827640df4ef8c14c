"""Dynamic quantisation by onnxruntime: weights in int8, inputs of products quantised as they come."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from srnn.exporting.onnx_session import without_logs

# What has an int8 form, and what has none though it holds most weights.
_OPERATORS = ["LSTM", "MatMul"]
_WITHOUT = {"GRU": "GRU layers", "RNN": "RNN layers", "Scan": "LSTM layers with a projection"}


def quantised(data: bytes) -> tuple[bytes, list[str]]:
    """A model's bytes in int8, and the kinds of layers that stay fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_from_string(data)
    left = sorted({_WITHOUT[node.op_type] for node in model.graph.node if node.op_type in _WITHOUT})
    with (
        tempfile.TemporaryDirectory() as folder,
        without_logs(),
    ):  # of the advice to prepare graphs, which these need not
        path = Path(folder) / "int8.onnx"
        # A scale a row: 1.2 to 1.9 times closer than one a matrix. Of 7 bits: with 8, sums of 16 bits overflow on
        # processors that have AVX2 and no VNNI, so that a file would compute something else there than here.
        quantize_dynamic(
            model, path, op_types_to_quantize=_OPERATORS, weight_type=QuantType.QInt8, per_channel=True,
            reduce_range=True,
        )  # fmt: skip
        return path.read_bytes(), left
