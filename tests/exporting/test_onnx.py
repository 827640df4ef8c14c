"""ONNX files, run in onnxruntime by their names alone and compared with the network they were made from."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import srnn
from srnn.__main__ import main
from srnn.commands.export import FormatChoice
from srnn.errors import UserError
from srnn.exporting import onnx_graph
from srnn.exporting.chain import RecurrentPart
from srnn.exporting.exporter import EXPORT_FORMATS
from srnn.exporting.onnx_session import OnnxNetwork
from srnn.exporting.reading import read_chain
from srnn.models import LanguageModel, SequenceModel
from srnn.sparse import SparseMatrix

LAYERS = {
    "gru": nn.GRU(8, 16),
    "lstm": nn.LSTM(8, 16, batch_first=True),
    "rnn": nn.RNN(5, 7),
    "relu": nn.RNN(5, 7, 2, nonlinearity="relu", bidirectional=True),
    "three layers": nn.GRU(3, 11, num_layers=3, dropout=0.5),
    "bidirectional": nn.LSTM(6, 5, num_layers=2, bidirectional=True),
    "projection": nn.LSTM(6, 9, num_layers=2, proj_size=4, batch_first=True),
    "both": nn.LSTM(5, 7, proj_size=3, bidirectional=True),
    "no bias": nn.GRU(1, 1, bias=False),
    "projection, no bias": nn.LSTM(3, 5, proj_size=1, bias=False),
}


def pruned(model, density=0.3):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) < density)
    return model


def run(path, inputs, *states):
    """Outputs and states of a file, by onnxruntime alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feed = dict(zip(names, (inputs.numpy(), *(state.numpy() for state in states)), strict=True))
    follows = json.loads(session.get_modelmeta().custom_metadata_map["states"])
    assert list(follows) == names[1:]
    return [torch.from_numpy(out) for out in session.run(["outputs", *follows.values()], feed)]


