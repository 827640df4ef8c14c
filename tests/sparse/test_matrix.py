import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srnn.formats import block_height
from srnn.sparse import DTYPES, PACKED_STRUCTURES, SparseMatrix, cheapest_structure, has_structure, packed_nbytes


def random_weight(rows, columns, density, seed, height=1):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // height), columns, generator=generator) < density
    return torch.randn(rows, columns, generator=generator) * kept.repeat_interleave(height, dim=0)[:rows]


@given(
    units=st.integers(0, 40),
    columns=st.integers(0, 30),
    gates=st.sampled_from([1, 3, 4]),
    density=st.sampled_from([0, 0.1, 0.5, 1]),
    structure=st.sampled_from(PACKED_STRUCTURES),
    values=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=300)
def test_there_and_back(units, columns, gates, density, structure, values, seed):
    weight = random_weight(gates * units, columns, density, seed)
    matrix = SparseMatrix.from_dense(weight, structure, values, gates)
    matrix.check()
    dense = matrix.to_dense()
    if values == "int8":
        # Half a step of a scale that clips at half of the largest at most; and what is clipped.
        assert dense.shape == weight.shape
        assert bool(((dense != 0) <= (weight != 0)).all())
        if weight.numel():
            assert float((dense - weight).abs().max()) <= 0.51 * float(weight.abs().max()) + 1e-9
    else:
        assert torch.equal(dense, weight.to(DTYPES[values]).float())
    assert (matrix.structure, matrix.values_name) == (structure, values)
    assert matrix.nbytes == packed_nbytes(weight, structure, values, gates)
    for gate in range(gates):
        part = matrix.gate(gate)
        part.check()
        assert torch.equal(part.to_dense(), dense[gate * units : (gate + 1) * units])
    if gates == 1 and units:
        numbers = torch.tensor([0, units - 1, units // 2, 0])
        assert torch.equal(matrix.rows(numbers), dense[numbers])
        assert torch.equal(matrix.rows(numbers[1:2]), dense[numbers[1:2]])


@pytest.mark.parametrize(
    ("structure", "values", "most"),
    [("element", "fp32", 6.05), ("element", "fp16", 4.05), ("16x1", "fp32", 4.15), ("16x1", "fp16", 2.15)],
)
def test_bytes_of_a_non_zero(structure, values, most):
    """Row pointers apart, as in the targets the project has set itself."""
    weight = random_weight(3 * 256, 256, 0.1, 0, block_height(structure))
    matrix = SparseMatrix.from_dense(weight, structure, values, 3)
    assert (matrix.nbytes - matrix.row_pointers.nbytes) / int((weight != 0).sum()) <= most


def test_columns_take_16_bits_where_they_fit():
    for columns, dtype in ((1 << 16, torch.uint16), ((1 << 16) + 1, torch.int32)):
        weight = torch.zeros(2, columns)
        weight[1, -1] = 3.0
        matrix = SparseMatrix.from_dense(weight)
        assert matrix.columns.dtype == dtype
        assert torch.equal(matrix.to_dense(), weight)


def test_a_value_that_rounds_to_zero_is_still_an_entry():
    for values in ("fp16", "int8"):
        matrix = SparseMatrix.from_dense(torch.tensor([[1e-12, 0.0, 2.0]]), "element", values)
        assert matrix.entries == 2


@pytest.mark.parametrize("height", [1, 8, 32])
def test_the_cheapest_structure_is_the_one_it_was_pruned_in(height):
    weight = random_weight(128, 50, 0.2, 1, height)
    assert block_height(cheapest_structure(weight)) == height
    matrix = SparseMatrix.from_dense(weight, "auto")
    assert matrix.nbytes == min(packed_nbytes(weight, structure) for structure in PACKED_STRUCTURES)


def test_a_matrix_has_the_blocks_it_was_pruned_in_and_smaller_ones():
    weight = random_weight(128, 50, 0.2, 1, 16)
    assert [has_structure(weight, s) for s in PACKED_STRUCTURES] == [True, True, True, True, False]
    assert not has_structure(random_weight(128, 50, 0.2, 1), "4x1")


def test_blocks_do_not_cross_gates():
    weight = torch.ones(3 * 5, 2)
    matrix = SparseMatrix.from_dense(weight, "4x1", gates=3)
    assert matrix.groups == 6
    assert matrix.blocks == 12
    assert torch.equal(matrix.to_dense(), weight)


def test_int8_scales_follow_the_data():
    weight = random_weight(64, 40, 0.5, 3)
    weight[:, 0] = 8.0  # large weights on a column that the data hardly uses
    energy = torch.ones(40)
    energy[0] = 1e-6

    def error(matrix):
        return float(((matrix.to_dense() - weight).square() * energy).sum())

    plain = SparseMatrix.from_dense(weight, "element", "int8")
    calibrated = SparseMatrix.from_dense(weight, "element", "int8", energy=energy)
    assert error(calibrated) < 0.7 * error(plain)


def test_slices_lie_on_row_groups_within_a_gate():
    weight = random_weight(3 * 20, 7, 0.4, 2, 4)
    matrix = SparseMatrix.from_dense(weight, "8x1", gates=3)
    for start, stop in ((0, 8), (8, 20), (20, 28), (36, 40), (16, 16)):
        assert torch.equal(matrix[start:stop].to_dense(), weight[start:stop])
    for start, stop in ((1, 8), (0, 5), (8, 28)):
        with pytest.raises(ValueError, match="row groups"):
            matrix[start:stop]
    with pytest.raises(TypeError):
        matrix[3]
    with pytest.raises(IndexError):
        matrix.gate(3)


@pytest.mark.parametrize(
    ("weight", "values"), [(torch.tensor([[float("nan")]]), "int8"), (torch.tensor([[1e6]]), "fp16")]
)
def test_what_cannot_be_stored_is_refused(weight, values):
    with pytest.raises(ValueError, match="not finite"):
        SparseMatrix.from_dense(weight, "element", values)


def test_what_is_no_matrix_of_gates_is_refused():
    with pytest.raises(ValueError, match="2 dimensions"):
        SparseMatrix.from_dense(torch.ones(3))
    with pytest.raises(ValueError, match="3 gates"):
        SparseMatrix.from_dense(torch.ones(4, 2), gates=3)
    with pytest.raises(ValueError, match="no structure '2x1'"):
        SparseMatrix.from_dense(torch.ones(4, 2), "2x1")


GOOD = {
    "shape": (5, 3),
    "gates": 1,
    "values": torch.ones(3, 4).index_put_((torch.tensor([2]),), torch.tensor([1.0, 0, 0, 0])),
    "columns": torch.tensor([0, 2, 1], dtype=torch.uint16),
    "row_pointers": torch.tensor([0, 2, 3], dtype=torch.int32),
}
INT8 = {"values": torch.tensor([[1] * 4, [1] * 4, [1, 0, 0, 0]], dtype=torch.int8), "scales": torch.ones(2)}


@pytest.mark.parametrize(
    "bad",
    [
        {"shape": (9, 3)},
        {"shape": (5, 2)},
        {"shape": (-1, 3)},
        {"gates": 2},
        {"gates": 0},
        {"values": torch.ones(2, 4)},
        {"values": torch.ones(3, 5)},
        {"values": torch.ones(3)},
        {"values": torch.ones(3, 4)},  # reaches past the last row
        {"values": torch.ones(3, 4, dtype=torch.float64)},
        {"values": torch.full((3, 4), float("inf"))},
        {"columns": torch.tensor([0, 3, 1], dtype=torch.uint16)},
        {"columns": torch.tensor([0, -1, 1], dtype=torch.int32)},
        {"columns": torch.tensor([2, 2, 1], dtype=torch.uint16)},
        {"columns": torch.tensor([0, 2, 1])},
        {"columns": torch.tensor([0, 2], dtype=torch.uint16)},
        {"row_pointers": torch.tensor([0, 4, 3], dtype=torch.int32)},
        {"row_pointers": torch.tensor([1, 2, 3], dtype=torch.int32)},
        {"row_pointers": torch.tensor([0, 2, 2], dtype=torch.int32)},
        {"row_pointers": torch.tensor([0, 2, 3])},
        {"scales": torch.ones(2)},
        INT8 | {"scales": None},
        INT8 | {"scales": torch.ones(3)},
        INT8 | {"scales": torch.tensor([1.0, float("nan")])},
        INT8 | {"scales": torch.tensor([1.0, 0.0])},
    ],
)
def test_damaged_parts_are_found(bad):
    SparseMatrix(**GOOD).check()
    SparseMatrix(**GOOD | INT8).check()
    with pytest.raises(ValueError, match=r"."):
        SparseMatrix(**GOOD | bad).check()
