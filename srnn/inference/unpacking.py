"""Unpacking: a packed network -> a module, on torch's own dense modules or on sparse kernels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.formats import Values
from srnn.inference.copying import replaced
from srnn.inference.example_calls import example_input
from srnn.inference.modules import replaceable, sparse_module
from srnn.inference.packing import PackedModel, matrix_gates, recurrent_layers
from srnn.inference.sharing import Copies, own_copy, share_packed
from srnn.inference.sparsify import desparsify, report_kernels
from srnn.inference.whole_network import choose_for_network
from srnn.kernels.contract import Kernel
from srnn.meta_device import weightless
from srnn.registry import register
from srnn.sparse import SparseMatrix

_log = logging.getLogger("srnn.kernels")


CPU = torch.device("cpu")


def unpack(
    packed: PackedModel, kernel: Kernel | None = None, into: nn.Module | None = None, device: torch.device = CPU
) -> nn.Module:
    """The network with the packed weights, in eval mode.

    Args:
        packed: what ``pack`` or ``read`` gave.
        kernel: the backend that runs it; nothing is unpacked that it does not need dense. None gives torch's own dense
            modules, trainable.
        into: the network to copy, instead of one built of the config.
        device: where it runs on the backend; torch's own modules are left on the CPU.

    Raises:
        UserError: weights and config do not belong together, or the kernel cannot run here.
    """
    if into is not None:
        skeleton = desparsify(into)
        _check_fit(packed, skeleton)
        _check_layers(packed, skeleton)
    else:
        skeleton = _skeleton(packed)
    if kernel is None:
        return _dense(packed, skeleton)
    reason = kernel.supports(None, device)
    if reason is not None:
        raise UserError(f"the kernel cannot run on this {'CPU' if device.type == 'cpu' else device}: {reason}.")
    sparse = _sparse(_untied(packed), kernel, skeleton).to(device)
    example = example_input(packed.supplied)
    _choose(sparse, None if example is None else example.to(device))
    return sparse


def _choose(network: nn.Module, example: Tensor | None) -> None:
    """Let ``auto`` measure the whole network, if it can be run with random inputs."""
    if example is None:
        return
    try:
        choices = choose_for_network(network, example)
    except Exception as error:  # whatever a network does that takes more than one input
        _log.info("kernels are chosen layer by layer: %s cannot be run to time it: %s", type(network).__name__, error)
    else:
        report_kernels(network, choices)


def _dense(packed: PackedModel, module: nn.Module) -> nn.Module:
    module.load_state_dict(_typed(packed.state_dict(), module), assign=True)
    for name, source in packed.tied.items():  # assigning made two parameters of one
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(source))
    return module.eval()


def _sparse(packed: PackedModel, kernel: Kernel, skeleton: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    copies: Copies = {}
    rest = dict(packed.dense)
    for prefix, module in skeleton.named_modules():
        names = {name: f"{prefix}.{name}" if prefix else name for name in module._parameters}
        if replaceable(module) and any(_has_zeros(packed.matrices.get(name)) for name in names.values()):
            weights = {name: _weight(packed, full, name, module) for name, full in names.items()}
            weights = {name: own_copy(w, copies) if isinstance(w, Tensor) else w for name, w in weights.items()}
            memo[id(module)] = sparse_module(module, weights, kernel)
            for full in names.values():
                rest.pop(full, None)
    rest |= {name: m.to_dense() for name, m in packed.matrices.items() if not _inside(name, skeleton, memo)}
    sparse = replaced(skeleton, memo)
    sparse.load_state_dict(_typed(rest, sparse), strict=False, assign=True)
    places = {parameter.data_ptr(): parameter for parameter in sparse.parameters() if parameter.numel()}
    share_packed(sparse, {id(b): places[t.data_ptr()] for t, b in copies.values() if t.data_ptr() in places})
    return sparse.requires_grad_(False)


def _has_zeros(matrix: SparseMatrix | None) -> bool:
    """Whether a matrix is packed for its zeros, and not only for the width of its values: then it runs dense."""
    if matrix is None:
        return False
    return matrix.nbytes < matrix.shape[0] * matrix.shape[1] * matrix.values.element_size()


def _typed(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors, buffers in the dtypes that the module gives them: the file may hold them in fp32."""
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def _untied(packed: PackedModel) -> PackedModel:
    """The same with each tied weight under its own name too; no memory is copied."""
    matrices = {n: packed.matrices[s] for n, s in packed.tied.items() if s in packed.matrices}
    dense = {n: packed.dense[s] for n, s in packed.tied.items() if s in packed.dense}
    return replace(packed, matrices=packed.matrices | matrices, dense=packed.dense | dense, tied={})


