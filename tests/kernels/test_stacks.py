"""All layers of one stream in one compiled call: checked in float64, at odd sizes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import srnn
from srnn.kernels.cpu import backend
from srnn.kernels.cpu.compiled import numbers
from srnn.kernels.cpu.shapes import NO_MEMORY, NUMBERS_OF_PRODUCT, WIDTH_OF_X
from srnn.sparse import SparseMatrix

LAYERS = [
    lambda i, h, n: nn.GRU(i, h, n),
    lambda i, h, n: nn.LSTM(i, h, n),
    lambda i, h, n: nn.RNN(i, h, n),
    lambda i, h, n: nn.RNN(i, h, n, nonlinearity="relu", bias=False),
]


def pruned(network, height):
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                gates = len(weight) // network.hidden_size
                kept = torch.rand(gates, -(-network.hidden_size // height), weight.shape[1]) > 0.8
                kept = kept.repeat_interleave(height, 1)[:, : network.hidden_size].clone()
                kept[0, :height] = False  # rows without an entry
                weight.mul_(kept.flatten(0, 1))
    return network.eval()


@pytest.mark.parametrize(("height", "values"), [(1, "fp32"), (1, "fp16"), (16, "fp32")])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("make", LAYERS)
def test_sequences_and_steps_are_those_of_torch_in_float64(make, layers, height, values, monkeypatch):
    units = {1: 51, 3: 48}[layers]  # whose last group of rows is cut, or whole
    network = pruned(make(13, 37 if height == 1 else units, layers), height)
    sparse = srnn.sparsify(network, "element" if height == 1 else "16x1", values, "cpu")
    exact = srnn.desparsify(sparse).double()
    monkeypatch.setattr(backend._Stack, "_one_after_the_other", None)
    state, wanted = None, None
    for steps in (1, 2, 5, 16, 17, 40, 1):
        x = torch.randn(steps, 1, 13)
        y, state = sparse(x, state)
        want, wanted = exact(x.double(), wanted)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
        pairs = zip(state, wanted, strict=True) if isinstance(state, tuple) else [(state, wanted)]
        for got, end in pairs:
            torch.testing.assert_close(got.double(), end, rtol=1e-5, atol=1e-5)
    x = torch.randn(1, 13)
    y, want = sparse.step(x, state)[0], exact(x[None].double(), wanted)[0][0]
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_no_plain_memory():
    network = pruned(nn.LSTM(13, 37, 2), 1)
    sparse = srnn.sparsify(network, kernel="cpu")
    x = torch.randn(13, 1, 9).transpose(0, 2)  # strided
    state = tuple(torch.randn(37, 1, 2).transpose(0, 2) for _ in range(2))
    torch.testing.assert_close(sparse(x, state), network(x, state))
    before = copy.deepcopy(state)
    sparse(x, state)
    torch.testing.assert_close(state, before, rtol=0, atol=0)  # left as it was


def test_what_is_not_finite_reaches_those_connected_to_it():
    network = pruned(nn.GRU(13, 37, 2), 1)
    sparse = srnn.sparsify(network, kernel="cpu")
    x = torch.randn(3, 1, 13)
    x[1, 0, 4] = torch.nan
    y, _ = sparse(x)
    assert y[0].isfinite().all()
    assert y[2].isnan().any()


def test_two_threads_each_with_a_state_of_its_own():
    network = pruned(nn.LSTM(13, 37, 2), 1)
    sparse = srnn.sparsify(network, kernel="cpu")
    inputs = torch.randn(2, 200, 1, 13)

    def stream(x):
        state, outputs = None, []
        with torch.inference_mode():
            for x_BI in x:
                y, state = sparse.step(x_BI, state)
                outputs.append(y)
        return torch.stack(outputs)

    with ThreadPoolExecutor(2) as pool:
        for x, y in zip(inputs, pool.map(stream, inputs), strict=True):
            torch.testing.assert_close(y, network(x)[0])


def test_work_for_several_threads_runs_layer_by_layer(monkeypatch):
    network = pruned(nn.GRU(13, 37, 2), 1)
    sparse = srnn.sparsify(network, kernel="cpu")
    x = torch.randn(6, 1, 13)
    wanted = sparse(x)
    monkeypatch.setattr(backend, "WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(sparse(x), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_product_that_finds_no_memory_says_so(rows):
    product = backend._Product(SparseMatrix.from_dense(torch.randn(37, 13)), None)
    x, y = torch.randn(rows, 13), torch.zeros(rows, 37)
    call, _, plan = product.plan(rows)
    too_many = plan.copy()
    too_many[5] = 1 << 56  # inputs
    too_many[NUMBERS_OF_PRODUCT + WIDTH_OF_X] = 1 << 56
    assert call(numbers(too_many.ctypes.data, rows, x.data_ptr(), y.data_ptr())) == NO_MEMORY
    assert not y.any()
