import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srnn.sparse import ElementMatrix


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_there_and_back_is_exact(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    matrix = ElementMatrix.from_dense(weight)
    matrix.check()
    assert torch.equal(matrix.to_dense(), weight)
    assert matrix.nnz == int((weight != 0).sum())
    half = ElementMatrix.from_dense(weight, "fp16")
    assert torch.equal(half.to_dense(), weight.half().float())


def test_bytes_are_six_or_four_an_entry():
    weight = torch.randn(300, 200) * (torch.rand(300, 200) < 0.1)
    pointers = 301 * 4
    assert ElementMatrix.from_dense(weight).nbytes == 6 * int((weight != 0).sum()) + pointers
    assert ElementMatrix.from_dense(weight, "fp16").nbytes == 4 * int((weight != 0).sum()) + pointers


def test_columns_take_16_bits_where_they_fit():
    for columns, dtype in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        weight = torch.zeros(2, columns)
        weight[1, -1] = 3.0
        matrix = ElementMatrix.from_dense(weight)
        assert matrix.columns.dtype == dtype
        assert torch.equal(matrix.to_dense(), weight)


def test_a_value_that_rounds_to_zero_is_still_an_entry():
    matrix = ElementMatrix.from_dense(torch.tensor([[1e-12, 0.0, 2.0]]), "fp16")
    assert matrix.nnz == 2


@pytest.mark.parametrize(
    ("weight", "values"), [(torch.tensor([[float("nan")]]), "fp32"), (torch.tensor([[1e6]]), "fp16")]
)
def test_what_cannot_be_stored_is_refused(weight, values):
    with pytest.raises(ValueError, match="not finite"):
        ElementMatrix.from_dense(weight, values)


GOOD = {
    "shape": (2, 3),
    "values": torch.tensor([1.0, 2.0, 3.0]),
    "columns": torch.tensor([0, 2, 1], dtype=torch.uint16),
    "row_pointers": torch.tensor([0, 2, 3], dtype=torch.int32),
}


@pytest.mark.parametrize(
    "bad",
    [
        {"shape": (3, 3)},
        {"shape": (2, 2)},
        {"shape": (-1, 3)},
        {"values": torch.tensor([1.0, 2.0])},
        {"values": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)},
        {"values": torch.tensor([1.0, 2.0, float("inf")])},
        {"columns": torch.tensor([0, 3, 1], dtype=torch.uint16)},
        {"columns": torch.tensor([0, -1, 1], dtype=torch.int32)},
        {"columns": torch.tensor([2, 2, 1], dtype=torch.uint16)},
        {"columns": torch.tensor([0, 2, 1])},
        {"row_pointers": torch.tensor([0, 4, 3], dtype=torch.int32)},
        {"row_pointers": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {"row_pointers": torch.tensor([0, 2, 2], dtype=torch.int32)},
    ],
)
def test_check_finds_every_kind_of_damage(bad):
    ElementMatrix(**GOOD).check()
    with pytest.raises(ValueError, match=r".+"):
        ElementMatrix(**(GOOD | bad)).check()
