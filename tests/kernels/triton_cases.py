"""What the tests of the Triton kernels share.

They run on a GPU, or on a CPU in Triton's interpreter, which is switched on before triton is imported and reads past
an array with a crash: ``test_triton.py`` runs those marked ``gpu`` so, in a process of its own.
"""

import os
from dataclasses import replace

import pytest
import torch

from srnn.cells import GATES
from srnn.kernels import LayerWeights
from srnn.kernels.reference import run_layer
from srnn.kernels.triton import backend
from srnn.sparse import SparseMatrix
from tests.kernels.common import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

here = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def make_faster():
    """Triton's interpreter without what it does in vain, or again for each number: half of its time."""
    from triton.language.core import block_type
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, array_type = interpreter._patch_lang, interpreter._get_np_dtype
    patched, blocks, array_types = set(), {}, {}

    def patch_new(function):
        """All names of its language were looked through at every call; what is exchanged in a module is the same."""
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)  # and nothing is put back
        return interpreter._LangPatchScope()

    def block_of(element, shape):
        key = element.name, *shape
        if key not in blocks:
            blocks[key] = block_type(element, shape)
        return blocks[key]

    def array_type_of(kind):
        if kind.name not in array_types:
            array_types[kind.name] = array_type(kind)
        return array_types[kind.name]

    interpreter._patch_lang = patch_new
    interpreter._get_np_dtype = array_type_of
    interpreter.InterpreterBuilder.get_block_ty = lambda _, element, shape: block_of(element, shape)
    block_type.with_element_ty = lambda block, element: block_of(element, block.shape)
    # Each sum was made again in int64, for a check that is made in debugging alone.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


if INTERPRETED:
    make_faster()


def use_chip(monkeypatch, tuning=None, **changes):
    """Plan from now on as for a device that is this one but for some changes, or but for some measured numbers."""
    chip = backend.chip_of(DEVICE)
    chip = replace(chip, **changes, tuning=replace(chip.tuning, **(tuning or {})))
    monkeypatch.setattr(backend, "chip_of", lambda device: chip)
    return chip


def pruned(rows, columns, gates, height, density, values, generator):
    groups = -(-(rows // gates) // height)
    kept = torch.rand(gates, groups, columns, generator=generator) < density
    kept = kept.repeat_interleave(height, dim=1)[:, : rows // gates].reshape(rows, columns)
    scale = 0.8 / max(1.0, (columns * density) ** 0.5)
    weight = torch.randn(rows, columns, generator=generator) * scale * kept
    return SparseMatrix.from_dense(weight, "element" if height == 1 else f"{height}x1", values, gates)


def layer(cell, inputs, hidden, height=1, density=0.2, values="fp32", bias=True, reverse=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = GATES[cell]
    w_ih = pruned(gates * hidden, inputs, gates, height, density, values, generator)
    w_hh = pruned(gates * hidden, hidden, gates, height, density, values, generator)
    b = torch.randn(2, gates * hidden, generator=generator) * 0.1
    return LayerWeights(cell, w_ih, w_hh, b[0] if bias else None, b[1] if bias else None, reverse=reverse)


def state_of(weights, streams, generator):
    sizes = 2 if weights.cell == "lstm" else 1
    return tuple(torch.randn(streams, weights.hidden_size, generator=generator) * 0.5 for _ in range(sizes))


def check(weights, dtype, sizes, precision="tf32x3"):
    generator = torch.Generator().manual_seed(1)
    streams = int(sizes[0])
    x = torch.randn(int(sizes.sum()), weights.w_ih.shape[1], generator=generator).to(dtype)
    state = tuple(part.to(dtype) for part in state_of(weights, streams, generator))
    kernel = backend.Triton(precision)
    assert kernel.supports(weights, DEVICE, dtype, streams) is None
    ready = kernel.layer(weights, DEVICE, dtype)
    given = tuple(part.to(DEVICE) for part in state)
    kept = [part.clone() for part in given]
    y, after = ready.run(x.to(DEVICE), sizes, given)
    truth, end = run_layer(weights, x.double(), sizes, tuple(part.double() for part in state))
    tolerance = 1e-3 if precision == "tf32" else TOLERANCE[dtype]
    assert y.dtype == dtype
    assert relative_error(y.cpu(), truth) < tolerance
    for got, wanted in zip(after, end, strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got.cpu(), wanted) < tolerance
    for now, before in zip(given, kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    return y, after


def check_both(forward, backward, dtype, sizes):
    """Both directions in one launch are each as by itself. Returns the recurrence."""
    streams = int(sizes[0])
    x = torch.randn(int(sizes.sum()), forward.w_ih.shape[1]).to(dtype)
    each = [state_of(weights, streams, None) for weights in (forward, backward)]
    state = tuple(torch.stack(parts).to(dtype) for parts in zip(*each, strict=True))
    ready = backend.Triton().both(forward, backward, DEVICE, dtype)
    ready = getattr(ready, "inner", ready)  # which is replayed on a GPU
    assert ready.recurrence.count == 2
    y, end = ready.run(x.to(DEVICE), sizes, tuple(part.to(DEVICE) for part in state))
    for d, weights in enumerate((forward, backward)):
        wanted, after = run_layer(weights, x.double(), sizes, tuple(part[d].double() for part in state))
        assert relative_error(y.cpu().chunk(2, dim=1)[d], wanted) < TOLERANCE[dtype]
        for got, part in zip(end, after, strict=True):
            assert relative_error(got[d].cpu(), part) < TOLERANCE[dtype]
    return ready.recurrence
