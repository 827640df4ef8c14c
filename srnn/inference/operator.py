"""Sparse modules as one operator, so that ``torch.compile`` and ``torch.export`` keep a network in one graph.

The operator gets a module's weights as inputs and the rest of it as JSON, so that an exported program holds all that it
needs. It is registered here, apart from what runs it, so that loading a program needs no more than ``import srnn``.
"""

from __future__ import annotations

import importlib
import json
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.inference.given_out import version

# Makes a module from its description and its tensors; ``srnn.inference.modules`` puts its own here.
Rebuild = Callable[[dict[str, Any], list[Tensor]], Any]
rebuilders: list[Rebuild] = []

_PROCESS = uuid.uuid4().hex
_KEPT = 256  # rebuilt modules; each holds its weights and what its kernel made of them
_here: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_rebuilt: OrderedDict[tuple[Any, ...], tuple[Any, list[Tensor]]] = OrderedDict()


def described(module: Any, description: dict[str, Any]) -> str:
    """The JSON by which the operator finds ``module`` again in this process, and rebuilds it in another."""
    key = f"{_PROCESS}-{uuid.uuid4().hex}"
    _here[key] = module
    return json.dumps(description | {"key": key})


@torch.library.custom_op("srnn::sparse_module", mutates_args=())
def call_operator(inputs: list[Tensor], weights: list[Tensor], description: str) -> list[Tensor]:
    """A sparse module's outputs."""
    from srnn.kernels.replay import nothing_recorded  # here, as all that runs a module

    module = _found(weights, description)
    with nothing_recorded():
        return [part.clone() for part in module.compute(inputs)]  # an operator's outputs share no memory


@call_operator.register_fake
def _shapes(inputs: list[Tensor], weights: list[Tensor], description: str) -> list[Tensor]:
    refuse_onnx()
    about = json.loads(description)
    module = _here.get(about["key"])
    shapes: list[Tensor] = (_rebuild(about, weights) if module is None else module).shapes(inputs)
    return shapes


def refuse_onnx() -> None:
    """Raises UserError inside ``torch.onnx.export``, which has no such operator."""
    if torch.onnx.is_in_onnx_export():
        raise UserError(
            "torch.onnx does not see sparse kernels: use srnn.export(model, 'model.onnx'), or torch.onnx.export of "
            "srnn.desparsify(model)."
        )


def _found(weights: list[Tensor], description: str) -> Any:
    about = json.loads(description)
    pointers = tuple(weight.data_ptr() for weight in weights)
    module = _here.get(about["key"])
    # A program may have been given other weights than those of the module it was made from.
    if module is not None and tuple(weight.data_ptr() for weight in module.tensors()) == pointers:
        return module
    key = (description, pointers, tuple(version(weight) for weight in weights))
    found = _rebuilt.get(key)
    if found is None:
        made = _rebuild(about, weights)
        for matrix in made.matrices().values():
            matrix.check()  # the program may come from others
        found = _rebuilt[key] = made, list(weights)  # held, so that no other weights get their addresses
        while len(_rebuilt) > _KEPT:
            _rebuilt.popitem(last=False)
    return found[0]


def _rebuild(about: dict[str, Any], weights: list[Tensor]) -> Any:
    if not rebuilders:
        importlib.import_module("srnn.inference.modules")
    return rebuilders[0](about, weights)
