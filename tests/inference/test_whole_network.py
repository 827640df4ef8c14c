"""``kernel=auto`` on whole networks: what is timed, what wins, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.inference import whole_network
from srnn.inference.base import TORCH
from srnn.inference.example_calls import ExampleCalls, example_input
from srnn.inference.packing import pack
from srnn.inference.unpacking import unpack
from srnn.kernels import Auto, Dense
from srnn.models import LanguageModel, SequenceModel, gru


def pruned(network, sparsity=0.8):
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) > sparsity)
    return network.eval()


class Tagger(nn.Module):
    """Two recurrent layers and a decoder, time first."""

    def __init__(self, batch_first=False, stride=1):
        super().__init__()
        self.first = nn.GRU(12, 16, batch_first=batch_first)
        self.second = nn.LSTM(16, 16, bidirectional=True, batch_first=batch_first)
        self.decoder = nn.Linear(32, 20)
        self.stride = stride

    def forward(self, x):
        y, _ = self.first(x[:: self.stride])
        y, _ = self.second(y)
        return self.decoder(y)


@pytest.fixture
def costs(monkeypatch):
    """Times made up: (part, backend, class of lengths) -> seconds, the more specific first; others cost 1."""
    found = {}

    def timed(call, device):
        seen = calls_of[-1]._seen(call)
        total = 0.0
        for name, several in seen.items():
            for use, steps in dict(several).items():
                backend = calls_of[-1].parts[name].decided[use]
                total += found.get((name, backend, use[2]), found.get(backend, 1.0)) * (1 + 0.001 * steps)
        return total

    calls_of = []
    begin = ExampleCalls.__init__

    def remembered(self, *arguments):
        calls_of.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(ExampleCalls, "__init__", remembered)
    monkeypatch.setattr(whole_network, "timed", timed)
    monkeypatch.setattr(whole_network, "recall", lambda *_: None)
    return found


def decisions(network):
    """Part -> backend of each class of lengths."""
    return {
        name: [module.decided[use] for use in sorted(module.decided)]
        for name, module in network.named_modules()
        if getattr(module, "decided", None)
    }


def test_dense_stays_where_nothing_is_clearly_faster(costs):
    costs |= {"cpu": 0.98, "csr": 1.5, "onednn": 2.0}
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(sparse) == {part: [TORCH] * 3 for part in ("first", "second", "decoder")}


def test_one_backend_for_each_class_of_lengths(costs):
    costs |= {"csr": 3.0, "onednn": 2.0, "cpu": 0.5}
    costs |= {(part, "cpu", 2): 1.2 for part in ("first", "second", "decoder")}
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(sparse) == {part: ["cpu", "cpu", TORCH] for part in ("first", "second", "decoder")}


def test_a_part_stays_dense_if_that_is_faster_in_the_network(costs):
    costs |= {"csr": 3.0, "onednn": 2.0, "cpu": 0.5, ("decoder", "cpu", 0): 0.7, ("decoder", TORCH, 0): 0.2}
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(sparse)["decoder"] == [TORCH, "cpu", "cpu"]
    assert "1 step: cpu, decoder torch" in repr(sparse)


def test_a_part_runs_sparse_in_a_network_that_stays_dense(costs):
    costs |= {"csr": 3.0, "onednn": 2.0, "cpu": 1.5, ("first", "cpu", 0): 0.2}
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert [backends[0] for backends in decisions(sparse).values()] == ["cpu", TORCH, TORCH]


def test_a_backend_may_find_its_caches_cold_twice(costs, monkeypatch):
    costs |= {"torch": 1e-5, "csr": 3e-5, "onednn": 2e-5, "cpu": 0.5e-5}
    timed, of_cpu = whole_network.timed, []

    def cold(call, device):
        seconds = timed(call, device)
        of_cpu.extend([seconds] * (seconds < 2e-5))
        return seconds * (10 if seconds < 2e-5 and of_cpu.count(seconds) <= 2 else 1)

    monkeypatch.setattr(whole_network, "timed", cold)
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(sparse) == {part: ["cpu"] * 3 for part in ("first", "second", "decoder")}


def test_a_long_sequence_that_loses_counts(costs, monkeypatch):
    """At 100 steps cpu is faster, at 400 slower: then it may not run either."""
    monkeypatch.setattr(whole_network, "_LONG", 1e9)
    monkeypatch.setattr(
        whole_network, "_burst",
        lambda call, device: {100: 0.5, 400: 1.1}.get(steps_of(call), 1.0) if on_cpu() else 1.0,
    )  # fmt: skip
    sparse = []
    made = whole_network.ExampleCalls

    def steps_of(call):
        return call.args[0].shape[0]

    def on_cpu():
        return any("cpu" in part.decided.values() for part in sparse[-1].parts.values())

    monkeypatch.setattr(whole_network, "ExampleCalls", lambda *a: sparse.append(made(*a)) or sparse[-1])
    found = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(found)["first"][2] != "cpu"


def test_the_same_network_is_not_measured_again(monkeypatch):
    network, x = pruned(Tagger()), torch.randn(50, 1, 12)
    first = srnn.sparsify(network, example=x)
    monkeypatch.setattr(whole_network, "timed", None)
    again = srnn.sparsify(network, example=x)
    assert decisions(again) == decisions(first)
    assert again.sparsify_report == first.sparsify_report
    with monkeypatch.context() as patch:
        patch.setattr(whole_network, "ExampleCalls", None)
        assert decisions(srnn.sparsify(network, example=x)) == decisions(first), "it is not even called"
    with pytest.raises(TypeError, match="not callable"):
        srnn.sparsify(network, example=torch.randn(50, 5, 12))  # other streams are another question


def test_without_an_example_the_report_says_how_kernels_are_chosen():
    assert "layer by layer" in repr(srnn.sparsify(pruned(Tagger())))
    assert "kernels" not in repr(srnn.sparsify(pruned(Tagger()), kernel="cpu"))


def test_layers_name_what_was_chosen_for_them_when_they_first_ran():
    network = nn.ModuleDict({"rnn": nn.LSTM(6, 9, 2), "cell": nn.GRUCell(6, 7), "linear": nn.Linear(6, 5)})
    sparse = srnn.sparsify(pruned(network), kernel=Dense())
    assert "row" not in repr(sparse)
    assert "stream" not in repr(sparse)
    for part in sparse.values():
        part(torch.randn(1, 6))
    alone = srnn.sparsify(pruned(nn.GRU(6, 9)))
    assert "kernels" in repr(alone)
    alone(torch.randn(20, 2, 6))
    for wanted, said in [
        (["lstm 6 to 9, 1 stream, 1 step: ", "lstm 9 to 9, 1 stream, 1 step: "], repr(sparse["rnn"])),
        (["gru 6 to 7, 1 stream, 1 step: "], repr(sparse["cell"])),
        (["linear 6 to 5, 1 row: "], repr(sparse["linear"])),
        (["gru, 6, 9", "sparse: GRU", "gru 6 to 9, 2 streams, 16 steps: "], repr(alone)),
    ]:
        assert all(f"\n  {line}" in said for line in wanted), said


@pytest.mark.parametrize("steps", [1, 2, 32, 33, 70])
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM, nn.RNN])
def test_torchs_own_module_in_place_of_sparse_ones(cell, steps):
    """Same outputs, states, hooks and refusals as on kernels, wherever dense is faster."""
    network = pruned(cell(7, 9, num_layers=2, batch_first=True))
    sparse = srnn.sparsify(network)
    uses = {("cpu", 4, kind, torch.get_num_threads()): TORCH for kind in range(3)}
    sparse.decided = uses
    called = []
    handle = sparse.register_forward_hook(lambda *_: called.append(1))
    x, h = torch.randn(3, steps, 7), torch.randn(2, 3, 9)
    h = (h, h.tanh()) if cell is nn.LSTM else h
    for given in (None, h):
        want, got = network(x, given), sparse(x, given)
        torch.testing.assert_close(got, want)
    assert len(called) == 2
    handle.remove()
    asked = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        sparse(asked)[0].sum().backward()
    packed = nn.utils.rnn.pack_sequence([x[0], x[1, : max(1, steps // 2)]])
    torch.testing.assert_close(sparse(packed)[0].data, network(packed)[0].data)
    again = pickle.loads(pickle.dumps(copy.deepcopy(sparse)))
    assert again.decided == uses
    torch.testing.assert_close(again(x)[0], network(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_torchs_functions_of_every_kind():
    both_ways = nn.GRU(7, 9, bias=False, bidirectional=True)
    kinds = [nn.RNN(7, 9, nonlinearity="relu"), nn.LSTM(7, 9, proj_size=4), both_ways]
    for network in map(pruned, kinds):
        sparse = srnn.sparsify(network)
        sparse.decided = {("cpu", 4, 1, torch.get_num_threads()): TORCH}
        x = torch.randn(5, 3, 7)
        torch.testing.assert_close(sparse(x), network(x))
        state = network(x)[1]
        narrow = tuple(part[:, :1] for part in state) if isinstance(state, tuple) else state[:, :1]
        with pytest.raises(RuntimeError, match="the state must have shape"):
            sparse(x, narrow)
        with pytest.raises(RuntimeError, match="must have 7 features, not 6"):
            sparse(x[..., :6])


def test_single_steps_by_torchs_own_module():
    network = pruned(nn.LSTM(7, 9))
    sparse = srnn.sparsify(network)
    sparse.decided = {("cpu", 1, 0, torch.get_num_threads()): TORCH}
    x, state = torch.randn(1, 7), None
    want, _ = network(torch.cat([x[None]] * 3))
    for t in range(3):
        y, state = sparse.step(x, state)
        torch.testing.assert_close(y, want[t])


def test_a_linear_by_torch():
    linear = pruned(nn.Linear(7, 9))
    sparse = srnn.sparsify(linear)
    sparse.decided = {("cpu", 1, 1, torch.get_num_threads()): TORCH}
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(sparse(x), linear(x))


def test_whole_networks_compute_the_same_after_the_choice():
    for network, x in (
        (LanguageModel(nn.GRU, 30, 8, 16, num_layers=2), torch.randint(30, (1, 40))),
        (SequenceModel(nn.LSTM, 12, 5, 16), torch.randn(1, 40, 12)),
        (Tagger(), torch.randn(40, 3, 12)),
    ):
        sparse = srnn.sparsify(pruned(network), example=x)
        want, got = network(x), sparse(x)
        torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_time_axis_is_found_where_sizes_are_equal(batch_first):
    """Twelve steps, inputs and streams: only along the time axis two of them are two steps."""
    network = srnn.sparsify(pruned(Tagger(batch_first)))
    calls = ExampleCalls(network, parts(network), torch.randn(12, 12, 12))
    assert calls.axis == int(batch_first)
    assert calls.classes((1, 16, 100, 400)) == [(1,), (16,), (100, 400)]
    assert calls.call(16)().shape[calls.axis] == 16


def parts(network):
    return {name: module for name, module in network.named_modules() if getattr(module, "candidates", dict)()}


def test_without_a_time_axis_the_example_is_timed_as_it_is():
    network = srnn.sparsify(pruned(Tagger(stride=2)))
    calls = ExampleCalls(network, parts(network), torch.randn(50, 1, 12))
    assert calls.axis is None
    assert calls.classes((1, 16, 100)) == [(25,)]
    found = srnn.sparsify(pruned(Tagger(stride=2)), example=torch.randn(50, 1, 12))
    assert {use[2] for use in found.first.decided} == {1}


def test_several_inputs():
    sparse = srnn.sparsify(pruned(nn.GRU(7, 9)), example=(torch.randn(20, 2, 7), torch.zeros(1, 2, 9)))
    assert {use[1:3] for use in sparse.decided} == {(2, 0), (2, 1), (2, 2)}


def test_a_registered_network_makes_its_own_example():
    config, sizes = {"name": "gru", "hidden_size": 16, "embedding_size": 8}, {"vocabulary_size": 30}
    network = pruned(gru(16, 8, **sizes))
    kernel = Auto()
    sparse = unpack(pack(network, config, sizes), kernel)
    assert {use[2] for use in sparse.rnn.decided} == {0, 1, 2}
    assert [choice.use for choice in kernel.choices.values()] == [
        f"1 stream, {n}" for n in ("1 step", "16 steps", "100 steps")
    ]
    assert "kernels: 1 stream, 1 step" in repr(sparse)


def test_examples_are_what_networks_read():
    assert example_input({"vocabulary_size": 7}).shape == (1, 100)
    assert example_input({"input_size": 7}, steps=3).shape == (1, 3, 7)
    assert example_input({"images": 7}) is None


@pytest.mark.parametrize("of_decoder", ["cpu", TORCH])
def test_choosing_for_a_large_network_takes_few_passes_of_it(of_decoder, monkeypatch):
    """A dense call of 100 steps takes three seconds: all calls together, of all backends, no more than 12 of these."""
    passed, calls_of, made = [0.0], [], whole_network.ExampleCalls

    def timed(call, device):
        backends = calls_of[-1]._seen(call)
        seconds = 0.0
        for name, several in backends.items():
            for use, steps in dict(several).items():
                backend = calls_of[-1].parts[name].decided[use]
                factor = {"cpu": 0.7, "onednn": 1.2, "csr": 2.5}.get(backend, 1.0)
                factor = 1.5 if backend == "cpu" and (name, of_decoder) == ("decoder", TORCH) else factor
                seconds += factor * steps / 100  # of each of three parts
        passed[0] += seconds
        return seconds

    monkeypatch.setattr(whole_network, "ExampleCalls", lambda *a: calls_of.append(made(*a)) or calls_of[-1])
    monkeypatch.setattr(whole_network, "timed", timed)
    monkeypatch.setattr(whole_network, "recall", lambda *_: None)
    monkeypatch.setattr(whole_network.time, "monotonic", lambda: passed[0])
    sparse = srnn.sparsify(pruned(Tagger()), example=torch.randn(50, 1, 12))
    assert decisions(sparse) == {"first": ["cpu"] * 3, "second": ["cpu"] * 3, "decoder": [of_decoder] * 3}
    assert passed[0] < 12 * 3


class Stateful(nn.Module):
    """Goes on where its last call ended, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.rnn, self.state, self.seen = nn.GRU(12, 33), None, []
        self.register_buffer("calls", torch.zeros(()))
        self.rnn.register_forward_hook(self.see)

    def see(self, layer, inputs, outputs):
        self.seen.append(1)

    def forward(self, x_TBI):
        self.calls += 1
        y_TBH, self.state = self.rnn(x_TBI, self.state)
        return y_TBH


