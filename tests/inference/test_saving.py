import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.inference.packed_file import write
from srnn.inference.packed_weight import PackedWeight
from srnn.inference.packing import pack
from srnn.models.recurring import Recurring
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


@pytest.mark.parametrize("given", [{"values": "fp16"}, {"values": "int8"}, {"structure": "element"}, {}])
def test_a_sparsified_network_is_saved_as_asked_for(tmp_path, given):
    network = pruned(nn.GRU(16, 32), height=4)
    asked, packed = {"values": "fp32", "structure": "4x1"} | given, srnn.sparsify(network, "4x1", kernel="csr")
    srnn.save(packed, tmp_path / "a", **given)
    loaded = srnn.load(tmp_path / "a", kernel="csr", into=network)
    assert {matrix.values_name for matrix in loaded.matrices().values()} == {asked["values"]}
    x_TBI = torch.randn(3, 2, 16)
    torch.testing.assert_close(loaded(x_TBI)[0], network(x_TBI)[0], rtol=0, atol=1e-2)
    if "values" not in given:
        assert {matrix.structure for matrix in loaded.matrices().values()} == {asked["structure"]}
    else:
        srnn.save(network, tmp_path / "dense", **given)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "dense").read_bytes()


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
    with pytest.raises(UserError, match=r"GRU has bias_hh_l0_reverse, the file has not\."):
        srnn.load(tmp_path / "a", into=nn.GRU(16, 32, bidirectional=True))
    with pytest.raises(UserError, match=r"is a folder: give a packed file, RUN/model\.safetensors of a finished run"):
        srnn.load(tmp_path)


def test_a_wrapper_is_named(tmp_path):
    layer, average = nn.GRU(4, 8), torch.optim.swa_utils.AveragedModel(nn.GRU(4, 8))
    for wrapper in (average, nn.Sequential(nn.Sequential(layer))):
        srnn.save(wrapper, tmp_path / "a")
        before = "module." if wrapper is average else r"0\.0\."
        with pytest.raises(UserError, match=f"file's names begin with '{before}'.* Save the network inside"):
            srnn.load(tmp_path / "a", into=layer)
        assert type(srnn.load(tmp_path / "a", into=wrapper)) is type(wrapper)
    srnn.save(layer, tmp_path / "a")
    with pytest.raises(UserError, match=r"network's names begin with 'module\.'.* into=model\.module\."):
        srnn.load(tmp_path / "a", into=average)
    beside = nn.ModuleDict({"layer": layer, "out": nn.Linear(8, 2)})  # which wraps nothing
    srnn.save(beside, tmp_path / "a")
    with pytest.raises(UserError, match=r"the file has (layer|out)\.\w+, GRU has not|GRU has \w+, the file has not"):
        srnn.load(tmp_path / "a", into=layer)
    srnn.save(layer, tmp_path / "a")
    with pytest.raises(
        UserError, match=r"ModuleDict has (layer|out)\.\w+, the file has not|has \w+, ModuleDict has not"
    ):
        srnn.load(tmp_path / "a", into=beside)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("kind", "tanh", "relu"),
    [
        (nn.RNN, {}, {"nonlinearity": "relu"}),
        (nn.RNNCell, {}, {"nonlinearity": "relu"}),
        (Recurring, {"cell": "tanh"}, {"cell": "relu"}),
    ],
)
def test_weights_of_another_cell_are_refused(tmp_path, kind, tanh, relu, sparse):
    network, other = (nn.ModuleDict({"core": kind(hidden_size=24, **_sizes(kind), **one)}) for one in (tanh, relu))
    pruned(network)
    srnn.save(srnn.sparsify(network, kernel="csr") if sparse else network, tmp_path / "a")
    srnn.load(tmp_path / "a", into=network)
    with pytest.raises(UserError, match="core was saved with the cell 'tanh', and the network given has 'relu'"):
        srnn.load(tmp_path / "a", into=other)


def _sizes(kind):
    return {} if kind is Recurring else {"input_size": 16}


def test_another_order_of_dimensions_is_told(tmp_path):
    srnn.save(pruned(nn.GRU(16, 32, batch_first=True)), tmp_path / "a")
    with pytest.warns(UserWarning, match="GRU was saved with batch_first=True, and the network given has .*=False"):
        srnn.load(tmp_path / "a", into=nn.GRU(16, 32))