def compare(path, layer, steps, streams):
    """Against the layer's own call, from states that are not zero."""
    shape = (streams, steps) if layer.batch_first else (steps, streams)
    x = torch.randn(*shape, layer.input_size)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = (torch.randn(count, streams, layer.proj_size or layer.hidden_size),)
    if isinstance(layer, nn.LSTM):
        state += (torch.randn(count, streams, layer.hidden_size),)
    with torch.no_grad():
        y, after = layer(x, state if len(state) == 2 else state[0])
    wanted = [y, *(after if isinstance(after, tuple) else (after,))]
    for got, expected in zip(run(path, x, *state), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs(name, tmp_path):
    layer = pruned(LAYERS[name].eval())
    report = srnn.export(layer, tmp_path / "net.onnx")
    assert report.difference < 1e-6
    assert report.nbytes == (tmp_path / "net.onnx").stat().st_size
    model = onnx.load(tmp_path / "net.onnx")
    assert [opset.version for opset in model.opset_import] == [17]
    assert all(node.domain == "" for node in model.graph.node)
    for steps, streams in ((1, 1), (9, 2)):
        compare(tmp_path / "net.onnx", layer, steps, streams)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@settings(max_examples=12, deadline=None)
@given(
    cell=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    sizes=st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(1, 2)),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("bias", "batch_first", "bidirectional")}),
    projected=st.booleans(),
    call=st.tuples(st.integers(1, 20), st.integers(1, 5)),
)
def test_any_shape(tmp_path_factory, cell, sizes, options, projected, call):
    path = tmp_path_factory.getbasetemp() / "shape.onnx"
    options |= {"proj_size": sizes[1] // 2} if projected and cell is nn.LSTM else {}
    layer = cell(*sizes, **options).eval()
    srnn.export(layer, path)
    compare(path, layer, *call)


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_a_sparsified_network_is_read_from_its_packed_matrices(values, tmp_path):
    network = pruned(LanguageModel(nn.GRU, vocabulary_size=60, embedding_size=12, hidden_size=33, num_layers=2), 0.1)
    sparse = srnn.sparsify(network, values=values, kernel="csr")
    chain = read_chain(sparse)
    assert [part.name for part in chain.parts] == ["embedding", "rnn", "decoder"]
    (rnn,) = chain.recurrent
    assert isinstance(rnn.layers[1][0].w_hh, SparseMatrix)
    assert rnn.layers[1][0].w_hh.values_name == values
    assert chain.states == {"rnn_h": (2, 33)}
    srnn.export(sparse, tmp_path / "net.onnx")
    tokens = torch.randint(60, (3, 11))
    wanted, after = sparse(tokens)
    logits, h = run(tmp_path / "net.onnx", tokens, torch.zeros(2, 3, 33))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(h, after, atol=1e-5, rtol=0)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert (stored["rnn_l1_r"] == 0).mean() > 0.6, "zeros are stored"


class Tagger(nn.Module):
    """What people write: no state comes in, activations between, the last step or all."""

    def __init__(self, last, shuffled=False):
        super().__init__()
        layers = {
            "embed": nn.Embedding(30, 8, padding_idx=0),
            "lower": nn.LSTM(8, 10, batch_first=True),
            "between": nn.Linear(10, 12),
            "relu": nn.ReLU(),
            "upper": nn.GRU(12, 9, batch_first=True),
            "drop": nn.Dropout(0.5),
            "out": nn.Linear(9, 4),
            "softmax": nn.LogSoftmax(dim=-1),
        }
        for name in reversed(layers) if shuffled else layers:
            self.add_module(name, layers[name])
        self.last = last

    def forward(self, tokens_BT):
        y, _ = self.lower(self.embed(tokens_BT))
        y, _ = self.upper(self.relu(self.between(y)))
        return self.softmax(self.out(self.drop(y[:, -1] if self.last else y)))


@pytest.mark.parametrize("last", [False, True])
def test_a_module_of_ones_own(last, tmp_path):
    network = Tagger(last).train()
    report = srnn.export(network, tmp_path / "net.onnx", about="a tagger")
    assert network.training, "it is left as it was"
    tokens = torch.randint(30, (2, 9))
    whole = network.eval()(tokens).detach()
    states = [torch.zeros(1, 2, 10), torch.zeros(1, 2, 10), torch.zeros(1, 2, 9)]
    first, *states = run(tmp_path / "net.onnx", tokens[:, :4], *states)
    second, *_ = run(tmp_path / "net.onnx", tokens[:, 4:], *states)
    got = second if last else torch.cat([first, second], dim=1)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=0)
    assert onnx.load(tmp_path / "net.onnx").doc_string == "a tagger"
    assert "size and speed are those of a dense network" in str(report)


def test_a_reader_of_whole_sequences_in_both_directions(tmp_path):
    network = SequenceModel(nn.LSTM, input_size=3, output_size=4, hidden_size=6, num_layers=2, bidirectional=True)
    srnn.export(network, tmp_path / "net.onnx")
    x = torch.randn(2, 7, 3)
    outputs, *_ = run(tmp_path / "net.onnx", x, torch.zeros(4, 2, 6), torch.zeros(4, 2, 6))
    torch.testing.assert_close(outputs, network.eval()(x)[0].detach(), atol=1e-5, rtol=0)


def test_masks_of_torch_are_applied(tmp_path):
    layer = nn.GRU(6, 8)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    srnn.export(layer, tmp_path / "net.onnx")
    compare(tmp_path / "net.onnx", layer, 5, 2)


def test_int8_says_what_it_costs_and_what_it_leaves(tmp_path):
    lstm = pruned(LanguageModel(nn.LSTM, vocabulary_size=40, embedding_size=32, hidden_size=64))
    plain, small = srnn.export(lstm, tmp_path / "a.onnx"), srnn.export(lstm, tmp_path / "b.onnx", values="int8")
    assert small.nbytes < 0.4 * plain.nbytes
    assert 1e-5 < small.difference < 0.1
    assert "rest is int8's" in str(small)
    assert "stay fp32" not in str(small)
    tokens = torch.randint(40, (2, 12))
    state = (torch.zeros(1, 2, 64), torch.zeros(1, 2, 64))
    got, wanted = run(tmp_path / "b.onnx", tokens, *state)[0], lstm.eval()(tokens)[0]
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    gru = LanguageModel(nn.GRU, vocabulary_size=40, embedding_size=8, hidden_size=16)
    assert "GRU layers stay fp32" in str(srnn.export(gru, tmp_path / "c.onnx", values="int8"))


