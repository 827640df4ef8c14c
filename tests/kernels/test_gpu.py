import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from srnn.deploy.sparsify import desparsify, sparsify
from tests.kernels.common import prune, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernel", ["dense", "csr", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_sparse_layer_is_torchs(cell, kernel, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    module = prune(cell(40, 63, 2, bidirectional=True), 0.2)
    sparse = sparsify(module, values="fp16", kernel=kernel).cuda()
    truth = copy.deepcopy(desparsify(sparse)).double().cpu()
    x = torch.randn(9, 5, 40)
    lengths = torch.tensor([9, 3, 7, 1, 9])
    packed = pack_padded_sequence(x.to(dtype), lengths, enforce_sorted=False)
    for given in (x.to(dtype).cuda(), packed.to("cuda")):
        got, _ = sparse(given)
        if isinstance(given, PackedSequence):
            wanted, _ = truth(PackedSequence(packed.data.double(), *packed[1:]))
            got, wanted = got.data, wanted.data
        else:
            wanted, _ = truth(x.to(dtype).double())
        assert got.dtype == dtype
        assert relative_error(got.cpu(), wanted) < tolerance


def test_linear_and_embedding_move_with_their_network():
    network = prune(nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 70)), 0.2)
    sparse = sparsify(network).cuda()
    tokens = torch.randint(50, (3, 4))
    with torch.no_grad():
        wanted = network(tokens)
    torch.testing.assert_close(sparse(tokens.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse(tokens[:1, :1].cuda()).cpu(), wanted[:1, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.cpu()(tokens), wanted, rtol=1e-5, atol=1e-6)
