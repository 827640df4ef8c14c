"""A network's step in one call: the same numbers as one part after the other, and refused where these differ."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

import srnn
from srnn.inference.base import TORCH, SparseModule, marks_of
from srnn.inference.one_call import OneCall
from srnn.kernels.cpu import backend, operands
from srnn.kernels.cpu.operands import Operand, able_forms
from srnn.models import LanguageModel, SequenceModel
from tests.kernels.common import Guarded

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def pruned(network):
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) > 0.8)
                weight[0] = 0  # a row without an entry
    return network.eval()


def networks(cell=nn.GRU, layers=2, **options):
    """One of each kind, with inputs of three steps."""
    language = pruned(LanguageModel(cell, 29, 11, 37, num_layers=layers, **options))
    sequence = pruned(SequenceModel(cell, 13, 5, 37, num_layers=layers))
    return [(language, torch.randint(29, (3, 1))), (sequence, torch.randn(3, 1, 13))]


def by_parts(network, x, state):
    """The step with each part called by itself, as a network does whose outputs someone watches."""
    handles = [part.register_forward_hook(lambda *_: None) for part in (network.rnn, network.decoder)]
    with torch.inference_mode():
        done = network.step(x, state)
    for handle in handles:
        handle.remove()
    return done


def start(network, like):
    streams = (like,) if isinstance(like, torch.Tensor) else like
    state = tuple(torch.randn_like(part) for part in streams)
    return state if network.rnn.cell == "lstm" else state[0]


@pytest.fixture
def ran(monkeypatch):
    """How many steps ran in one compiled call."""
    count = []
    run = backend._NetworkStep.__call__

    def counted(self, *arguments):
        done = run(self, *arguments)
        count.append(done is not None)
        return done

    monkeypatch.setattr(backend._NetworkStep, "__call__", counted)
    return count


def poisoned(monkeypatch):
    """Outputs that hold NaN until they are written."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.full(a[0] if len(a) == 1 else a, torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_as_part_by_part_and_right_in_float64(cell, layers, values, ran, monkeypatch):
    for network, inputs in networks(CELLS[cell], layers):
        sparse = srnn.sparsify(network, "element", values, "cpu")
        exact = srnn.desparsify(sparse).double()
        state = start(sparse, sparse(inputs.transpose(0, 1))[1])
        wanted = tuple(p.double() for p in state) if cell == "lstm" else state.double()
        for x in inputs:
            want, wanted = exact.step(x.double() if x.is_floating_point() else x, wanted)
            alike, after = by_parts(sparse, x, state)
            with torch.inference_mode(), monkeypatch.context() as patch:
                poisoned(patch)
                y, state = sparse.step(x, state)
            torch.testing.assert_close((y, state), (alike, after), rtol=0, atol=0)
            torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert ran == [True] * 6


def guard(monkeypatch):
    """Put guard pages around every array of the one call: weights, biases, tables, plans, inputs, states, outputs."""
    around = Guarded()
    form, plan = Operand._made, backend._NetworkStep.__init__

    def made(self, *arguments):
        found = form(self, *arguments)
        return replace(found, parts=tuple(map(around, found.parts)))

    def begin(self, *arguments):
        plan(self, *arguments)
        self.plan = around(torch.from_numpy(self.plan)).numpy()
        self.same = (self.plan.ctypes.data, *self.same[1:])

    def guarded(owner, name):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **options: around(make(*arguments, **options)))

    monkeypatch.setattr(Operand, "_made", made)
    monkeypatch.setattr(backend._NetworkStep, "__init__", begin)
    vector = backend._vector
    monkeypatch.setattr(backend, "_vector", lambda *arguments: around(torch.from_numpy(vector(*arguments))).numpy())
    for owner, name in ((OneCall, "_table"), (backend, "_plain"), (torch, "empty"), (torch, "empty_like")):
        guarded(owner, name)
    return around