def _weight(packed: PackedModel, full: str, name: str, module: nn.Module) -> SparseMatrix | Tensor | None:
    if full in packed.matrices:
        matrix, gates = packed.matrices[full], matrix_gates(name, module)
        if matrix.gates == gates:
            return matrix
        # Files of older versions hold cells' matrices as those of one gate.
        values: Values = "fp32" if matrix.values_name == "int8" else matrix.values_name
        return SparseMatrix.from_dense(matrix.to_dense(), "auto", values, gates)
    weight = packed.dense.get(full)
    if weight is None or weight.ndim != 2:
        return weight
    # A layer runs on sparse kernels as a whole, so what was left dense beside a packed matrix is packed now.
    return SparseMatrix.from_dense(weight, "auto", "fp32", matrix_gates(name, module))


def _inside(name: str, skeleton: nn.Module, memo: Mapping[int, Any]) -> bool:
    return id(skeleton.get_submodule(name.rpartition(".")[0])) in memo


def _skeleton(packed: PackedModel) -> nn.Module:
    """The model, its weights yet to be loaded, once these are known to fit. No more is built than the file holds."""
    if not packed.model:
        raise UserError("the file holds weights and no config: give the network, srnn.load(path, into=model).")

    def build() -> nn.Module:
        module: nn.Module = register.rebuild("model", packed.model, **packed.supplied)
        return module

    return weightless(build, partial(_check_fit, packed), packed.calls, packed.allowance)


def _check_fit(packed: PackedModel, module: nn.Module) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in packed.dense.items()}
    given |= {name: matrix.shape for name, matrix in packed.matrices.items()}
    given |= {name: given[source] for name, source in packed.tied.items() if source in given}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        why = _wrapped(given.keys(), wanted.keys()) or _in_one_only(wrong[0], given, wanted, packed, module)
        raise UserError(f"the packed weights do not fit the model they name: {why}")
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if not parameters >= packed.tied.keys() | set(packed.tied.values()):
        raise UserError("the packed weights do not fit the model they name: what is tied is no parameter.")
    for prefix, child in module.named_modules():
        for name in child._parameters:
            matrix = packed.matrices.get(f"{prefix}.{name}" if prefix else name)
            older = isinstance(child, nn.RNNCellBase) and matrix is not None and matrix.gates == 1
            if matrix is not None and matrix.gates != matrix_gates(name, child) and not older:
                raise UserError(f"the packed weights do not fit the model they name: gates of {prefix}.{name}.")


def _in_one_only(
    name: str, given: Mapping[str, Any], wanted: Mapping[str, Any], packed: PackedModel, module: nn.Module
) -> str:
    """How a weight differs in the file and in the network, or where it is missing."""
    network = packed.model.get("name", type(module).__name__)
    if name in given and name in wanted:
        return f"{name} has shape {given[name]}, {network} wants {wanted[name]}."
    return f"the file has {name}, {network} has not." if name in given else f"{network} has {name}, the file has not."


def _wrapped(given: Collection[str], wanted: Collection[str]) -> str | None:
    """What to say where the names differ only by what a wrapper puts before them; None if it is not that."""
    if inside := _prefix(given, wanted):
        return (
            f"the file's names begin with {inside!r}, as those of a network that was saved inside a wrapper "
            f"(DataParallel, torch.compile, AveragedModel). Save the network inside it, or load into one wrapped alike."
        )
    if inside := _prefix(wanted, given):
        return (
            f"the network's names begin with {inside!r}, as those of a network inside a wrapper (DataParallel, "
            f"torch.compile, AveragedModel), and the file's do not. Give the network inside it, as into=model.module."
        )
    return None


def _prefix(longer: Collection[str], shorter: Collection[str]) -> str | None:
    """What stands before every one of the shorter names among the longer; None if nothing does.

    A wrapper may have names of its own, but no modules beside the one inside it.
    """
    first = min(shorter, default="")
    prefixes = (name.removesuffix(first) for name in longer if first and name.endswith(f".{first}"))
    whole = (p for p in prefixes if all(f"{p}{name}" in longer for name in shorter))
    return next((p for p in whole if all(name.startswith(p) or "." not in name for name in longer)), None)


def _check_layers(packed: PackedModel, network: nn.Module) -> None:
    """Raise UserError where a layer has the saved weights' shapes and would compute something else with them; warn
    where it reads its inputs otherwise. Files of older versions do not say what their layers are."""
    saved = packed.about.get("layers")
    for name, layer in recurrent_layers(network).items():
        was = saved.get(name) if isinstance(saved, Mapping) else None
        if not isinstance(was, Mapping):
            continue
        named = name or type(network).__name__
        if (cell := was.get("cell", layer["cell"])) != layer["cell"]:
            raise UserError(
                f"{named} was saved with the cell {str(cell)[:20]!r}, and the network given has {layer['cell']!r}: "
                f"with these weights it would compute something else. Build it as it was, as nn.RNN(nonlinearity=...)."
            )
        if "batch_first" in layer and (first := was.get("batch_first", layer["batch_first"])) != layer["batch_first"]:
            warnings.warn(
                f"{named} was saved with batch_first={str(first)[:20]}, and the network given has "
                f"batch_first={layer['batch_first']}: it reads time and batch of its inputs the other way round.",
                stacklevel=4,
            )