def test_measuring_leaves_no_trace_in_the_network():
    x_TBI, network = torch.randn(7, 3, 12), pruned(Stateful())
    torch.manual_seed(0)
    after = torch.randn(3)
    torch.manual_seed(0)
    sparse = srnn.sparsify(network, example=x_TBI)
    assert torch.equal(torch.randn(3), after)
    assert (sparse.state, sparse.seen, float(sparse.calls)) == (None, [], 0)
    assert sparse.rnn.decided
    with torch.no_grad():
        torch.testing.assert_close(sparse(x_TBI), network(x_TBI), rtol=1e-5, atol=1e-6)


def test_examples_that_cannot_be_run_are_a_sentence():
    rnn, x_TBI = pruned(nn.GRU(12, 33)), torch.randn(7, 3, 12)
    srnn.sparsify(rnn, example=nn.utils.rnn.pack_sequence([torch.randn(5, 12)]))
    for example, message in (({"x": x_TBI}, "a dict"), ([x_TBI], "a list"), (torch.randn(7, 3, 11), r"\(7, 3, 11\)")):
        with pytest.raises(
            UserError, match=f"the network cannot be called with the example, {message}.*an input of the net"
        ):
            srnn.sparsify(rnn, example=example)
    with pytest.raises(UserError, match="holds nothing"):
        srnn.sparsify(rnn, example=torch.zeros(7, 0, 12))