@pytest.mark.parametrize("form", [*able_forms(), "blocks"])
def test_nothing_is_touched_outside_the_arrays_of_the_one_call(form, ran, monkeypatch):
    """Of steps, and of sequences, in which all layers are one call."""
    monkeypatch.setattr(operands, "_fastest", {})
    monkeypatch.setattr(operands, "recall", lambda *_: None)
    monkeypatch.setattr(operands, "remember", lambda *_: None)
    monkeypatch.setattr(operands, "_timed", lambda forms, *_: {one: float(one[0] != form) for one in forms})
    for cell, values in (("gru", "fp32"), ("lstm", "fp16"), ("rnn", "int8")):
        for network, inputs in networks(CELLS[cell]):
            for weight in network.parameters():
                if form == "blocks" and weight.ndim == 2:
                    weight.data = torch.randn_like(weight) * (torch.arange(weight.shape[1]) % 3 == 0)
            sparse = srnn.sparsify(network, "auto" if form == "blocks" else "element", values, "cpu")
            exact = srnn.desparsify(sparse)
            state = start(sparse, exact(inputs.transpose(0, 1))[1])
            wanted = exact.step(inputs[0], state), exact(inputs.transpose(0, 1), state)
            with torch.inference_mode(), monkeypatch.context() as patch:
                around = guard(patch)
                hx = tuple(map(around, state)) if cell == "lstm" else around(state)
                got = sparse.step(around(inputs[0]), hx), sparse(inputs.transpose(0, 1), hx)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            heights = {matrix.height for part in (sparse.rnn, sparse.decoder) for matrix in part.matrices().values()}
            assert form != "blocks" or max(heights) > 1
    assert ran == [True] * 6
    assert form == "blocks" or len(able_forms()) == 1 or form in operands._fastest.values()


def test_layers_alone_give_what_a_sequence_of_one_step_gives(ran):
    sparse = srnn.sparsify(pruned(nn.LSTM(13, 37, 2, batch_first=True)), kernel="cpu")
    x, state = torch.randn(1, 13), (torch.randn(2, 1, 37), torch.randn(2, 1, 37))
    before = copy.deepcopy(state)
    y, after = sparse.step(x, state)
    want, end = sparse(x[:, None], state)
    torch.testing.assert_close((y, after), (want[:, 0], end), rtol=0, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)  # left as it was
    assert ran == [True]


@pytest.mark.parametrize("tied", [False, True])
def test_dense_embeddings_and_decoders_of_torch(tied, ran):
    network = LanguageModel(nn.GRU, 29, 37, 37, tie_embeddings=tied)
    pruned(network.rnn)
    sparse = srnn.sparsify(network.eval(), kernel="cpu")
    x, state = torch.tensor([3]), torch.randn(1, 1, 37)
    torch.testing.assert_close(sparse.step(x, state), network.step(x, state))
    pruned(network.decoder)
    network.embedding.weight = nn.Parameter(torch.randn(29, 37))
    sparse = srnn.sparsify(network, kernel="cpu").requires_grad_(False)
    torch.testing.assert_close(sparse.step(x, state), network.step(x, state))
    assert ran == [True]
    sparse.embedding.weight.data = torch.randn(29, 37)  # elsewhere in memory
    torch.testing.assert_close(sparse.step(x, state), by_parts(sparse, x, state), rtol=0, atol=0)


def test_torchs_own_modules_in_one_call(monkeypatch):
    steps = []
    made = OneCall._made
    monkeypatch.setattr(OneCall, "_made", lambda self: steps.append(made(self)) or steps[-1])
    for network, inputs in networks() + networks(nn.LSTM):
        sparse = srnn.sparsify(network)
        for part in sparse.modules():
            if isinstance(part, SparseModule):
                part.decided = {("cpu", 1, 0, torch.get_num_threads()): TORCH}
        state = start(sparse, network(inputs.transpose(0, 1))[1])
        torch.testing.assert_close(sparse.step(inputs[0], state), network.step(inputs[0], state))
    assert [type(step).__name__ for step in steps] == ["_TorchsStep"] * 4


