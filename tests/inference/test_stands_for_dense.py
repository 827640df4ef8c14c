"""A sparse module stands where a dense one stood: hooks, weights, parameters, kept tensors, pickles, exports."""

import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import srnn
from srnn.errors import UserError
from tests.inference.test_sparsify import pruned


def distance(sparse, dense, *inputs):
    with torch.no_grad():
        a, b = sparse(*inputs), dense(*inputs)
    return float((a - b).abs().max())


class Head(nn.Module):
    """Reads a layer's weight, makes its state like its first parameter, keeps its last state."""

    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.state = nn.Embedding(50, 32), nn.GRU(32, 32), None

    def forward(self, tokens_TB):
        start = next(self.parameters()).new_zeros(1, tokens_TB.shape[1], 32)
        y, self.state = self.rnn(self.emb(tokens_TB), start)
        return F.linear(y, self.emb.weight)


def test_hooks_of_replaced_layers_go_along():
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    seen = []
    model[0].register_forward_hook(lambda layer, x, y: y + x[0])
    model[2].register_forward_pre_hook(lambda layer, x, kwargs: ((2 * x[0],), kwargs), with_kwargs=True)
    model[2].register_forward_hook(lambda layer, x, y: seen.append(layer.weight.shape))
    x = torch.randn(3, 32)
    sparse = srnn.sparsify(model, kernel="csr")
    assert distance(sparse, model, x) < 1e-5
    assert distance(srnn.desparsify(sparse), model, x) < 1e-5
    assert seen == [(32, 32)] * 4


@pytest.mark.parametrize("batch_first", [True, False])
def test_hooks_see_single_steps(batch_first):
    rnn = pruned(nn.GRU(8, 16, batch_first=batch_first))
    rnn.register_forward_hook(lambda layer, x, y: (y[0] + 1, y[1]))
    sparse, x_BI = srnn.sparsify(rnn, kernel="csr"), torch.randn(3, 8)
    wanted = rnn(x_BI[:, None] if batch_first else x_BI[None])[0].squeeze(1 if batch_first else 0)
    torch.testing.assert_close(sparse.step(x_BI)[0], wanted.detach(), rtol=1e-5, atol=1e-6)


def test_hooks_bound_to_the_model_are_the_copys():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(16, 16), 0
            self.layer.register_forward_hook(self.count)

        def count(self, *_):
            self.calls += 1

        def forward(self, x):
            return self.layer(x)

    model = pruned(Counting())
    sparse = srnn.sparsify(model, kernel="csr")
    sparse(torch.randn(2, 16))
    assert (sparse.calls, model.calls) == (1, 0)


def test_weights_states_and_parameters_read_by_a_forward():
    torch.manual_seed(0)
    model, tokens = pruned(Head()), torch.randint(50, (5, 2))
    model(tokens)
    assert not model.state.is_leaf
    sparse = srnn.sparsify(model, kernel="csr")
    assert torch.equal(sparse.state, model.state)
    assert not sparse.state.requires_grad
    assert distance(sparse, model, tokens) < 1e-5
    weight = sparse.rnn.weight_hh_l0
    assert torch.equal(weight, model.rnn.weight_hh_l0)
    assert (weight.shape, weight.dtype, weight.device.type) == ((96, 32), torch.float32, "cpu")
    first = next(sparse.parameters())
    assert (first.dtype, first.device.type, first.requires_grad) == (torch.float32, "cpu", False)
    assert not [name for name in sparse.state_dict() if "like" in name]
    sparse.load_state_dict(sparse.state_dict())
    with pytest.raises(UserError, match=r"weight is packed and cannot be set.*desparsify"):
        sparse.emb.weight = nn.Parameter(torch.zeros(50, 32))


def test_attributes_of_replaced_layers_go_along():
    model = pruned(nn.Sequential(nn.Linear(16, 16), nn.GRU(16, 16), nn.Embedding(20, 16)))
    model[0].tag = {"a": 1}
    sparse = srnn.sparsify(model, kernel="csr")
    assert sparse[0].tag == {"a": 1}
    assert (sparse[1].mode, sparse[2].max_norm, sparse[2].sparse) == ("GRU", None, False)


def test_tensors_with_history_in_containers_are_copied_without_it():
    model = pruned(nn.Sequential(nn.Linear(16, 16)))
    model.kept = {"a": [torch.ones(2, requires_grad=True) * 2]}
    sparse = srnn.sparsify(model, kernel="csr")
    assert torch.equal(sparse.kept["a"][0], torch.full((2,), 2.0))
    assert sparse.kept["a"][0].is_leaf