@pytest.mark.parametrize("about", [{}, {"layers": None}, {"layers": {"": 3}}, {"layers": {"": {"else": "relu"}}}])
def test_files_that_do_not_say_what_their_layers_are(tmp_path, about):
    network = pruned(nn.RNN(16, 32))
    write(tmp_path / "a", replace(pack(network, {}, {}), about=about))
    assert isinstance(srnn.load(tmp_path / "a", kernel="csr", into=network), nn.Module)


@pytest.mark.parametrize("make", [lambda: [nn.Embedding(30, 16), nn.Linear(16, 30)], lambda: [nn.GRU(16, 16)] * 2])
def test_tied_weights_of_sparse_layers_are_saved_once(tmp_path, make):
    def tied():
        first, second = (copy.deepcopy(layer) for layer in make())
        name = "weight_hh_l0" if isinstance(first, nn.GRU) else "weight"
        setattr(second, name, getattr(first, name))
        return nn.ModuleList([first, second])

    network = pruned(tied())
    sparse = srnn.sparsify(network, kernel="csr")
    back = srnn.desparsify(sparse)
    assert len(list(back.parameters())) == len(list(network.parameters()))
    srnn.save(sparse, tmp_path / "sparse")
    srnn.save(network, tmp_path / "dense")
    assert (tmp_path / "sparse").stat().st_size == (tmp_path / "dense").stat().st_size
    loaded = srnn.load(tmp_path / "sparse", kernel="csr", into=tied())
    apart = nn.ModuleList([sparse, loaded])
    for network_there in (*apart, *copy.deepcopy(apart), *pickle.loads(pickle.dumps(apart))):
        network_there.to("cpu").load_state_dict(sparse.state_dict())
        network_there._apply(torch.clone)  # as moving to another device: each buffer is another tensor then
        shared = [m for layer in network_there for m in layer.modules() if isinstance(m, PackedWeight)]
        assert len(shared) == 1 + len(set(map(id, shared))), "one is in both layers"
        assert len(list(srnn.desparsify(network_there).parameters())) == len(list(network.parameters()))
    srnn.save(loaded, tmp_path / "again")
    for name, weight in srnn.desparsify(loaded).state_dict().items():
        assert torch.equal(weight, network.state_dict()[name])


def test_biases_that_layers_share_stay_one_tensor(tmp_path):
    def tied():
        layers = nn.ModuleList([nn.GRU(16, 16), nn.GRU(16, 16), nn.Linear(16, 48)])
        layers[1].bias_hh_l0 = layers[0].bias_hh_l0
        layers[2].bias = layers[0].bias_hh_l0
        return layers

    network = pruned(tied())
    sparse = srnn.sparsify(network, kernel="csr")
    srnn.save(sparse, tmp_path / "sparse")
    apart = nn.ModuleList([sparse, srnn.load(tmp_path / "sparse", kernel="csr", into=tied())])
    x_TBI = torch.randn(3, 2, 16)
    for there in (*apart, *copy.deepcopy(apart), *pickle.loads(pickle.dumps(apart))):
        there._apply(torch.clone)  # as moving to another device
        assert there[0].bias_hh_l0 is there[1].bias_hh_l0 is there[2].bias
        assert there[0].bias_ih_l0 is not there[1].bias_ih_l0
        assert len(list(srnn.desparsify(there).parameters())) == len(list(network.parameters()))
        for layer, dense in zip(there, network, strict=True):
            assert_same(layer(x_TBI), dense(x_TBI))
        there[2].bias.add_(1.0)  # all three run it
        expected = copy.deepcopy(network)
        with torch.no_grad():
            expected[0].bias_hh_l0.add_(1.0)
        for layer, dense in zip(there, expected, strict=True):
            assert_same(layer(x_TBI), dense(x_TBI))
    assert not torch.equal(network[2].bias, sparse[2].bias), "of the sparse network's own"


