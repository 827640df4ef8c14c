"""Single cells on sparse kernels: what torch's own do, checked in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.inference.base import TORCH
from srnn.inference.packing import PackedModel, pack
from srnn.inference.sparse_cell import SparseCell
from srnn.inference.unpacking import unpack
from srnn.kernels import Cpu
from srnn.sparse import SparseMatrix

CELLS = [
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu"}),
    (nn.GRUCell, {}),
    (nn.LSTMCell, {}),
]


def pruned(module, sparsity=0.7):
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) > sparsity)
                weight[1] = 0
    return module.eval()


def parts(state):
    return state if isinstance(state, tuple) else (state,)


class Looping(nn.Module):
    """A cell over time, with a decoder."""

    def __init__(self, cell=nn.LSTMCell):
        super().__init__()
        self.cell, self.decoder = cell(12, 16), nn.Linear(16, 5)

    def forward(self, x_TBI):
        state, outputs = None, []
        for x_BI in x_TBI:
            state = self.cell(x_BI, state)
            outputs.append(self.decoder(parts(state)[0]))
        return torch.stack(outputs)


@pytest.mark.parametrize("kernel", ["cpu", "csr"])
@pytest.mark.parametrize(("kind", "options"), CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(13, 37), (70, 65)])
def test_steps_are_those_of_torch_in_float64(kernel, kind, options, bias, sizes):
    cell = pruned(kind(*sizes, bias=bias, **options))
    sparse, exact = srnn.sparsify(cell, kernel=kernel), copy.deepcopy(cell).double()
    assert isinstance(sparse, SparseCell)
    for shape in ((3,), (1,), ()):
        wanted = got = None
        for _ in range(3):
            x = torch.randn(*shape, sizes[0])
            wanted, got = exact(x.double(), wanted), sparse(x, got)
            for w, g in zip(parts(wanted), parts(got), strict=True):
                assert g.shape == w.shape
                torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


def test_hooks_weights_pickles_and_gradients_are_those_of_a_sparse_module():
    cell = pruned(nn.GRUCell(13, 37))
    cell.register_forward_hook(hook)
    sparse = srnn.sparsify(cell, kernel="cpu")
    assert isinstance(sparse, SparseCell)
    assert torch.equal(sparse.weight_hh, cell.weight_hh)
    x = torch.randn(2, 13)
    torch.testing.assert_close(pickle.loads(pickle.dumps(sparse))(x), cell(x))
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        sparse(x.requires_grad_()).sum().backward()
    assert sparse(torch.zeros(0, 13)).shape == (0, 37)
    dense = srnn.desparsify(sparse)
    assert type(dense) is nn.GRUCell  # and the hook went along
    torch.testing.assert_close(dense(x), cell(x))
    assert torch.equal(dense.weight_ih, cell.weight_ih)


def hook(module, inputs, output):
    return output + 1


@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_what_does_not_fit_is_refused_as_torch_does(kind, options):
    cell = pruned(kind(13, 37, **options))
    sparse = srnn.sparsify(cell, kernel="cpu")
    bad_state = torch.zeros(2, 36)
    bad_state = (bad_state, bad_state) if kind is nn.LSTMCell else bad_state
    for arguments in ((torch.zeros(2, 3, 13),), (torch.zeros(2, 12),), (torch.zeros(2, 13), bad_state)):
        for module in (cell, sparse):
            with pytest.raises((ValueError, RuntimeError)) as error:
                module(*arguments)
            assert type(error.value) in (ValueError, RuntimeError)


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
def test_networks_of_cells_are_chosen_for_as_a_whole(cell):
    network = pruned(Looping(cell))
    x = torch.randn(20, 2, 12)
    sparse = srnn.sparsify(network, example=x)
    assert {use[1:3] for use in sparse.cell.decided} == {(2, 0)}
    torch.testing.assert_close(sparse(x), network(x))
    sparse.cell.decided = dict.fromkeys(sparse.cell.decided, TORCH)
    torch.testing.assert_close(sparse(x), network(x))


def test_a_compiled_network_of_cells_is_one_graph():
    network = pruned(Looping())
    sparse = torch.compile(srnn.sparsify(network, kernel="cpu"), fullgraph=True, backend="eager")
    x = torch.randn(3, 2, 12)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), network(x))


def test_files_of_older_versions_hold_cells_of_one_gate():
    network = pruned(Looping())
    packed = pack(network, {}, {})
    assert packed.matrices["cell.weight_hh"].gates == 4
    older = {name: SparseMatrix.from_dense(m.to_dense(), m.structure) for name, m in packed.matrices.items()}
    found = unpack(PackedModel({}, {}, older, packed.dense), Cpu(), into=network)
    x = torch.randn(3, 2, 12)
    torch.testing.assert_close(found(x), network(x))


def test_a_cell_is_no_chain_to_export(tmp_path):
    pytest.importorskip("onnx")
    for network in (pruned(Looping()), srnn.sparsify(pruned(Looping()), kernel="cpu")):
        with pytest.raises(UserError, match="cell is a single cell"):
            srnn.export(network, tmp_path / "model.onnx")
