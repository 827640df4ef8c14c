"""A network whose weights hold zeros -> the same network on sparse kernels, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from srnn.errors import UserError
from srnn.formats import Values
from srnn.inference.base import SparseModule, Weights, kernel_config
from srnn.inference.checking import check_network, kernel_given
from srnn.inference.copying import replaced
from srnn.inference.left_dense import FEW_ZEROS, Replacements, has_zeros, is_layer, matrices_of, unmasked, why_dense
from srnn.inference.modules import sparse_module
from srnn.inference.packing import Energies, Packer, WantedStructure, matrix_gates
from srnn.inference.sharing import Copies, own_copy, share_packed
from srnn.inference.whole_network import choose_for_network
from srnn.kernels.choosing import Choice
from srnn.kernels.contract import Kernel
from srnn.sparse import SparseMatrix


def sparsify(
    model: nn.Module,
    structure: WantedStructure = "auto",
    values: Values = "fp32",
    kernel: str | Kernel = "auto",
    energies: Energies | None = None,
    example: Any = None,
) -> nn.Module:
    """A copy of a network that runs on sparse kernels: the same call, outputs and states, for inference.

    Every ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, their cells, ``nn.Linear`` and ``nn.Embedding`` of which a matrix holds
    enough zeros to be smaller in a sparse format is replaced; the rest is copied. The model itself is left as it is.
    Masks of ``torch.nn.utils.prune`` are applied. The copy's ``sparsify_report``, which its ``repr`` prints, says what
    was replaced and what was left dense, and why; a warning names what was pruned and yet left dense.

    It does not train: train, then sparsify. Nothing in it asks for gradients; where its inputs do, backward raises.
    Its ``state_dict`` holds packed weights, which fit no dense network: ``desparsify(copy).state_dict()`` does. Each
    recurrent layer in it has ``step(x, state)`` for a stream, as ``copy.gru.step``; a network of several layers has
    only the methods of its own class.

    Args:
        model: a trained network; it may be one of these modules itself.
        structure: ``element``, ``4x1``, ``8x1``, ``16x1`` or ``32x1``; ``auto`` takes for each matrix the one of fewest
            bytes.
        values: what non-zeros are stored as: ``fp32``, ``fp16``, ``bf16``, or ``int8`` with a scale a row group.
        kernel: a backend's name or the backend; ``auto`` measures them: on the whole network where there is an
            example, else layer by layer when it is first run, named in the layer's ``repr`` from then on. What is
            dense and faster stays dense.
        energies: parameter name -> mean square of what each column multiplies, from ``record_inputs``; for int8.
        example: an input of the network, or a tuple of all its inputs, for ``auto``: of as many streams as it is to be
            run with. It is cut and repeated along the time axis of the first input, to 1, 16, 100 and 400 steps. It
            decides for its number of streams and for torch's number of threads. What the network keeps of its calls
            in buffers or attributes stays as it is.

    Returns:
        The copy, in eval mode.

    Raises:
        UserError: a matrix is not pruned in the blocks asked for, holds numbers that are not finite, the kernel cannot
            run here, or the network cannot be called with the example.

    Example:
        >>> import torch, srnn
        >>> gru = torch.nn.GRU(16, 32)
        >>> for weight in gru.parameters():
        ...     _ = weight.data.mul_(torch.rand_like(weight) < 0.1)
        >>> sparse = srnn.sparsify(gru, kernel="csr")
        >>> x_TBI = torch.randn(5, 2, 16)
        >>> (sparse(x_TBI)[0] - gru(x_TBI)[0]).abs().max().item() < 1e-5
        True
    """
    chosen = kernel_given(kernel, "srnn.sparsify")
    copied, replacements = sparsified(model, Packer(structure, values, energies), chosen)
    report_kernels(copied, [] if example is None else choose_for_network(copied, example))
    warning = replacements.warning()
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    return copied


def sparsified(model: nn.Module, packer: Packer, kernel: Kernel) -> tuple[nn.Module, Replacements]:
    """What ``sparsify`` returns, and what was replaced in it. Raises UserError as ``sparsify`` does."""
    check_network(model, "srnn.sparsify")
    names = {id(weight): name for name, weight in model.named_parameters()}
    memo: dict[int, Any] = {}
    copies: Copies = {}
    found = Replacements()
    for prefix, module in model.named_modules():
        plain, named = unmasked(module), prefix or type(module).__name__
        reason, pruned = why_dense(plain), has_zeros(plain, packer)
        if pruned and reason is None:
            memo[id(module)] = sparse_module(plain, _weights(plain, packer, names, prefix, copies), kernel)
            found.sparse[named] = type(module).__name__
            found.wide += [named] * any(weight.dtype == torch.float64 for weight in matrices_of(plain).values())
        elif isinstance(module, SparseModule):
            found.already.append(named)
        elif is_layer(plain) and not isinstance(module, ParametrizationList):
            counts = pruned or not matrices_of(plain)
            found.dense[named] = reason if counts and reason is not None else FEW_ZEROS
            found.pruned |= {named} if pruned else set()
    for made in memo.values():
        for matrix in made.matrices().values():
            reason = kernel.supports(None, matrix.device)
            if reason is not None:
                name = next((c["name"] for c in [kernel_config(kernel)] if c), type(kernel).__name__)
                raise UserError(f"kernel={name} cannot run on {matrix.device}: {reason}.")
    copied = replaced(model, memo)
    of_dense = ((own, memo.get(id(bias))) for bias, own in copies.values())
    share_packed(copied, {id(own): there for own, there in of_dense if isinstance(there, nn.Parameter)})
    _report(copied, str(found))
    return copied, found


def report_kernels(network: nn.Module, choices: Sequence[Choice]) -> None:
    """Say in the report of a network what was chosen for it, if its kernel has a choice."""
    if not any(isinstance(module, SparseModule) and module.candidates() for module in network.modules()):
        return
    told = "; ".join(choice.in_short for choice in choices) or (
        "chosen layer by layer when it is first run, and then named at each; "
        "sparsify(example=input) chooses on the whole network"
    )
    _report(network, "\n".join(filter(None, (getattr(network, "sparsify_report", ""), f"kernels: {told}"))))


def _report(network: nn.Module, report: str) -> None:
    network.sparsify_report = report  # type: ignore[assignment]
    if isinstance(network, SparseModule):  # whose own ``extra_repr`` tells it
        return
    # What ``repr`` asks for. No function of ours: this can be copied and pickled.
    own = type(network).extra_repr(network)
    network.extra_repr = partial(str, "\n".join(filter(None, (own, report))))  # type: ignore[method-assign]


def desparsify(model: nn.Module) -> nn.Module:
    """A copy with torch's own modules again; weights kept as fp32 are bit for bit what they were.

    Args:
        model: what ``sparsify`` or ``load`` gave.

    Returns:
        The copy, in eval mode, its parameters trainable.

    Raises:
        UserError: a part of the model cannot be copied.

    Example:
        >>> import torch, srnn
        >>> linear = torch.nn.Linear(16, 8)
        >>> _ = linear.weight.data.mul_(torch.rand(8, 16) < 0.1)
        >>> dense = srnn.desparsify(srnn.sparsify(linear, kernel="csr"))
        >>> torch.equal(dense.weight, linear.weight)
        True
    """
    check_network(model, "srnn.desparsify")
    copied = replaced(model, {id(m): m.original() for m in model.modules() if isinstance(m, SparseModule)})
    _tie(model, copied)
    if vars(copied).pop("sparsify_report", None) is not None:
        vars(copied).pop("extra_repr", None)
    return copied


def _tie(model: nn.Module, copied: nn.Module) -> None:
    """Make one parameter again of weights and biases that sparse modules of ``model`` share."""
    first: dict[tuple[int, int], nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, SparseModule):
            owner = copied.get_submodule(prefix)
            for name, matrix in module.matrices().items():
                if matrix.values.data_ptr():  # there is none of a matrix without entries
                    own = owner.get_parameter(name)
                    setattr(owner, name, first.setdefault((matrix.values.data_ptr(), matrix.gates), own))
            for name, bias in module._buffers.items() if module.tied is not None else ():
                if bias is not None:
                    setattr(owner, name, first.setdefault((id(bias), 0), owner.get_parameter(name)))
    for prefix, module in model.named_modules():
        for name, bias in module._parameters.items() if not isinstance(module, SparseModule) else ():
            if (id(bias), 0) in first:
                setattr(copied.get_submodule(prefix), name, first[id(bias), 0])


def _weights(
    module: nn.Module,
    packer: Packer,
    names: dict[int, str],
    prefix: str,
    copies: Copies,
) -> Weights:
    """Name -> packed matrix, bias, or None for a bias it does not have."""

    def full(name: str, weight: Tensor) -> str:
        return names.get(id(weight), f"{prefix}.{name}" if prefix else name)

    made: dict[str, SparseMatrix | Tensor | None] = dict.fromkeys(module._parameters)
    for name, w in module._parameters.items():
        if w is not None and w.ndim == 2:
            made[name] = packer.matrix(full(name, w), w, matrix_gates(name, module))
        elif w is not None:
            made[name] = own_copy(w, copies)
    return made
