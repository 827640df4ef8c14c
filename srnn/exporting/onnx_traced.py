"""Networks that are no chain of layers, as ``torch.onnx`` sees them: the states are those of the module's own call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.exporting.onnx_session import open_session, without_logs
from srnn.exporting.reading import AGREEMENT, difference
from srnn.inference.sparsify import desparsify

_MORE = 3  # by how much a free dimension is longer in the second trial; in the third it is 1


def traced(model: nn.Module, example: Any) -> tuple[bytes, float, str]:
    """A network's model, how far it is from the network, and which dimensions are free.

    The first two dimensions of each input are left free where that computes the same at other sizes, else all are those
    of the example.

    Args:
        model: the network, dense or sparse.
        example: the arguments of a call, a tensor or a tuple of them.

    Raises:
        UserError: torch.onnx cannot write it, or what it wrote computes something else.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    network = desparsify(model)
    reasons = []
    for free in (True, False):
        try:
            data = _written(network, arguments, free)
            away = max(_differences(data, network, model, arguments))
        except Exception as error:  # torch.onnx and onnxruntime raise nearly anything
            reasons.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        if away <= AGREEMENT:
            return data, away, _free_dimensions(data)
        reasons.append(f"onnxruntime's outputs differ by {away:.1e}, over {AGREEMENT:g}")
    raise UserError(f"{type(model).__name__} cannot be exported by torch.onnx: {reasons[-1]}.")


def _written(network: nn.Module, arguments: tuple[Any, ...], free: bool) -> bytes:
    shapes = _dynamic(arguments) if free else None
    with warnings.catch_warnings(), without_logs():
        warnings.simplefilter("ignore")  # torch's, about itself
        program = torch.onnx.export(network, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    model = program.model_proto
    for output in model.graph.output:  # torch writes the example's sizes, also of what is free
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def _dynamic(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return dict.fromkeys(range(min(2, arguments.dim())), torch.export.Dim.AUTO)
    if isinstance(arguments, tuple | list):
        return tuple(_dynamic(argument) for argument in arguments)
    return None


def _differences(data: bytes, network: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[float]:
    """At the example's sizes, and at others of the dimensions that are free."""
    session = open_session(data)
    inputs = session.get_inputs()
    symbols: dict[str, int] = {}
    for given, tensor in zip(inputs, _tensors(arguments), strict=True):
        symbols |= {s: tensor.shape[i] for i, s in enumerate(given.shape) if isinstance(s, str)}
    others = [{s: n + _MORE for s, n in symbols.items()}, dict.fromkeys(symbols, 1)] if symbols else []
    for sizes in [symbols, *others]:
        wanted_shapes = iter([[sizes.get(s, s) for s in given.shape] for given in inputs])
        these = _resized(arguments, wanted_shapes)
        try:
            with torch.inference_mode():
                wanted = [*_tensors(model(*these))]
        except RuntimeError:
            if sizes is symbols:
                raise
            continue  # sizes that the network itself does not take, such as one layer's state for two
        feed = {given.name: t.numpy() for given, t in zip(inputs, _tensors(these), strict=True)}
        for got, tensor in zip(session.run(None, feed), wanted, strict=True):
            yield difference(torch.from_numpy(got), tensor.float() if tensor.is_floating_point() else tensor)


def _resized(arguments: Any, shapes: Iterator[list[int]]) -> Any:
    """The same arguments of other sizes: cut, or repeated from the start."""
    if isinstance(arguments, Tensor):
        for dimension, size in enumerate(next(shapes)):
            arguments = arguments.index_select(dimension, torch.arange(size) % arguments.shape[dimension])
        return arguments
    if isinstance(arguments, tuple | list):
        return type(arguments)(_resized(argument, shapes) for argument in arguments)
    return arguments


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _free_dimensions(data: bytes) -> str:
    graph = onnx.load_from_string(data).graph
    free = [
        f"{given.name} {', '.join(str(i) for i in dimensions)}"
        for given in graph.input
        if (dimensions := [i for i, d in enumerate(given.type.tensor_type.shape.dim) if d.dim_param])
    ]
    return f"Free dimensions: {'; '.join(free)}." if free else "All sizes are those of the example."