def test_a_token_that_there_is_not():
    sparse = srnn.sparsify(networks()[0][0], kernel="cpu")
    for token in (-1, 29, 2**40):
        with pytest.raises(IndexError, match=f"between 0 and 28, not be {token}"):
            sparse.step(torch.tensor([token]), torch.zeros(2, 1, 37))


def test_what_is_no_plain_memory_of_one_stream_runs_part_by_part(ran):
    sparse = srnn.sparsify(networks()[1][0], kernel="cpu")
    x, state = torch.randn(13, 2), torch.randn(2, 37, 2)
    for stream in range(2):  # every other number
        one, h = x[None, :, stream], state[:, None, :, stream]
        got = sparse.step(one, h)
        torch.testing.assert_close(got, sparse.step(one.contiguous(), h.contiguous()), rtol=0, atol=0)
    y, h = sparse.step(x.T, state.transpose(1, 2).contiguous())
    assert (y.shape, h.shape) == ((2, 5), (2, 2, 37))
    with pytest.raises(RuntimeError, match="13 features"):
        sparse.step(torch.randn(1, 12), h[:, :1])
    with pytest.raises(RuntimeError, match="shape"):
        sparse.step(torch.randn(1, 13), torch.zeros(1, 1, 37))
    assert sum(ran) == 2


def test_gradients_raise_as_they_do_part_by_part():
    sparse = srnn.sparsify(networks()[1][0], kernel="cpu")
    x = torch.randn(1, 13, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        sparse.step(x, torch.zeros(2, 1, 37))[0].sum().backward()


def test_weights_loaded_into_any_part_are_used():
    (first, inputs), (second, _) = networks()[0], networks()[0]
    sparse, other = srnn.sparsify(first, kernel="cpu"), srnn.sparsify(second, kernel="cpu")
    state = torch.randn(2, 1, 37)
    sparse.step(inputs[0], state)
    for part in ("embedding", "rnn", "decoder"):
        setattr(sparse, part, getattr(copy.deepcopy(other), part))
        torch.testing.assert_close(
            sparse.step(inputs[0], state), by_parts(sparse, inputs[0], state), rtol=0, atol=0
        )  # fmt: skip
    torch.testing.assert_close(sparse.step(inputs[0], state), other.step(inputs[0], state), rtol=0, atol=0)


def test_two_threads_each_with_a_state_of_its_own():
    network, _ = networks(nn.LSTM)[0]
    sparse = srnn.sparsify(network, kernel="cpu")
    tokens = torch.randint(29, (2, 200, 1))

    def stream(tokens):
        state, outputs = (torch.zeros(2, 1, 37), torch.zeros(2, 1, 37)), []
        with torch.inference_mode():
            for token in tokens:
                y, state = sparse.step(token, state)
                outputs.append(y)
        return torch.cat(outputs)

    with ThreadPoolExecutor(2) as pool:
        for several, y in zip(tokens, pool.map(stream, tokens), strict=True):
            torch.testing.assert_close(y, network(several.T)[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda after: setattr(after[1], "negative_slope", 0.5),
        lambda after: setattr(after[2], "eps", 0.1),
        lambda after: after.__setitem__(3, nn.Tanh().eval()),
        lambda after: setattr(after[4], "activation", torch.tanh),
        lambda after: setattr(after[0].weight, "data", after[0].weight.data.clone()),
    ],
)
def test_a_recording_of_a_step_does_not_outlive_a_changed_setting(change):
    network = SequenceModel(nn.GRU, 13, 5, 37).eval().requires_grad_(False)
    own = nn.Module()
    own.activation = torch.relu
    network.decoder = nn.Sequential(nn.Linear(37, 5), nn.LeakyReLU(0.1), nn.LayerNorm(5), nn.ReLU(), own).eval()
    network.requires_grad_(False)
    before = marks_of(network)
    assert marks_of(network) == before
    change(network.decoder)
    assert marks_of(network) != before
    hash(("network", *marks_of(network)))
