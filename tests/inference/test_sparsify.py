import copy
import io

import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.inference.calibration import record_inputs
from srnn.inference.modules import SparseEmbedding, SparseLinear, SparseRecurrent
from srnn.inference.sparsify import desparsify, sparsify
from tests.kernels.common import prune


def pruned(module, density=0.2, height=1):
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                kept = torch.rand(-(-weight.shape[0] // height), weight.shape[1]) < density
                weight.mul_(kept.repeat_interleave(height, dim=0)[: weight.shape[0]])
    return module.eval()


class Network(nn.Module):
    """A network of somebody else's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.rnn = nn.LSTM(12, 24, 2, batch_first=True, dropout=0.5)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens_BT, state=None):
        y_BTH, state = self.rnn(self.embedding(tokens_BT), state)
        return self.head(self.norm(y_BTH)), state


def test_a_network_is_sparse_and_back_bit_for_bit():
    torch.manual_seed(0)
    network = pruned(Network())
    before = copy.deepcopy(network.state_dict())
    tokens = torch.randint(20, (3, 7))
    sparse = sparsify(network)
    assert [type(m) for m in (sparse.embedding, sparse.rnn, sparse.norm, sparse.head)] == [
        SparseEmbedding, SparseRecurrent, nn.LayerNorm, SparseLinear,
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens)[0], network(tokens)[0], rtol=1e-5, atol=1e-6)
    dense = desparsify(sparse)
    assert type(dense.rnn) is nn.LSTM
    assert dense.rnn.dropout == 0.5
    assert list(dense.state_dict()) == list(before)
    assert all(map(torch.equal, dense.state_dict().values(), before.values()))
    assert all(p.requires_grad for p in dense.parameters())
    assert all(map(torch.equal, network.state_dict().values(), before.values())), "the network itself is left alone"
    assert type(network.rnn) is nn.LSTM
    with torch.no_grad():
        assert torch.equal(dense(tokens)[0], network(tokens)[0])


def test_public_names_work_on_a_bare_layer():
    gru = pruned(nn.GRU(6, 10, bidirectional=True))
    x = torch.randn(4, 2, 6)
    sparse = srnn.sparsify(gru, values="bf16", kernel="cpu")
    assert (sparse.hidden_size, sparse.bidirectional) == (10, True)
    sparse.flatten_parameters()
    back = srnn.desparsify(sparse)
    assert torch.equal(back.weight_hh_l0, gru.weight_hh_l0.bfloat16().float())
    with torch.no_grad():
        torch.testing.assert_close(sparse(x)[0], back(x)[0], rtol=1e-5, atol=1e-6)


def test_what_is_dense_stays_what_it_is():
    linear = nn.Linear(8, 8)
    for values in ("fp32", "int8"):
        with pytest.warns(UserWarning, match="sparsify replaced nothing: Linear has too few zeros"):
            assert type(sparsify(linear, values=values)) is nn.Linear, "narrow values alone make nothing sparse"
    with pytest.warns(UserWarning, match="left dense, though pruned: Embedding has max_norm"):
        assert type(sparsify(pruned(nn.Embedding(9, 9, max_norm=1.0)))) is nn.Embedding


def test_weights_that_two_modules_share_are_packed_once():
    network = nn.Sequential(nn.Embedding(20, 13), nn.Linear(13, 20))
    network[1].weight = network[0].weight
    sparse = sparsify(pruned(network))
    assert sparse[0].matrices()["weight"].values.data_ptr() == sparse[1].matrices()["weight"].values.data_ptr()


def test_steps_are_the_sequence():
    for kind in (nn.GRU, nn.LSTM, nn.RNN):
        sparse = sparsify(pruned(kind(5, 9, 2)), kernel="cpu")
        x = torch.randn(6, 3, 5)
        whole, end = sparse(x)
        state, steps = None, []
        for x_BI in x:
            y, state = sparse.step(x_BI, state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps), whole, rtol=1e-6, atol=1e-7)
        ends = zip(end, state, strict=True) if kind is nn.LSTM else [(end, state)]
        for a, b in ends:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="bidirectional"):
        sparsify(pruned(nn.GRU(5, 9, bidirectional=True))).step(x[0])


def test_backward_raises_and_forward_of_trained_parts_works():
    sparse = sparsify(pruned(nn.GRU(5, 9)))
    x = torch.randn(4, 2, 5, requires_grad=True)
    y, state = sparse(x)
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        state.sum().backward()
    linear = sparsify(pruned(nn.Linear(5, 9)))
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        linear(x).sum().backward()
    assert not sparse(x.detach())[0].requires_grad
    assert not [p for p in sparse.parameters() if p.requires_grad or p.numel()]


def test_copies_pickles_and_state_dicts():
    sparse = sparsify(pruned(nn.GRU(5, 40)), values="int8")
    x = torch.randn(4, 2, 5)
    wanted = sparse(x)[0]
    assert torch.equal(copy.deepcopy(sparse)(x)[0], wanted)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x)[0], wanted)
    other = copy.deepcopy(sparse)
    for buffer in other.buffers():
        buffer.zero_() if buffer.dtype != torch.int32 else None
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x)[0], wanted)
    assert {"weight_hh_l0_packed.values", "weight_hh_l0_packed.scales", "bias_ih_l0"} <= set(sparse.state_dict())


def test_dtype_is_decided_when_packing():
    sparse = sparsify(pruned(nn.GRU(5, 9)))
    for change in (sparse.half, sparse.double, lambda: nn.Sequential(sparse).to(torch.bfloat16)):
        with pytest.raises(TypeError, match=r"choose sparsify\(values"):
            change()
    sparse.float().to("cpu")
    with pytest.raises(UserError, match="fp32 on a CPU"):
        sparsify(pruned(nn.GRU(5, 9)), kernel="cpu")(torch.randn(4, 2, 5).half())


def test_blocks_that_the_weights_do_not_have_are_refused():
    gru = pruned(nn.GRU(64, 64), 0.1)
    with pytest.raises(UserError, match=r"weight_ih_l0 is not pruned in 16x1 blocks: .* bytes, its single elements"):
        sparsify(gru, "16x1")
    blocks = sparsify(pruned(nn.GRU(64, 64), 0.1, 16), "16x1", kernel="cpu")
    assert blocks.matrices()["weight_hh_l0"].structure == "16x1"
    assert sparsify(pruned(nn.GRU(64, 64), 0.1, 16)).matrices()["weight_hh_l0"].structure == "16x1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "3x1"}, r"structure='3x1': there are auto, element"),
        ({"values": "fp8"}, r"values='fp8': there are fp32"),
        ({"kernel": "cpuu"}, r"Did you mean 'cpu'"),
    ],
)
def test_wrong_arguments_say_what_there_is(options, message):
    with pytest.raises(UserError, match=message):
        sparsify(pruned(nn.GRU(5, 9)), **options)


@pytest.mark.parametrize("kernel", ["auto", "cpu"])
def test_inputs_that_are_no_floats_are_refused(kernel):
    with pytest.raises(UserError, match=r"SparseRecurrent cannot run: inputs are torch\.int64, and have to be floats"):
        sparsify(pruned(nn.GRU(5, 9)), kernel=kernel)(torch.zeros(2, 1, 5, dtype=torch.int64))


def test_a_backend_asked_for_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr("srnn.kernels.csr.torch.backends.mkl.is_available", lambda: False)
    with pytest.raises(UserError, match=r"kernel=csr cannot run on cpu: torch\.sparse needs MKL"):
        sparsify(pruned(nn.GRU(5, 9)), kernel="csr")


def test_not_finite_weights_are_refused():
    gru = pruned(nn.GRU(5, 9))
    gru.weight_hh_l0.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"weight_hh_l0 .*diverged"):
        sparsify(gru)
    gru.weight_hh_l0.data[0, 0] = 1e6
    with pytest.raises(UserError, match="use values=fp32 or bf16"):
        sparsify(gru, values="fp16")


@pytest.mark.parametrize("bad", [torch.randn(4, 2, 6), torch.randn(0, 2, 5), torch.randn(5), torch.randn(4, 0, 6)])
def test_inputs_of_wrong_shape_are_refused(bad):
    with pytest.raises((RuntimeError, ValueError), match=r"features|nothing to run|dimensions"):
        sparsify(pruned(nn.GRU(5, 9)))(bad)


def test_states_and_numbers_of_wrong_shape_are_refused():
    sparse = sparsify(pruned(nn.GRU(5, 9)))
    with pytest.raises(RuntimeError, match=r"state must have shape \[\(1, 2, 9\)\], not"):
        sparse(torch.randn(4, 2, 5), torch.zeros(1, 3, 9))
    with pytest.raises(IndexError, match="out of range"):
        sparsify(pruned(nn.Embedding(9, 9)))(torch.tensor([9]))
    with pytest.raises(IndexError, match="between 0 and 29999"):
        sparsify(pruned(nn.Embedding(30_000, 9)))(torch.tensor([30_000]))
    with pytest.raises(RuntimeError, match="5 features"):
        sparsify(pruned(nn.Linear(5, 9)))(torch.randn(2, 6))


@pytest.mark.parametrize("rows", [50, 30_000])
def test_embeddings_small_and_large_look_up_the_same(rows):
    embedding = pruned(nn.Embedding(rows, 9))
    sparse = sparsify(embedding)
    for numbers in (torch.randint(rows, (3, 4)), torch.tensor([rows - 1]), torch.tensor(3)):
        assert torch.equal(sparse(numbers), embedding(numbers))


def test_calibration_sees_what_each_matrix_multiplies():
    torch.manual_seed(0)
    network = pruned(Network())
    tokens = torch.randint(20, (3, 7))
    energies = record_inputs(network, lambda model: model(tokens))
    x = network.embedding(tokens).reshape(-1, 12)
    torch.testing.assert_close(energies["rnn.weight_ih_l0"], x.detach().square().mean(0))
    y, _ = network.rnn(network.embedding(tokens))
    with torch.no_grad():
        head = network.norm(y).reshape(-1, 24).square().mean(0)
    torch.testing.assert_close(energies["head.weight"], head)
    recurrent = {f"rnn.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
    assert set(energies) == {"head.weight"} | recurrent
    assert sparsify(network, values="int8", energies=energies)(tokens)[0].isfinite().all()


@pytest.mark.parametrize("module", [lambda: nn.GRU(12, 24, 2, bidirectional=True), lambda: nn.LSTM(12, 24)])
def test_a_compiled_network_is_one_graph(module):
    """Its sparse modules are operators of their own."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.recurrent = nn.Embedding(50, 12), module()
            self.linear = nn.Linear(48 if self.recurrent.bidirectional else 24, 50)

        def forward(self, tokens_TB):
            y, state = self.recurrent(self.embedding(tokens_TB).tanh())
            return self.linear(y) * 2, state

    sparse = sparsify(prune(Network(), 0.1), kernel="cpu")
    tokens = torch.randint(50, (7, 3))
    for model in (sparse, copy.deepcopy(sparse)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), sparse(tokens))
    operator = torch.ops.srnn.sparse_module.default
    inputs = [torch.randn(5, 2, 12), torch.zeros(4, 2, 24)]
    if sparse.recurrent.cell == "gru":
        torch.library.opcheck(
            operator,
            (inputs, sparse.recurrent.tensors(), sparse.recurrent.description),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_dense_network_are_refused_in_one_sentence(strict):
    dense = pruned(nn.Sequential(nn.Linear(12, 24), nn.GRU(24, 24)))
    sparse = sparsify(dense, kernel="csr")
    with pytest.raises(RuntimeError, match=r"Weights of a dense network .* \(srnn\.desparsify gives it\)") as told:
        sparse.load_state_dict(dense.state_dict(), strict=strict)
    assert str(told.value).count("srnn.sparsify") == 1
    dense.load_state_dict(srnn.desparsify(sparse).state_dict())
    sparse.load_state_dict(sparse.state_dict())


def test_a_layer_of_a_network_steps():
    sparse = sparsify(pruned(nn.Sequential(nn.Linear(12, 24), nn.GRU(24, 24))), kernel="csr")
    x, state = torch.randn(3, 2, 12), None
    for step, wanted in zip(x, sparse(x)[0], strict=True):
        y, state = sparse[1].step(sparse[0](step), state)
        torch.testing.assert_close(y, wanted)


def test_a_state_dict_of_older_names_is_taken():
    gru = pruned(nn.GRU(5, 9))
    sparse, other = sparsify(gru, kernel="csr"), sparsify(gru, kernel="csr")
    state = {name.replace("_packed.", "."): 2 * t for name, t in sparse.state_dict().items() if "values" in name}
    assert "weight_hh_l0.values" in state
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any("values" in name for name in missing)
    assert torch.equal(other.weight_hh_l0, 2 * gru.weight_hh_l0)