def test_what_cannot_be_copied_is_a_sentence():
    model = pruned(nn.Sequential(nn.Linear(16, 16)))
    model.stream = (i for i in range(3))
    with pytest.raises(UserError, match=r"Sequential cannot be copied: .*generator"):
        srnn.sparsify(model, kernel="csr")


def test_default_dtype_of_the_process_changes_nothing():
    embedding = pruned(nn.Embedding(20, 16))
    torch.set_default_dtype(torch.float64)
    try:
        sparse = srnn.sparsify(embedding, kernel="csr")
        assert sparse(torch.tensor([3])).dtype == torch.float32
        assert sparse.float().weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_compiled_calls_write_fp32_on_a_cpu_whatever_torch_makes_by_default(default):
    recurrent, linear = pruned(nn.GRU(16, 24)), pruned(nn.Linear(16, 24))
    inputs = [torch.randn(shape) for shape in ((5, 1, 16), (1, 1, 16), (5, 3, 16))]
    wanted = [(recurrent(x)[0], linear(x)) for x in inputs]
    sparse = srnn.sparsify(recurrent, kernel="cpu"), srnn.sparsify(linear, kernel="cpu")
    torch.set_default_dtype(torch.float64) if default == "dtype" else torch.set_default_device("meta")
    try:
        got = [(sparse[0](x)[0], sparse[1](x)) for _ in range(2) for x in inputs]
        stepped = sparse[0].step(inputs[1][0])[0]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(got, 2 * wanted)
    torch.testing.assert_close(stepped, wanted[1][0][0])


def test_shared_memory_is_shared():
    sparse = srnn.sparsify(pruned(nn.Linear(16, 16)), kernel="csr").share_memory()
    assert all(buffer.is_shared() for buffer in sparse.buffers())


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(50, 16), nn.LSTM(16, 32, 2, bidirectional=True), nn.Linear(64, 50)

    def forward(self, tokens_TB):
        return self.out(self.rnn(self.emb(tokens_TB))[0])


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_plain_pickles_can_be_read(values):
    sparse, tokens = srnn.sparsify(pruned(Reader()), values=values, kernel="csr"), torch.randint(50, (4, 2))
    sparse(tokens)
    assert distance(pickle.loads(pickle.dumps(sparse)), sparse, tokens) == 0
    matrix = sparse.out.matrices()["weight"]
    back = pickle.loads(pickle.dumps(matrix))
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(back.parts.values(), matrix.parts.values(), strict=True)
    )


def test_an_exported_program_is_exact_in_another_process(tmp_path):
    torch.manual_seed(0)
    sparse, tokens = srnn.sparsify(pruned(Reader()), kernel="csr"), torch.randint(50, (4, 2))
    torch.export.save(torch.export.export(sparse, (tokens,)), tmp_path / "a.pt2")
    torch.save((tokens, sparse(tokens)), tmp_path / "wanted.pt")
    code = f"""
import torch, srnn
tokens, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
other = srnn.sparsify(torch.nn.Linear(8, 8), kernel="csr") if {{first}} else None
program = torch.export.load({str(tmp_path / "a.pt2")!r}).module()
for _ in range(2):
    assert torch.equal(program(tokens), wanted)
"""
    for first in (False, True):
        subprocess.run([sys.executable, "-c", code.replace("{first}", str(first))], check=True)


