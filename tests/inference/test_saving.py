import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from tests.inference.test_sparsify import Network, pruned


@pytest.mark.parametrize("values", ["fp32", "int8"])
@pytest.mark.parametrize("sparse", [False, True])
def test_any_network_there_and_back(tmp_path, values, sparse):
    torch.manual_seed(0)
    network, tokens = pruned(Network()), torch.randint(20, (3, 7))
    small = srnn.sparsify(network, values=values, kernel="csr")
    if sparse:
        srnn.save(small, tmp_path / "a")
    else:
        srnn.save(network, tmp_path / "a", values=values)
    # A file's small matrices are int8 too, which sparsify leaves dense.
    near = 1e-2 if values == "int8" and not sparse else 1e-6
    fresh = Network()
    before = {name: weight.clone() for name, weight in fresh.state_dict().items()}
    for into in (fresh, small):
        loaded = srnn.load(tmp_path / "a", kernel="csr", into=into)
        torch.testing.assert_close(loaded(tokens)[0], small(tokens)[0], rtol=1e-5, atol=near)
        assert type(loaded.rnn) is type(small.rnn)
    assert all(torch.equal(weight, before[name]) for name, weight in fresh.state_dict().items())


def test_tied_weights_are_saved_once(tmp_path):
    def tied():
        network = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40))
        network[1].weight = network[0].weight
        return network

    network, tokens = pruned(tied()), torch.randint(40, (3,))
    srnn.save(network, tmp_path / "a")
    loaded = srnn.load(tmp_path / "a", kernel="csr", into=tied())
    torch.testing.assert_close(loaded(tokens), network(tokens).detach(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_a_sentence(tmp_path):
    srnn.save(pruned(nn.GRU(16, 32)), tmp_path / "a")
    with pytest.raises(UserError, match=r"no config: give the network, srnn\.load\(path, into=model\)"):
        srnn.load(tmp_path / "a")
    with pytest.raises(UserError, match=r"do not fit .* bias_hh_l0 has shape \(96,\), GRU wants \(99,\)"):
        srnn.load(tmp_path / "a", into=nn.GRU(16, 33))
    with pytest.raises(UserError, match="do not fit"):
        srnn.load(tmp_path / "a", into=nn.LSTM(16, 32))
