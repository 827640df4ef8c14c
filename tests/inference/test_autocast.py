"""Under autocast sparse modules compute as they do outside, of inputs that autocast made narrow, too."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import srnn
from srnn.models.recurring import Recurring
from tests.inference.test_sparsify import pruned


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("kernel", ["cpu", "csr", "dense", "auto"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_layers_compute_as_outside(kind, kernel, caplog):
    torch.manual_seed(0)
    sparse, x_TBI = srnn.sparsify(pruned(kind(12, 33)), kernel=kernel), torch.randn(7, 1, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with autocast():
            first = [sparse(x_TBI)[0], sparse(x_TBI)[0]]
            stepped, state = sparse.step(x_TBI[0])
            stepped, _ = sparse.step(x_TBI[1], state)
            packed = sparse(pack_sequence([x_TBI[:, 0].bfloat16()]))[0].data
            narrow, _ = sparse(x_TBI.bfloat16(), state)
        wanted = sparse(x_TBI)[0]
        for y in first:
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stepped, wanted[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed, sparse(x_TBI.bfloat16().float())[0][:, 0], rtol=1e-5, atol=1e-6)
        assert narrow.dtype == torch.float32
    assert "cannot be used" not in caplog.text


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv1d(12, 12, 3, padding=1), nn.GRU(12, 33), nn.Linear(33, 8)

    def forward(self, x_BIT):
        return self.head(self.rnn(self.conv(x_BIT).permute(2, 0, 1))[0])


@pytest.mark.parametrize("kernel", ["cpu", "csr", "auto"])
def test_behind_a_dense_layer(kernel):
    torch.manual_seed(0)
    net = Net().eval()
    srnn.prune(net, 0.8)
    sparse, x_BIT = srnn.sparsify(net, kernel=kernel), torch.randn(1, 12, 7)
    with torch.no_grad(), autocast():
        assert (sparse(x_BIT).float() - net(x_BIT).float()).abs().max() < 0.05
    with torch.no_grad():
        wanted = sparse(x_BIT)
        with autocast():
            compiled = torch.compile(sparse, backend="eager")(x_BIT) if kernel == "csr" else sparse(x_BIT)
        assert (compiled - wanted).abs().max() < 0.05


@pytest.mark.parametrize("kernel", ["cpu", "csr"])
def test_cells_and_recurrences(kernel):
    cell, recurring = srnn.sparsify(pruned(nn.GRUCell(12, 16)), kernel=kernel), pruned(Recurring("gru", 32))
    recurring, x, u = srnn.sparsify(recurring, kernel=kernel), torch.randn(3, 12), torch.randn(2, 5, 96).bfloat16()
    lengths = torch.tensor([5, 3])
    with torch.no_grad(), autocast():
        inside = cell(x.bfloat16()), recurring(u, lengths)[0]
    outside = cell(x.bfloat16().float()), recurring(u.float(), lengths)[0]
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
