"""What sparsify replaced and what not, and why."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import srnn
from srnn.errors import UserError
from tests.inference.test_sparsify import Network, pruned


class MyGRU(nn.GRU):
    pass


def test_what_was_replaced_is_said():
    network = pruned(Network())
    torch.nn.init.normal_(network.head.weight)
    sparse = srnn.sparsify(network, kernel="csr")
    report = (
        "sparse: embedding (Embedding), rnn (LSTM)\n"
        "left dense: head (has too few zeros to be smaller in a sparse format)"
    )
    assert sparse.sparsify_report == report
    for one in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert all(line in repr(one) for line in report.splitlines())
    assert "left dense" not in repr(srnn.desparsify(sparse))
    layer = srnn.sparsify(pruned(nn.GRU(8, 8)), kernel="csr")
    assert "gru, 8, 8" in repr(layer)
    assert "  sparse: GRU\n" in repr(layer)


def normed():
    linear = pruned(nn.Linear(32, 32))
    return parametrizations.weight_norm(linear)


def with_forward():
    linear = pruned(nn.Linear(32, 32))
    linear.forward = lambda x: x
    return linear


def with_more():
    linear = pruned(nn.Linear(32, 32))
    linear.register_buffer("scale", torch.ones(1))
    return linear


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MyGRU(16, 64), "layer is a MyGRU, which is derived from GRU: only torch's own classes"),
        (lambda: nn.Embedding(50, 16, max_norm=1.0), "layer has max_norm"),
        (lambda: nn.Bilinear(16, 16, 1), None),
        (normed, "layer is parametrised: call torch.nn.utils.parametrize.remove_parametrizations"),
        (with_forward, "layer has a forward of its own"),
        (with_more, "layer holds more than torch's layer does: scale"),
    ],
)
def test_what_is_pruned_and_left_dense_is_named(make, said):
    model = nn.ModuleDict({"layer": pruned(make()), "other": pruned(nn.GRU(16, 64))}).eval()
    if said is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            srnn.sparsify(model, kernel="csr")
        return
    with pytest.warns(UserWarning, match=f"sparsify left dense, though pruned: {said}"):
        sparse = srnn.sparsify(model, kernel="csr")
    assert type(sparse["layer"]) is type(model["layer"])
    assert said.removeprefix("layer ") in sparse.sparsify_report


@pytest.mark.parametrize("kind", [nn.Linear, nn.GRU])
def test_masks_of_torch_are_taken(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(32, 32)).eval()
    for name in [name for name, weight in model[0].named_parameters() if weight.ndim == 2]:
        prune.l1_unstructured(model[0], name, 0.5)
        prune.l1_unstructured(model[0], name, 0.8)
    model[0].register_forward_hook(lambda layer, x, y: y)
    x = torch.randn(3, 32)
    with torch.no_grad():
        wanted = model(x)
    sparse = srnn.sparsify(model, kernel="csr")
    assert type(sparse[0]) is not kind
    got = sparse(x)
    got, wanted = (got, wanted) if kind is nn.Linear else (got[0], wanted[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert [prune.is_pruned(m) for m in (model, sparse)] == [True, False]
    dense = srnn.desparsify(sparse)(x)
    torch.testing.assert_close(dense if kind is nn.Linear else dense[0], wanted, rtol=1e-5, atol=1e-6)


def test_what_is_sparse_already_and_layers_without_matrices_are_named():
    sparse = srnn.sparsify(pruned(nn.GRU(16, 32)), kernel="csr")
    with pytest.warns(UserWarning, match=r"left GRU|left SparseRecurrent.* as is, on the kernel it has.*desparsify"):
        again = srnn.sparsify(sparse, kernel="cpu")
    assert "sparse before" in repr(again)
    for layer in (nn.Conv1d(8, 8, 3), nn.Bilinear(8, 8, 8)):
        with pytest.warns(UserWarning, match=f"replaced nothing: {type(layer).__name__} is a .*no sparse counterpart"):
            srnn.sparsify(layer)


def test_float64_is_named_when_it_is_packed_and_when_it_is_run():
    with pytest.warns(UserWarning, match=r"float64 weights of GRU in fp32 at most.*x\.float\(\)"):
        sparse = srnn.sparsify(pruned(nn.GRU(16, 32)).double(), kernel="cpu")
    with pytest.raises(UserError, match=r"not torch\.float64: give it x\.float\(\)"):
        sparse(torch.zeros(3, 1, 16, dtype=torch.float64))