def test_what_computes_something_else_is_not_handed_over(tmp_path, monkeypatch):
    target = tmp_path / "net.onnx"
    target.write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setitem(onnx_graph._GATE_ORDER, "gru", (0, 1, 2))
        with pytest.raises(
            UserError, match=r"net\.onnx is not written: onnxruntime's outputs differ by .*, over 1e-05"
        ):
            srnn.export(nn.GRU(4, 6), target)
    assert target.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [target]
    srnn.export(nn.GRU(4, 6), target)
    assert target.read_bytes() != b"older"


def test_more_than_a_file_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"holds at most 100 bytes of weights, and these are \d"):
        srnn.export(nn.GRU(4, 6), tmp_path / "net.onnx")


class ItsOwnState(nn.Module):
    """Its state has the example's number of streams when it is traced."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4)

    def forward(self, x_TBI):
        return self.rnn(x_TBI)[0] + x_TBI


class Skips(nn.Module):
    """Its layers are a chain's, what it computes is not."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x, state=None):
        y, state = self.rnn(x, state)
        return x + y, state


class Derived(nn.GRU):
    pass


def diverged(model):
    model.weight_ih_l0.data[0, 0] = torch.nan
    return model


REFUSED = [
    (nn.Sequential(nn.LayerNorm(4), nn.GRU(4, 4)), "0 is a LayerNorm, which has no place in a chain of layers"),
    (Skips(), r"Skips computes something else than its layers one after the other \(rnn\): outputs differ by"),
    (Tagger(False, shuffled=True), "embed is an embedding behind other layers: a chain starts with it"),
    (Derived(4, 4), "is a Derived, which is derived from GRU"),
    (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "Sequential holds no recurrent layer"),
    (nn.Sequential(nn.GRU(4, 4), nn.Embedding(4, 4)), "1 is an embedding behind other layers"),
    (nn.Sequential(nn.GRU(4, 4, batch_first=True), nn.GRU(4, 4)), "0 has batch_first=True and 1 not"),
    (nn.Sequential(nn.GRU(4, 4), nn.Softmax(dim=0)), "1 has dim=0: in a chain softmax is over the last dimension"),
    (diverged(nn.GRU(4, 4)), "weight_ih_l0 holds values that are not finite: the training has probably diverged"),
    (parametrizations.weight_norm(nn.GRU(4, 4), "weight_hh_l0"), "GRU is parametrised"),
]


