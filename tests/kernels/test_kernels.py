"""Every backend against torch's modules in float64, with the weights rounded alike."""

import copy
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from srnn.cells import GATES
from srnn.inference.modules import sparse_module
from srnn.inference.packing import matrix_gates
from srnn.inference.sparsify import desparsify
from srnn.kernels import Auto, Cpu, Csr, Dense, LayerWeights
from srnn.kernels.cpu import announcing
from srnn.kernels.reference import run_layer
from srnn.registry import register
from srnn.sparse import DTYPES, PACKED_STRUCTURES, SparseMatrix
from tests.kernels.common import prune, relative_error

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 7, 63, 130])
# Of fp32 arithmetic, rounding of weights apart: they are the same in the reference.
TOLERANCE = 1e-5


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


@given(
    cell=st.sampled_from(["tanh", "relu", "gru", "lstm"]),
    kernel=st.sampled_from(["cpu", "cpu", "cpu", "csr", "dense"]),
    structure=st.sampled_from(PACKED_STRUCTURES),
    values=st.sampled_from(list(DTYPES)),
    inputs=SIZES,
    hidden=SIZES,
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    projected=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.4]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=17),
    packed=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=250)
def test_a_sparse_layer_is_torchs(
    cell, kernel, structure, values, inputs, hidden, layers, bidirectional, bias, batch_first, projected, density,
    lengths, packed, with_state, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)
    options = {"nonlinearity": cell} if kind is nn.RNN else {}
    if projected and cell == "lstm" and hidden > 1:
        options["proj_size"] = (hidden + 1) // 2
    module = kind(inputs, hidden, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options)
    if cell == "relu":  # contractive, so that errors do not grow
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(0.5)
    # Pruned in 32 x 1 blocks: so it has every structure (for blocks of a gate's end, see below).
    prune(module, density, 32)
    sparse = _sparsified(module, structure, values, kernel)
    truth = copy.deepcopy(desparsify(sparse)).double()
    steps, streams = (max(lengths), len(lengths)) if packed else (lengths[0], len(lengths))
    x = torch.randn(steps, streams, inputs)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    state = None
    if with_state:
        count = layers * (2 if bidirectional else 1)
        parts = [torch.randn(count, streams, options.get("proj_size", hidden))]
        parts += [torch.randn(count, streams, hidden)] * (cell == "lstm")
        state = tuple(parts) if cell == "lstm" else parts[0]
    given_state = None if state is None else tuple(p.clone() for p in as_tuple(state))
    double_state = None if state is None else tuple(p.double() for p in as_tuple(state))
    double_state = double_state if cell == "lstm" or state is None else double_state[0]
    if packed:
        x = pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted=False)
        wanted, end = truth(PackedSequence(x.data.double(), *x[1:]), double_state)
        got, got_end = sparse(x, state)
        assert torch.equal(got.batch_sizes, wanted.batch_sizes)
        got, wanted = got.data, wanted.data
    else:
        wanted, end = truth(x.double(), double_state)
        got, got_end = sparse(x, state)
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) < TOLERANCE
    for mine, theirs in zip(as_tuple(got_end), as_tuple(end), strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs) < TOLERANCE
    if given_state is not None:
        assert all(map(torch.equal, as_tuple(state), given_state)), "the given state is left as it is"


def _sparsified(module, structure, values, kernel):
    """Sparse whatever its density: a module without zeros would stay as it is."""
    weights = {
        name: w if w.ndim != 2 else SparseMatrix.from_dense(w, structure, values, matrix_gates(name, module))
        for name, w in module._parameters.items()
    }
    return sparse_module(module, weights, register.build("kernel", {"name": kernel}))


@pytest.mark.parametrize("structure", ["element", "16x1"])
@pytest.mark.parametrize("cell", list(GATES))
def test_every_output_is_written_and_nothing_else_read(cell, structure, monkeypatch):
    """Scratch and outputs that start as NaN end without one; so do padded lanes and streams."""
    empty = np.empty
    monkeypatch.setattr("srnn.kernels.cpu.backend.np.empty", lambda *a, **k: np.full_like(empty(*a, **k), np.nan))
    for hidden, batch in ((7, 1), (50, 3), (33, 17)):
        weights = random_layer(cell, 9, hidden, structure)
        sizes = torch.tensor([batch, batch, max(1, batch - 1), 1])
        x, state = torch.randn(int(sizes.sum()), 9), random_state(weights, batch)
        check_against_truth(weights, x, sizes, state)


