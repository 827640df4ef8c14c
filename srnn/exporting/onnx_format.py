"""``format=onnx``: written, run in onnxruntime, compared with the network, and only then handed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

from srnn.errors import UserError
from srnn.exporting.base import About, ExportReport
from srnn.exporting.chain import Chain
from srnn.exporting.onnx_session import OnnxNetwork, require_onnx
from srnn.exporting.reading import AGREEMENT, largest_difference, read_chain
from srnn.files import write_atomically
from srnn.vocabulary import UNKNOWN, Vocabulary

OnnxValues = Literal["fp32", "int8"]
# How far outputs may be after quantisation, over the larger of 1 and the largest: more is no rounding.
_QUANTISED = 0.5
_DENSE = "Weights are dense, zeros stored: size and speed are those of a dense network."


def write_onnx(
    model: nn.Module, path: Path, example: Any = None, about: About = "", *, values: OnnxValues = "fp32"
) -> ExportReport:
    """Write a network as ONNX; as ``srnn.export``."""
    if values not in ("fp32", "int8"):
        raise UserError(f"format=onnx: values={values!r} must be fp32, or int8 for onnxruntime's dynamic quantisation.")
    require_onnx()
    from srnn.exporting.onnx_graph import onnx_model

    chain = read_chain(model)
    data = onnx_model(chain, _metadata(model)).SerializeToString()
    away = largest_difference(OnnxNetwork(data).run, model, chain)
    if not away <= AGREEMENT:
        raise UserError(f"{path} is not written: onnxruntime's outputs differ by {away:.1e}, over {AGREEMENT:g}.")
    notes = [_DENSE]
    if values == "int8":
        data, quantised_notes = _quantised(data, model, chain)
        notes += quantised_notes
    text = about if isinstance(about, str) else about(OnnxNetwork(data))
    write_atomically(path, _described(data, text))
    verified = "onnxruntime against the network, at 3 lengths, 2 batches and over chained calls"
    return ExportReport(path, path.stat().st_size, verified, away, tuple(notes))


def _metadata(model: nn.Module) -> dict[str, str]:
    vocabulary = getattr(model, "vocabulary", None)
    if not isinstance(vocabulary, Vocabulary):
        return {}
    data = vocabulary.to_dict()
    if "tokens" in data:  # each at its number
        data["tokens"] = [UNKNOWN, *data["tokens"]]
    return {"vocabulary": json.dumps(data)}


def _quantised(data: bytes, model: nn.Module, chain: Chain) -> tuple[bytes, list[str]]:
    """The model in int8, as far as onnxruntime goes, and what there is to say about it."""
    from srnn.exporting.onnx_int8 import quantised

    small, left = quantised(data)
    away = largest_difference(OnnxNetwork(small).run, model, chain)
    if not away <= _QUANTISED:
        raise UserError(f"values=int8: onnxruntime's quantised outputs differ by {away:.1e}: use values=fp32.")
    notes = [f"int8: outputs differ by up to {away:.1e} from the network's."]
    if left:
        notes.append(f"onnxruntime quantises LSTM and linear layers only: {', '.join(left)} stay fp32.")
    return small, notes


def _described(data: bytes, text: str) -> bytes:
    import onnx

    model = onnx.load_from_string(data)
    model.doc_string = text
    described: bytes = model.SerializeToString()
    return described