AOT = """
import sys, torch, srnn
from torch import nn
if sys.argv[1:]:
    layer, x = nn.Linear(16, 24).eval(), torch.randn(3, 16)
    layer.weight.data.mul_(torch.rand(24, 16) < 0.1)
    with torch.no_grad():
        program = torch.export.export(srnn.sparsify(layer, kernel="csr"), (x,))
        torch._inductor.aoti_compile_and_package(program, package_path="a.pt2")
        torch.save((x, layer(x)), "wanted.pt")
else:
    x, wanted = torch.load("wanted.pt")
    torch.testing.assert_close(torch._inductor.aoti_load_package("a.pt2")(x), wanted)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_an_aotinductor_package_is_exact_in_another_process(tmp_path):
    for words in (["write"], []):
        subprocess.run([sys.executable, "-c", AOT, *words], cwd=tmp_path, check=True)


def test_a_program_given_other_weights_runs_them():
    torch.manual_seed(0)
    one, two = pruned(nn.Linear(16, 16)), pruned(nn.Linear(16, 16))
    two.weight.data.copy_(one.weight * 2)
    one, two, x = srnn.sparsify(one, kernel="csr"), srnn.sparsify(two, kernel="csr"), torch.randn(3, 16)
    operator = torch.ops.srnn.sparse_module
    for _ in range(2):
        assert torch.equal(operator([x], two.tensors(), one.description)[0], two(x))
        assert torch.equal(operator([x], one.tensors(), one.description)[0], one(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", [nn.Linear, nn.GRU, nn.LSTM])
def test_traces_and_scripts_are_refused_and_the_module_works_afterwards(kind):
    dense, x = pruned(nn.Sequential(kind(16, 32))), torch.randn(5, 16)
    sparse = srnn.sparsify(dense, kernel="csr")
    with pytest.raises(UserError, match=r"torch\.jit\.trace does not see sparse kernels: use torch\.export or torch"):
        torch.jit.trace(sparse, x)
    with pytest.raises(UserError, match=r"torch\.jit\.script does not see sparse kernels: use torch\.export or torch"):
        torch.jit.script(sparse)
    y, wanted = sparse(x), dense(x)
    y, wanted = (y, wanted) if isinstance(y, torch.Tensor) else (y[0], wanted[0])
    torch.testing.assert_close(y, wanted.detach(), rtol=1e-5, atol=1e-6)


def test_a_kernel_of_ones_own_is_refused_at_export():
    from srnn.kernels.csr import Csr

    class Mine(Csr):
        pass

    sparse = srnn.sparsify(pruned(nn.Linear(16, 16)), kernel=Mine())
    with pytest.raises(UserError, match="kernel Mine is not registered"):
        torch.export.export(sparse, (torch.randn(2, 16),))


@pytest.mark.parametrize("kernel", ["cpu", "csr", "dense", "auto"])
def test_an_empty_batch_gives_what_torch_gives(kernel):
    rnns = [nn.GRU(32, 48, batch_first=True), nn.LSTM(32, 48, 2, bidirectional=True, proj_size=8), nn.RNN(32, 48)]
    for rnn in map(pruned, rnns):
        x = torch.empty(0, 4, 32) if rnn.batch_first else torch.empty(4, 0, 32)
        (y, state), (wanted, end) = srnn.sparsify(rnn, kernel=kernel)(x), rnn(x)
        assert y.shape == wanted.shape
        assert [part.shape for part in state] == [part.shape for part in end]
    for shape in [(0, 32), (4, 0, 32)]:
        linear = pruned(nn.Linear(32, 48))
        assert srnn.sparsify(linear, kernel=kernel)(torch.empty(shape)).shape == (*shape[:-1], 48)
    for rows in (50, 30_000):
        embedding = srnn.sparsify(pruned(nn.Embedding(rows, 9)), kernel=kernel)
        assert embedding(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 9)


def test_an_lstms_state_may_be_a_list():
    lstm = pruned(nn.LSTM(32, 48))
    sparse = srnn.sparsify(lstm, kernel="csr")
    for x, shape in ((torch.randn(7, 32), (1, 48)), (torch.randn(7, 2, 32), (1, 2, 48))):
        state = [torch.randn(shape), torch.randn(shape)]
        torch.testing.assert_close(sparse(x, state)[0], lstm(x, tuple(state))[0].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rnn", [nn.GRU(8, 12, 2, bidirectional=True), nn.LSTM(8, 12, proj_size=4), nn.RNN(8, 12, bias=False)]
)
def test_lists_of_all_weights(rnn):
    sparse = srnn.sparsify(pruned(rnn), kernel="csr")
    assert sparse._flat_weights_names == rnn._flat_weights_names
    for one, other in zip(sparse.all_weights, rnn.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(sparse._flat_weights) == len(rnn._flat_weights)


@pytest.mark.parametrize("kernel", ["csr", "dense", "cpu"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int64])
@pytest.mark.parametrize("streams", [1, 3])
def test_states_of_another_type_are_cast_whatever_runs_the_layer(kernel, kind, streams):
    for dense in (pruned(nn.GRU(16, 32, 2)), pruned(nn.LSTMCell(16, 32))):
        sparse = srnn.sparsify(dense, kernel=kernel)
        cell = isinstance(dense, nn.LSTMCell)
        x = torch.randn(streams, 16) if cell else torch.randn(4, streams, 16)
        h = (3 * torch.randn(streams, 32) if cell else 3 * torch.randn(2, streams, 32)).to(kind)
        given, exact = ((h, h), (h.float(), h.float())) if cell else (h, h.float())
        for got, want in zip(sparse(x, given), dense(x, exact), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
