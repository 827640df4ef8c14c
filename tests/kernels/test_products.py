"""Products of a sparse matrix with rows of inputs."""

import pytest
import torch

from srnn.kernels.triton.backend import Triton
from srnn.sparse import SparseMatrix
from tests.kernels.common import relative_error
from tests.kernels.triton_cases import DEVICE, TOLERANCE, here, pruned


@pytest.mark.gpu
@here
@pytest.mark.parametrize("structure", ["element", "8x1", "16x1", "32x1"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 40, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(structure, rows, dtype):
    """Of few rows and of many, with and without a bias, whichever side is contiguous; a row of NaN stays one."""
    generator = torch.Generator().manual_seed(rows)
    height = 1 if structure == "element" else int(structure[:-2])
    values = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    matrix = pruned(3 * 37, 50, 3, height, 0.08, values, generator)
    dense = matrix.to_dense().double()
    x = torch.randn(rows, 50, generator=generator).to(dtype)
    b = torch.randn(111, generator=generator) if rows % 2 else None
    wanted = x.double() @ dense.T + (0 if b is None else b)
    product = Triton().product(matrix, b, DEVICE, dtype)
    lost = rows // 2 if rows > 1 and product.is_sparse_for(rows, dtype) else rows
    x[lost : lost + 1] = torch.nan
    others = [row for row in range(rows) if row != lost]
    for together in (False, True):
        y = product(x.to(DEVICE), streams_together=together).cpu()
        assert y.dtype == dtype
        assert y.stride() == ((1, rows) if together else (111, 1))
        assert relative_error(y[others], wanted[others]) < TOLERANCE[dtype]
        if lost < rows:
            assert torch.equal(y[lost].isnan(), (dense != 0).any(1))


@pytest.mark.gpu
@here
def test_products_of_so_many_inputs_that_columns_just_fit():
    """Places without a block multiply a row of zeros after the last input, which 16 bits cannot name."""
    dense = torch.zeros(16, 1 << 16)
    dense[:, 1:40] = 0.5
    matrix = SparseMatrix.from_dense(dense, "16x1", "fp16")
    assert matrix.columns.dtype == torch.uint16
    x = torch.ones(5, 1 << 16, dtype=torch.float16)
    x[:, 0] = torch.inf
    y = Triton().product(matrix, None, DEVICE, torch.float16)(x.to(DEVICE))
    assert (y == 0.5 * 39).all()


@pytest.mark.gpu
@here
def test_products_of_other_values_than_inputs():
    generator = torch.Generator().manual_seed(0)
    matrix = pruned(3 * 37, 50, 3, 16, 0.08, "fp32", generator)
    x = torch.randn(70, 50, generator=generator).half()
    y = Triton().product(matrix, None, DEVICE, torch.float16)(x.to(DEVICE))
    assert relative_error(y.cpu(), x.double() @ matrix.to_dense().double().T) < 1e-3


@pytest.mark.gpu
@here
def test_products_with_many_rows_are_dense_where_that_is_faster():
    generator = torch.Generator().manual_seed(0)
    for structure, density, sparse in (
        ("32x1", 0.1, True),
        ("32x1", 0.3, False),
        ("16x1", 0.3, False),
        ("8x1", 0.01, False),
    ):
        matrix = pruned(3 * 64, 64, 3, int(structure[:-2]), density, "fp16", generator)
        product = Triton().product(matrix, None, DEVICE, torch.float16)
        assert product.is_sparse_for(100, torch.float16) == sparse
        assert product.is_sparse_for(2, torch.float16)
        assert product.is_sparse_for(100, torch.float32) == (matrix.height >= 16)
