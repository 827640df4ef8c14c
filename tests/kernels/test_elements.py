"""Single elements in every form this processor has, against float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srnn.cells import GATES
from srnn.kernels.cpu import operands
from srnn.kernels.cpu.operands import Operand, able_forms, product_call
from srnn.sparse import DTYPES, SparseMatrix
from tests.kernels.common import Guarded, relative_error
from tests.kernels.test_kernels import check_against_truth, random_layer, random_state

FORMS = able_forms()


def multiplied(matrix, x_IS, form):
    """By the bare product; outputs start as NaN."""
    operand = Operand(matrix, form)
    run, y = product_call(operand.form(x_IS.shape[1]), matrix, x_IS)
    run()
    rows = y.permute(0, 1, 3, 2).reshape(matrix.gates, -1, y.shape[2])[:, : matrix.units]
    return rows.reshape(matrix.shape[0], -1)[:, : x_IS.shape[1]]


def forms_for(streams):
    return [form for form in FORMS if streams == 1 or form != "gathers"]


@given(
    gates=st.sampled_from([1, 3, 4]),
    units=st.sampled_from([1, 7, 16, 24, 100, 130, 200]),
    columns=st.sampled_from([1, 9, 31, 32, 33, 47, 130, 300]),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0]),
    values=st.sampled_from(list(DTYPES)),
    streams=st.sampled_from([1, 1, 2, 4, 5]),
    empty=st.lists(st.integers(0, 10**6), max_size=3),
    full=st.lists(st.integers(0, 10**6), max_size=3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_every_form_is_right(gates, units, columns, density, values, streams, empty, full, seed):
    torch.manual_seed(seed)
    rows = gates * units
    weight = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
    for row in empty:
        weight[row % rows] = 0.0
    for row in full:
        weight[row % rows] = torch.randn(columns)
    matrix, x = SparseMatrix.from_dense(weight, "element", values, gates), torch.randn(columns, streams)
    wanted = matrix.to_dense().double() @ x.double()
    # Against the sum of magnitudes: where terms cancel, what is left is as uncertain as they were.
    rounding = 1e-6 * (matrix.to_dense().double().abs() @ x.double().abs())
    for form in forms_for(streams):
        assert ((multiplied(matrix, x, form).double() - wanted).abs() <= rounding).all(), form


@pytest.mark.parametrize("streams", [1, 4])
def test_more_columns_than_16_bits_number(streams):
    weight = torch.zeros(40, 70_000)
    weight[:, 65_500:65_600] = torch.randn(40, 100)
    weight[3, 0], weight[5, 69_999] = 1.0, 2.0
    matrix, x = SparseMatrix.from_dense(weight), torch.randn(70_000, streams)
    for form in forms_for(streams):
        assert relative_error(multiplied(matrix, x, form), weight.double() @ x.double()) < 1e-6, form


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("streams", [1, 4])
def test_what_is_not_finite_reaches_only_rows_with_a_weight_there(bad, streams):
    weight = torch.rand(64, 100) * (torch.rand(64, 100) < 0.1)
    matrix, x = SparseMatrix.from_dense(weight), torch.rand(100, streams)
    x[17, 0] = bad
    for form in forms_for(streams):
        y = multiplied(matrix, x, form)
        assert torch.equal(~y[:, 0].isfinite(), weight[:, 17] != 0), form
        assert y[:, 1:].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", list(GATES))
def test_layers_run_on_every_form(cell, form, monkeypatch):
    monkeypatch.setattr(operands, "able_forms", lambda: ("rows", form))
    monkeypatch.setattr(operands, "_timed", lambda forms, *_: {one: float(one[0] != form) for one in forms})
    monkeypatch.setattr(operands, "_fastest", {})
    for hidden, batch, values in ((24, 1, "fp32"), (150, 1, "fp16"), (50, 5, "int8")):
        weights = random_layer(cell, 9, hidden, "element", values)
        sizes = torch.tensor([batch, batch, max(1, batch - 1), 1])
        check_against_truth(weights, torch.randn(int(sizes.sum()), 9), sizes, random_state(weights, batch))
        one = torch.tensor([1])
        check_against_truth(weights, torch.randn(1, 9), one, random_state(weights, 1))
    assert form in operands._fastest.values()


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("streams", [1, 4])
def test_nothing_is_touched_outside_its_arrays(values, streams):
    guarded = Guarded()
    for units, columns in ((16, 9), (24, 40), (130, 129)):
        weight = torch.randn(3 * units, columns) * (torch.rand(3 * units, columns) < 0.2)
        matrix, x = SparseMatrix.from_dense(weight, "element", values, 3), torch.randn(columns, streams)
        for name in forms_for(streams):
            form = Operand(matrix, name).form(streams)
            form = replace(form, parts=tuple(guarded(part) for part in form.parts))
            run, y = product_call(form, matrix, x, guarded)
            run()
            assert relative_error(y.sum(), matrix.to_dense().double().matmul(x.double()).sum()) < 1e-3


def test_the_fastest_form_is_kept_and_remembered(monkeypatch):
    if len(FORMS) == 1:
        pytest.skip("this processor has one form")
    asked = []

    def timed(forms, matrix, streams):
        asked.append(streams)
        return {one: float(one[0] == "rows") for one in forms}

    monkeypatch.setattr(operands, "_timed", timed)
    monkeypatch.setattr(operands, "_fastest", {})
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.2)
    for _ in range(2):
        assert Operand(SparseMatrix.from_dense(weight)).form(1).name == FORMS[1]
    assert asked == [1], "a like matrix is not measured again"
    assert Operand(SparseMatrix.from_dense(weight, "4x1")).form(1).name == "dense", "of blocks the only other one"


def test_numbas_settings_forbid_forms(monkeypatch):
    able_forms.cache_clear()
    try:
        monkeypatch.setenv("NUMBA_CPU_FEATURES", "-avx512f")
        assert "windows" not in able_forms()
        able_forms.cache_clear()
        monkeypatch.setenv("NUMBA_CPU_FEATURES", "-avx512f,-avx2")
        assert able_forms() == ("rows", "dense")
    finally:
        able_forms.cache_clear()


def test_a_projection_may_have_another_structure():
    """Products of both take different numbers of streams at a time."""
    weights = random_layer("lstm", 9, 40)
    w_hr = SparseMatrix.from_dense(torch.randn(32, 40) * (torch.rand(32, 40) < 0.5), "32x1")
    recurrent = torch.randn(160, 32) * (torch.rand(160, 32) < 0.3) * 0.3
    for structure in ("element", "16x1"):
        layer = replace(weights, w_hr=w_hr, w_hh=SparseMatrix.from_dense(recurrent, structure, gates=4))
        for batch in (1, 3, 5):
            state = (torch.randn(batch, 32), torch.randn(batch, 40))
            check_against_truth(layer, torch.randn(3 * batch, 9), torch.full((3,), batch), state)