def random_layer(cell, inputs, hidden, structure="element", values="fp32", density=0.3, reverse=False):
    gates = GATES[cell]

    def matrix(columns):
        weight = torch.randn(gates * hidden, columns) * (torch.rand(gates * hidden, columns) < density) * 0.3
        return SparseMatrix.from_dense(weight, structure, values, gates)

    bias = torch.randn(2, gates * hidden) * 0.2
    return LayerWeights(cell, matrix(inputs), matrix(hidden), bias[0], bias[1], reverse=reverse)


def random_state(weights, batch):
    return tuple(torch.randn(batch, weights.hidden_size) for _ in range(2 if weights.cell == "lstm" else 1))


def check_against_truth(weights, x, sizes, state, kernel=None):
    y, end = (kernel or Cpu()).layer(weights, CPU, torch.float32).run(x, sizes, state)
    wanted, wanted_end = run_layer(weights, x.double(), sizes, tuple(part.double() for part in state))
    assert relative_error(y, wanted) < TOLERANCE
    for mine, theirs in zip(end, wanted_end, strict=True):
        assert relative_error(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("kernel", [Cpu(), Csr(), Dense()])
def test_clipped_relu_which_torch_has_not(kernel):
    weights = random_layer("clipped_relu", 5, 40, density=0.9)
    x = 30 * torch.randn(12, 5)
    check_against_truth(weights, x, torch.tensor([3, 3, 3, 2, 1]), random_state(weights, 3), kernel)
    y, _ = kernel.layer(weights, CPU, torch.float32).run(x, torch.tensor([3, 3, 3, 2, 1]), random_state(weights, 3))
    assert float(y.max()) == 20.0
    assert float(y.min()) == 0.0


@pytest.mark.parametrize("cell", list(GATES))
def test_two_threads_give_what_one_gives_bit_for_bit(cell, monkeypatch):
    monkeypatch.setattr("srnn.kernels.cpu.backend.WORTH_THREADS", 0)
    for structure, batch, steps in (("16x1", 1, 5), ("element", 5, 3), ("8x1", 2, 40)):
        weights = random_layer(cell, 30, 101, structure, density=0.2)
        x, sizes, state = torch.randn(steps * batch, 30), torch.full((steps,), batch), random_state(weights, batch)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                y, end = Cpu().layer(weights, CPU, torch.float32).run(x, sizes, state)
            finally:
                torch.set_num_threads(1)
            results.append((y, *end))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("structure", ["element", "16x1"])
def test_rows_of_very_different_lengths(structure):
    """None, one, and all columns; one gate empty."""
    dense = torch.zeros(3 * 48, 300)
    dense[16:32] = torch.randn(16, 300)
    dense[35, 7] = 2.0
    dense[48:96, ::9] = 0.1
    w_hh = torch.zeros(3 * 48, 48)
    w_hh[:5] = torch.randn(5, 48)
    weights = LayerWeights(
        "gru", SparseMatrix.from_dense(dense, structure, gates=3), SparseMatrix.from_dense(w_hh, structure, gates=3)
    )
    for batch in (1, 4):
        x = torch.randn(6 * batch, 300)
        check_against_truth(weights, x, torch.full((6,), batch), random_state(weights, batch))


@pytest.mark.parametrize("structure", ["element", "32x1"])
def test_more_than_65536_columns(structure):
    weight = torch.zeros(40, 70_000)
    weight[:, 65_536:65_600] = torch.randn(40, 64)
    weight[3, 0] = 1.0
    matrix = SparseMatrix.from_dense(weight, structure)
    x = torch.randn(3, 70_000)
    product = Cpu().product(matrix, torch.arange(40.0), CPU, torch.float32)
    wanted = x.double() @ weight.double().T + torch.arange(40.0)
    assert relative_error(product(x), wanted) < TOLERANCE
    assert relative_error(product(x[:1]), wanted[:1]) < TOLERANCE


def test_products_with_nothing_to_do():
    for rows, columns, count in ((5, 3, 0), (0, 3, 2), (5, 0, 2)):
        matrix = SparseMatrix.from_dense(torch.zeros(rows, columns), "4x1")
        for kernel in (Cpu(), Csr(), Dense()):
            y = kernel.product(matrix, torch.ones(rows), CPU, torch.float32)(torch.randn(count, columns))
            assert torch.equal(y, torch.ones(count, rows))


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("structure", ["element", "8x1"])
def test_what_is_not_a_number_flows_on(cell, structure):
    """To every unit it is connected to, and to no other stream. A pruned weight multiplies nothing, so that infinity
    saturates like any large number."""
    module = prune(cell(4, 24), 0.5, 8)
    sparse = _sparsified(module, structure, "fp32", "cpu")
    x = torch.randn(9, 2, 4)
    x[2, 1] = float("nan")
    clean = torch.where(x.isnan(), 0.0, x)
    with torch.no_grad():
        got, wanted = sparse(x)[0], module(clean)[0]
        assert got[-1, 1].isnan().all()
        assert got[2, 1].isnan().any()
        torch.testing.assert_close(got[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[:2], wanted[:2], rtol=1e-5, atol=1e-6)
        x[2, 1] = torch.tensor([float("inf"), 1.0, 1.0, 1.0])
        large = torch.where(x.isinf(), 1e30, x)
        torch.testing.assert_close(sparse(x)[0], module(large)[0], rtol=1e-5, atol=1e-6)


def test_gates_saturate_exactly_and_small_numbers_keep_their_digits():
    """The rational tanh: large arguments give one, tiny ones themselves."""
    weight = SparseMatrix.from_dense(torch.zeros(6, 6))
    weights = LayerWeights("tanh", SparseMatrix.from_dense(torch.eye(6)), weight)
    x = torch.tensor([[1e-30, -1e-4, 0.5, 9.0, 50.0, -3e38]])
    y, _ = Cpu().layer(weights, CPU, torch.float32).run(x, torch.tensor([1]), (torch.zeros(1, 6),))
    torch.testing.assert_close(y, x.tanh(), rtol=4e-7, atol=0)


def test_a_backend_says_what_it_cannot_do():
    assert "not on cuda" in Cpu().supports(None, torch.device("cuda"))
    assert "fp32" in Cpu().supports(None, CPU, torch.float16)
    assert "fp32" in Csr().supports(None, CPU, torch.float64)
    assert Auto().supports(None, CPU) is None
    assert Auto().supports(None, CPU, torch.float64) is None, "torch can"


def test_without_numba_the_reason_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install numba" in Cpu().supports(None, CPU)


def test_dense_int8_is_int8():
    torch.manual_seed(0)
    weights = random_layer("gru", 50, 60)
    x, sizes, state = torch.randn(12, 50), torch.full((6,), 2), random_state(weights, 2)
    kernel = Dense("int8")
    y, _ = kernel.layer(weights, CPU, torch.float32).run(x, sizes, state)
    wanted, _ = run_layer(weights, x.double(), sizes, tuple(part.double() for part in state))
    assert 1e-5 < relative_error(y, wanted) < kernel.tolerance


def test_a_slow_first_call_says_what_it_does(capsys):
    announcing._announce.cache_clear()
    for expected in (1, 0, 0):
        with announcing.announced("a call", 1):
            time.sleep(1.3 if expected else 0.0)
        assert capsys.readouterr().err.count(announcing.MESSAGE) == expected


def test_torch_keeps_its_number_of_threads():
    """numba's pool and torch may share an OpenMP, and starting the pool sets its number of threads."""
    code = """
import torch, srnn
torch.set_num_threads(2)
layer = torch.nn.GRU(512, 512)
with torch.no_grad():
    for weight in layer.parameters():
        if weight.ndim == 2:
            weight.mul_(torch.rand_like(weight) < 0.3)
    srnn.sparsify(layer, kernel="cpu")(torch.randn(4, 2, 512))
assert torch.get_num_threads() == 2, torch.get_num_threads()
import numba
assert numba.threading_layer() == "omp", "it ran in parallel"
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.slow
def test_it_runs_where_nothing_compiled_can_be_kept():
    """As in a container whose files and home are read-only."""
    code = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = [c for c in caching.CacheImpl._locator_classes if "UserProvided" in c.__name__]
import torch, srnn
layer = torch.nn.GRU(8, 8)
with torch.no_grad():
    for weight in layer.parameters():
        if weight.ndim == 2:
            weight.mul_(torch.rand_like(weight) < 0.3)
    y, _ = srnn.sparsify(layer, kernel="cpu")(torch.randn(4, 2, 8))
assert y.isfinite().all()
"""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
