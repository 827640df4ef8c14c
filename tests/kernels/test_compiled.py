"""Code that is kept and loaded without numba."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

from srnn.kernels.cpu import compiled, object_code
from srnn.kernels.cpu.operands import Operand, product_call
from srnn.sparse import SparseMatrix

DOT = ("dot", "rows", 1, "fp32", False, 1)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Nothing is loaded or kept yet; how often code was compiled."""
    compiled.address_of(*DOT)
    code = object_code.made_object_code({DOT: "srnn_" + "_".join(map(str, DOT))})
    count = []
    monkeypatch.setattr(object_code, "made_object_code", lambda symbols: count.append(symbols) or code)
    monkeypatch.setattr(compiled, "_addresses", {})
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "code")
    return count


def right():
    """Whether the product that was loaded computes."""
    compiled._addresses.clear()
    weight = torch.randn(20, 30) * (torch.rand(20, 30) < 0.3)
    matrix, x = SparseMatrix.from_dense(weight), torch.randn(30, 1)
    run, y = product_call(Operand(matrix, "rows").form(1), matrix, x)
    run()
    return torch.allclose(y.flatten(), (weight @ x).flatten(), atol=1e-5)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:10], lambda data: b"", bytes.swapcase])
def test_a_damaged_file_is_compiled_anew(damage, made, tmp_path):
    assert right()
    assert right()
    assert len(made) == 1
    (path,) = (tmp_path / "code").glob("*.o")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert right()
    assert len(made) == 2
    assert path.read_bytes() == whole


def test_a_file_that_anyone_may_write_is_not_run(made, tmp_path):
    assert right()
    (path,) = (tmp_path / "code").glob("*.o")
    path.chmod(0o666)
    assert right()
    assert len(made) == 2


def test_where_it_cannot_be_kept_it_runs(made, tmp_path):
    (tmp_path / "code").write_text("no folder")
    assert right()
    assert right()
    assert len(made) == 2


def test_a_kernel_that_needs_numba_when_it_runs_is_refused(monkeypatch):
    def allocates(count):
        return np.zeros(count).sum() > count

    monkeypatch.setattr(object_code, "_source", lambda what, numba: (allocates, 1, numba.types.int64))
    with pytest.raises(RuntimeError, match=r"srnn_x: needs .*NRT"):
        object_code.made_object_code({("x",): "srnn_x"})


def test_code_is_good_for_this_processor_and_these_versions(monkeypatch):
    compiled._folder.cache_clear()
    try:
        here = compiled._folder()
        for name, value in (("NUMBA_CPU_FEATURES", "-avx2"), ("NUMBA_CPU_NAME", "generic")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                compiled._folder.cache_clear()
                assert compiled._folder() != here
        monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0")
        compiled._folder.cache_clear()
        assert compiled._folder() != here
    finally:
        compiled._folder.cache_clear()


def test_a_second_start_needs_no_numba():
    """Neither compiles nor imports it: a step of a stream, a sequence, and the layout of single elements."""
    code = """
import sys, torch, srnn
torch.manual_seed(0)
layer = torch.nn.GRU(40, 48, batch_first=True)
with torch.no_grad():
    for weight in layer.parameters():
        weight.mul_(torch.rand_like(weight) < 0.2)
    sparse = srnn.sparsify(layer, kernel="cpu")
    for steps in (1, 40):
        x = torch.randn(1, steps, 40)
        torch.testing.assert_close(sparse(x), layer(x), rtol=1e-5, atol=1e-5)
"""
    exec(code, {})
    check = code + "assert 'numba' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_arguments_are_what_they_were():
    several = compiled.numbers(1, -2, 1 << 40)
    assert list((ctypes.c_int64 * 3).from_buffer_copy(several)) == [1, -2, 1 << 40]
