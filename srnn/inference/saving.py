"""Saving any network in a packed file, without the registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from srnn.formats import Values
from srnn.inference.base import SparseModule
from srnn.inference.checking import check_layouts, check_network
from srnn.inference.packed_file import write
from srnn.inference.packing import WantedStructure, pack, recurrent_layers
from srnn.inference.sparsify import desparsify


def save(model: nn.Module, path: str | Path, values: Values | None = None, structure: WantedStructure = "auto") -> None:
    """Save any network's weights in a packed file, non-zeros only; ``srnn.load(path, into=model)`` reads them.

    Args:
        model: a network with zeros, dense or sparsified.
        path: where to; an older file is replaced once the new one is whole. Its folder is made where there is none, and
            ``~`` is your home.
        values: what non-zeros are stored as: ``fp32``, ``fp16``, ``bf16`` or ``int8``. None keeps those of matrices
            that ``sparsify`` packed, and takes fp32 for others.
        structure: the blocks of every packed matrix. ``auto`` takes the fewest bytes for each; what is packed already,
            with these values, stays as it is.

    Raises:
        UserError: a weight is not finite, too large for the values asked for, not pruned in these blocks, or has no
            values yet.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, srnn
        >>> def network(): return torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.GRU(16, 32))
        >>> model = network()
        >>> for weight in model.parameters():
        ...     _ = weight.data.mul_(torch.rand_like(weight) < 0.1)
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> srnn.save(model, path)
        >>> sparse = srnn.load(path, kernel="csr", into=network())
        >>> tokens_TB = torch.randint(50, (5, 2))
        >>> (sparse(tokens_TB)[0] - model.eval()(tokens_TB)[0]).abs().max().item() < 1e-5
        True
    """
    check_network(model, "srnn.save")
    check_layouts(model)
    kept = {
        f"{prefix}.{name}" if prefix else name: matrix.to("cpu")
        for prefix, module in model.named_modules()
        if isinstance(module, SparseModule)
        for name, matrix in module.matrices().items()
        if values in (None, matrix.values_name) and structure in ("auto", matrix.structure)
    }
    is_sparse = any(isinstance(module, SparseModule) for module in model.modules())
    dense_model = desparsify(model) if is_sparse else model
    packed = pack(dense_model, {}, {}, values or "fp32", structure)
    # As they are: to round int8 values again would not give the same numbers.
    matrices = packed.matrices | {name: matrix for name, matrix in kept.items() if name not in packed.tied}
    dense = {name: tensor for name, tensor in packed.dense.items() if name not in kept}
    about = {"layers": recurrent_layers(dense_model)}
    write(path, replace(packed, matrices=matrices, dense=dense, about=about))
