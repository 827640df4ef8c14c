"""``format=onnx``: written, run in onnxruntime, compared with the network, and only then handed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from srnn.errors import UserError
from srnn.exporting.base import About, ExportReport, ExportRequest
from srnn.exporting.chain import Chain
from srnn.exporting.onnx_session import OnnxNetwork, require_onnx
from srnn.exporting.reading import AGREEMENT, largest_difference, read_chain
from srnn.files import write_atomically
from srnn.vocabulary import UNKNOWN, Vocabulary

OnnxValues = Literal["fp32", "int8"]
# How far outputs may be after quantisation, over the larger of 1 and the largest: 0.005 to 0.04 were seen with LSTMs of
# 96 to 256 units; a graph that computes something else is off by about 1.
_QUANTISED = 0.5
_VERIFIED = "onnxruntime against the network, at "
_DENSE = "Weights are dense, zeros stored: size and speed are those of a dense network."


def check_onnx(values: str = "fp32") -> None:
    """Raises UserError for other values, or if a package is missing."""
    if values not in ("fp32", "int8"):
        raise UserError(f"format=onnx: values={values} must be fp32, or int8 for onnxruntime's dynamic quantisation.")
    require_onnx()


def write_onnx(model: nn.Module, path: Path, request: ExportRequest, *, values: OnnxValues = "fp32") -> ExportReport:
    """Write a network as ONNX; as ``srnn.export``."""
    try:
        chain = read_chain(model)
    except UserError as reason:
        if request.example is None:
            hint = "give example=, the arguments of a call, and torch.onnx writes it with the states that it has."
            raise UserError(f"{reason} To export it all the same, {hint}") from None
        return _write_traced(model, path, request.example, request.about, values, str(reason))
    return _write_chain(model, path, chain, request.about, values)


def _write_chain(model: nn.Module, path: Path, chain: Chain, about: About, values: OnnxValues) -> ExportReport:
    from srnn.exporting.onnx_graph import onnx_model

    data = onnx_model(chain).SerializeToString()
    away = largest_difference(OnnxNetwork(data).run, model, chain)
    if not away <= AGREEMENT:
        raise UserError(f"{path} is not written: onnxruntime's outputs differ by {away:.1e}, over {AGREEMENT:g}.")
    notes = [_DENSE]
    if values == "int8":
        data, left = _quantised(data)
        notes += [f"In fp32 the largest difference is {away:.1e}; the rest is int8's.", *left]
        away = largest_difference(OnnxNetwork(data).run, model, chain)
        if not away <= _QUANTISED:
            raise UserError(f"{path} is not written: in int8 outputs differ by {away:.1e}. Use values=fp32.")
    text = about if isinstance(about, str) else about(OnnxNetwork(data))
    nbytes = _hand_over(path, data, text, model)
    return ExportReport(path, nbytes, _VERIFIED + "3 lengths, 2 batches and over chained calls", away, tuple(notes))


def _write_traced(
    model: nn.Module, path: Path, example: Any, about: About, values: OnnxValues, reason: str
) -> ExportReport:
    require_onnx("onnxscript")
    from srnn.exporting.onnx_traced import traced

    if values == "int8":
        raise UserError(f"values=int8 is for chains of layers, and {reason}")
    data, away, free = traced(model, example)
    notes = (f"Written by torch.onnx, its states as its call has them: {reason}", free, _DENSE)
    nbytes = _hand_over(path, data, about if isinstance(about, str) else about(model), model)
    return ExportReport(path, nbytes, _VERIFIED + "the example's sizes, and others of what is free", away, notes)


def _hand_over(path: Path, data: bytes, text: str, network: nn.Module) -> int:
    """Write what was verified, with what it says about itself; returns its bytes."""
    import onnx

    model = onnx.load_from_string(data)
    model.doc_string = text
    vocabulary = getattr(network, "vocabulary", None)
    if isinstance(vocabulary, Vocabulary):
        tokens = vocabulary.to_dict()
        if "tokens" in tokens:  # each at its number
            tokens["tokens"] = [UNKNOWN, *tokens["tokens"]]
        model.metadata_props.add(key="vocabulary", value=json.dumps(tokens))
    written = model.SerializeToString()
    write_atomically(path, written)
    return len(written)


def _quantised(data: bytes) -> tuple[bytes, list[str]]:
    """The model in int8, and a note on what stays fp32."""
    from srnn.exporting.onnx_int8 import quantised

    small, left = quantised(data)
    note = f"onnxruntime quantises LSTM and linear layers only: {', '.join(left)} stay fp32."
    return small, [note] if left else []