@pytest.mark.parametrize("kernel", ["csr", "cpu"])
@pytest.mark.parametrize("dense_first", [False, True])
def test_a_bias_that_sparse_and_dense_layers_share_stays_one_tensor(tmp_path, dense_first, kernel):
    def tied():
        layers = nn.ModuleList([nn.GRU(16, 16), nn.GRU(16, 16)][:: -1 if dense_first else 1])
        layers[1].bias_hh_l0 = layers[0].bias_hh_l0
        return layers

    network, place = tied().eval(), int(dense_first)
    pruned(network[place])
    sparse = srnn.sparsify(network, kernel=kernel)
    assert isinstance(sparse[1 - place], nn.GRU)
    srnn.save(sparse, tmp_path / "sparse")
    apart = nn.ModuleList([sparse, srnn.load(tmp_path / "sparse", kernel=kernel, into=tied())])
    x_TBI = torch.randn(3, 2, 16)
    for there in (*apart, *copy.deepcopy(apart), *pickle.loads(pickle.dumps(apart))):
        there._apply(torch.clone)  # as moving to another device
        assert there[0].bias_hh_l0 is there[1].bias_hh_l0
        assert len(list(srnn.desparsify(there).parameters())) == len(list(network.parameters()))
        for layer, dense in zip(there, network, strict=True):
            assert_same(layer(x_TBI), dense(x_TBI))
        with torch.no_grad():
            there[1 - place].bias_hh_l0.add_(1.0)  # both run it
        expected = copy.deepcopy(network)
        with torch.no_grad():
            expected[0].bias_hh_l0.add_(1.0)
        for layer, dense in zip(there, expected, strict=True):
            assert_same(layer(x_TBI), dense(x_TBI))
    assert network[0].bias_hh_l0.requires_grad
    assert all(parameter.requires_grad for parameter in srnn.desparsify(sparse).parameters())


def assert_same(found, wanted):
    found, wanted = (each[0] if isinstance(each, tuple) else each for each in (found, wanted))
    torch.testing.assert_close(found, wanted)


def test_what_is_loaded_into_one_layer_is_run_by_another_that_shares_the_weight():
    embedding, decoder = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
    decoder.weight = embedding.weight
    sparse = copy.deepcopy(srnn.sparsify(pruned(nn.ModuleList([embedding, decoder])), kernel="csr"))
    x_BI = torch.randn(2, 16)
    before, rows = sparse[1](x_BI), sparse[0](torch.arange(30))
    weights = sparse[0].state_dict()
    sparse[0].load_state_dict({n: w * 2 if n.endswith("values") else w.clone() for n, w in weights.items()})
    torch.testing.assert_close(sparse[1](x_BI), 2 * before)
    torch.testing.assert_close(sparse[0](torch.arange(30)), 2 * rows)


@pytest.mark.parametrize("written_by", [0, 1])
def test_what_is_written_to_one_layers_weight_is_run_by_another_that_shares_it(written_by):
    embedding, decoder = nn.Embedding(30, 16), nn.Linear(16, 30)
    decoder.weight = embedding.weight
    sparse = srnn.sparsify(pruned(nn.ModuleList([embedding, decoder])), kernel="csr")
    inputs = torch.arange(30), torch.randn(2, 16)
    before = [layer(x) for layer, x in zip(sparse, inputs, strict=True)]
    sparse[written_by].weight_packed.values.mul_(2)
    other = 1 - written_by
    bias = decoder.bias.detach() if other else 0
    torch.testing.assert_close(sparse[other](inputs[other]) - bias, 2 * (before[other] - bias))


def test_what_is_no_network_or_has_no_values_is_a_sentence(tmp_path):
    holds_sparse = nn.Linear(4, 4)
    holds_sparse.register_buffer("adjacency", torch.eye(4).to_sparse())
    path, rnn = tmp_path / "a", pruned(nn.GRU(16, 32))
    srnn.save(rnn, path)
    for call, message in (
        (lambda: srnn.sparsify(rnn.state_dict()), "wants a network, a torch module, not a OrderedDict: make one"),
        (lambda: srnn.desparsify(None), "srnn.desparsify wants a network"),
        (lambda: srnn.save([rnn], path), "srnn.save wants a network, a torch module, not a list"),
        (lambda: srnn.load(path, into=nn.GRU), "not the class GRU: make one"),
        (lambda: srnn.sparsify(rnn, kernel=None), "kernel=None must be one of .*csr"),
        (lambda: srnn.load(path, kernel=3, into=rnn), "kernel=3 must be one of"),
        (lambda: srnn.save(nn.Sequential(nn.LazyLinear(3)), path), "0.weight has no shape yet"),
        (lambda: srnn.sparsify(nn.Sequential(nn.LazyLinear(3))), "0.weight has no shape yet"),
        (lambda: srnn.save(nn.GRU(3, 4, device="meta"), path), "weight_ih_l0 has no values.*to_empty"),
        (lambda: srnn.save(holds_sparse, path), "adjacency is a sparse_coo tensor"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_folder_is_made_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    srnn.save(nn.GRU(4, 8), "~/new/folder/gru.safetensors")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")] == [
        "home/new/folder/gru.safetensors"
    ]
    srnn.load("~/new/folder/gru.safetensors", kernel="dense", into=nn.GRU(4, 8))