@pytest.mark.parametrize(("network", "message"), REFUSED)
def test_what_is_no_chain_is_named(network, message, tmp_path):
    with pytest.raises(UserError, match=message) as told:
        srnn.export(network, tmp_path / "net.onnx")
    assert "give example=, the arguments of a call" in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (
            "net.xyz",
            {},
            r"named \*\.onnx, with format=\"onnx\"\. For a \*\.c file give format=\"c\"\. "
            r"For a \*\.html file give format=\"wasm\"\.$",
        ),
        ("net.c", {}, r"\*\.onnx, with format=\"onnx\"\. For a \*\.c file give format=\"c\"\.$"),
        ("net.onnx", {"format": "onyx"}, r"format='onyx': there are onnx.*Did you mean 'onnx'"),
        ("net.onnx", {"values": "fp16"}, "values=fp16 must be fp32, or int8"),
        ("net.onnx", {"structure": "16x1"}, "format=onnx takes no structure: its options are values"),
    ],
)
def test_mistakes_are_told(path, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        srnn.export(nn.GRU(4, 4), tmp_path / path, **options)


def test_what_is_no_file_is_told_of_no_other_format(tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(UserError, match=r"must be a file named \*\.onnx, with format=\"onnx\"\.$"):
        srnn.export(nn.GRU(4, 4), tmp_path / "net.onnx")


def test_without_the_packages_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ONNX needs onnx and onnxruntime, .*: pip install 'srnn\[onnx\]'"):
        srnn.export(nn.GRU(4, 4), tmp_path / "net.onnx")


@pytest.mark.slow
def test_what_is_no_chain_is_written_by_torch(tmp_path, capfd):
    network = srnn.sparsify(pruned(Skips()), kernel="csr")
    state = torch.randn(1, 2, 4)
    report = srnn.export(network, tmp_path / "net.onnx", example=(torch.randn(2, 5, 4), state))
    assert report.difference < 1e-5
    assert "Skips computes something else" in str(report)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x, h = torch.randn(3, 9, 4), torch.randn(1, 3, 4)
    names = [given.name for given in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy(), h.numpy()), strict=True)))
    for ours, wanted in zip(got, network(x, h), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"use srnn\.export\(model, 'model\.onnx'\)"):
        torch.onnx.export(network, (x, h), dynamo=True, verbose=False)
    capfd.readouterr()
    report = srnn.export(ItsOwnState(), tmp_path / "net.onnx", example=torch.randn(5, 2, 4))
    assert "All sizes are those of the example" in str(report), "others were tried, and failed in onnxruntime"
    assert capfd.readouterr().err == ""


def test_a_run_by_the_command(text_run, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    assert main(["export", f"run={text_run}", "format=onnx", f"output={path}"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: {path.stat().st_size:,} bytes" in out
    assert "costs +0.0000 bits per character over model.safetensors" in out
    sparse = srnn.load(text_run / "model.safetensors", kernel="dense")
    network, model = OnnxNetwork(path), onnx.load(path)
    tokens = torch.from_numpy(sparse.vocabulary.encode("def f(x):\n    return"))[None]
    wanted, state = sparse(tokens)
    ours = None
    for piece, expected in zip(tokens.split(6, dim=1), wanted.split(6, dim=1), strict=True):
        got, ours = network(piece, ours)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, state, atol=1e-5, rtol=0)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["vocabulary"]["level"] == "characters"
    assert [metadata["vocabulary"]["tokens"].index(letter) for letter in "def"] == tokens[0, :3].tolist()
    assert len(metadata["vocabulary"]["tokens"]) == len(sparse.vocabulary)
    score = re.search(r"test: (.*); costs", out)[1]
    assert model.doc_string.startswith(f"gru on python_source, test: {score}. Written by srnn")
    reported = json.loads((text_run / "report.json").read_text())["scores"]["test_packed"]  # of fewer batches
    assert float(score.split()[0]) == pytest.approx(reported["bits_per_character"], abs=0.3)


def test_a_run_in_int8_by_the_command(text_run, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    assert main(["export", f"run={text_run}", "format=onnx", "values=int8", f"output={path}"]) == 0
    out = capsys.readouterr().out
    assert "GRU layers stay fp32" in out
    score, cost = re.search(
        r"test: (.*); costs ([+-]\d\.\d{4}) bits per character over model.safetensors", out
    ).groups()
    assert abs(float(cost)) < 0.05
    assert f"test: {score}." in onnx.load(path).doc_string


def test_the_command_takes_all_formats(text_run, tmp_path, capsys):
    assert list(FormatChoice.__args__) == ["packed", *EXPORT_FORMATS]
    assert main(["export", f"run={text_run}", "format=onnx", "structure=16x1"]) == 2
    assert "--structure=16x1 is for format=packed" in capsys.readouterr().err
    assert main(["export", f"run={text_run}", "format=onnx", f"output={tmp_path}/a.safetensors"]) == 2
    assert "must be a file named *.onnx" in capsys.readouterr().err


def test_names_of_states_are_identifiers(tmp_path):
    chain = read_chain(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GRU(4, 4))))
    assert isinstance(chain.parts[1], RecurrentPart)
    assert list(chain.states) == ["gru_1_0_h"]
