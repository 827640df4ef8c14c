"""Biases and packed weights that are written to in place: the next call of any kind runs the new ones."""

import copy

import pytest
import torch
from torch import nn

import srnn
from srnn.inference.base import SparseModule
from srnn.models import gru
from srnn.models.recurring import Recurring
from tests.inference.test_sparsify import pruned

KERNELS = ("cpu", "csr", "dense", "auto")
WRITES = {
    "data": lambda layer: layer.bias_hh_l0.data.fill_(1.0),
    "copy_": lambda layer: layer.bias_hh_l0.copy_(torch.ones(99)),
    "listed": lambda layer: [b.data.fill_(1.0) for name, b in layer.named_buffers() if name == "bias_hh_l0"],
    "state_dict": lambda layer: layer.state_dict()["bias_hh_l0"].fill_(1.0),
    "assigned": lambda layer: setattr(layer, "bias_hh_l0", torch.ones(99)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("write", WRITES)
def test_a_bias_written_in_place_is_run(kernel, write):
    torch.manual_seed(0)
    dense, x_TBI = pruned(nn.GRU(12, 33)), torch.randn(7, 1, 12)
    sparse = srnn.sparsify(dense, kernel=kernel)
    state = torch.zeros(1, 1, 33)
    with torch.no_grad():
        for _ in range(2):  # the second one is the usual call
            sparse(x_TBI), sparse.step(x_TBI[0], state)
        WRITES[write](sparse)
        dense.bias_hh_l0.fill_(1.0)
        wanted = dense(x_TBI)[0]
        torch.testing.assert_close(sparse(x_TBI)[0], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sparse.step(x_TBI[0], state)[0], wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cpu", "dense"])
def test_a_bias_that_was_kept_may_be_written_to_at_any_time(kernel):
    torch.manual_seed(0)
    dense, x_TBI, state = pruned(nn.GRU(12, 33)), torch.randn(7, 1, 12), torch.zeros(1, 1, 33)
    sparse = srnn.sparsify(dense, kernel=kernel)
    kept = sparse.bias_hh_l0
    with torch.no_grad():
        for value in (1.0, -1.0):
            for _ in range(2):
                sparse(x_TBI), sparse.step(x_TBI[0], state)
            kept.fill_(value)
            dense.bias_hh_l0.fill_(value)
            assert (sparse(x_TBI)[0] - dense(x_TBI)[0]).abs().max() < 1e-5
            assert (sparse.step(x_TBI[0], state)[0] - dense(x_TBI)[0][0]).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["cpu", "csr"])
def test_packed_values_written_in_place_are_run(kernel):
    torch.manual_seed(0)
    dense, x_TBI = pruned(nn.GRU(12, 33)), torch.randn(7, 1, 12)
    sparse = srnn.sparsify(dense, kernel=kernel)
    with torch.no_grad():
        sparse(x_TBI), sparse(x_TBI)
        sparse.weight_hh_l0_packed.values.mul_(2)
        dense.weight_hh_l0.mul_(2)
        assert (sparse(x_TBI)[0] - dense(x_TBI)[0]).abs().max() < 1e-5
        assert torch.equal(sparse.weight_hh_l0, dense.weight_hh_l0)


@pytest.mark.parametrize("kernel", ["cpu", "csr"])
def test_cells_linear_layers_and_whole_networks_run_what_was_written(kernel):
    torch.manual_seed(0)
    cell, linear = pruned(nn.LSTMCell(12, 16)), pruned(nn.Linear(12, 16))
    for layer, bias, x in ((cell, "bias_ih", torch.randn(3, 12)), (linear, "bias", torch.randn(1, 3, 12))):
        sparse = srnn.sparsify(layer, kernel=kernel)
        with torch.no_grad():
            for _ in range(2):
                sparse(x)
            getattr(sparse, bias).data.fill_(1.0)
            getattr(layer, bias).fill_(1.0)
            torch.testing.assert_close(sparse(x), layer(x), rtol=1e-5, atol=1e-5)
    network = pruned(gru(16, 8, vocabulary_size=15)).eval()
    sparse, token, state = srnn.sparsify(network, kernel=kernel), torch.tensor([3]), torch.zeros(1, 1, 16)
    with torch.no_grad():
        for name in ("rnn.bias_ih_l0", "decoder.bias"):
            for _ in range(2):
                sparse.step(token, state)
            sparse.get_buffer(name).data.add_(1.0)
            network.get_parameter(name).add_(1.0)
            assert (sparse.step(token, state)[0] - network.step(token, state)[0]).abs().max() < 1e-5


def test_reading_a_bias_makes_nothing_anew_and_copies_stand_alone(monkeypatch):
    sparse, x_TBI = srnn.sparsify(pruned(nn.GRU(12, 33)), kernel="cpu"), torch.randn(7, 1, 12)
    forgot = []
    monkeypatch.setattr(SparseModule, "forget", lambda self: forgot.append(self) or self._ready.clear())
    sparse(x_TBI)
    sparse.bias_hh_l0.sum(), list(sparse.modules()), sparse.state_dict()
    before = sparse(x_TBI)[0]
    assert not forgot
    copied = copy.deepcopy(sparse)
    copied.bias_hh_l0.data.fill_(1.0)
    assert not torch.equal(copied(x_TBI)[0], before)
    assert torch.equal(sparse(x_TBI)[0], before)


def test_made_in_inference_mode_and_recurrences_alone():
    torch.manual_seed(0)
    dense, x_TBI = pruned(nn.GRU(12, 33)), torch.randn(7, 1, 12)
    with torch.inference_mode():
        sparse = srnn.sparsify(dense, kernel="cpu")
        sparse(x_TBI), sparse(x_TBI)
        sparse.bias_hh_l0.fill_(1.0)
        dense.bias_hh_l0.fill_(1.0)
        assert (sparse(x_TBI)[0] - dense(x_TBI)[0]).abs().max() < 1e-5
    recurring = srnn.sparsify(pruned(Recurring("gru", 32)), kernel="cpu")
    u, lengths = torch.randn(1, 4, 96), torch.tensor([4])
    before = recurring(u, lengths)[0]
    recurring.weight_hh_packed.values.zero_()
    assert not torch.equal(recurring(u, lengths)[0], before)
