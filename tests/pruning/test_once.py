"""``srnn.prune``: a trained network is pruned once, in place."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import srnn
from srnn import Pruner, UserError
from srnn.pruning import Hard


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(40, 32), nn.LSTM(32, 64, num_layers=2)
        self.conv, self.out = nn.Conv1d(64, 64, 3), nn.Linear(64, 40)


def share_of(weight):
    return float((weight == 0).double().mean())


def test_the_smallest_weights_of_each_type_go_and_all_else_stays():
    model = Net()
    before = copy.deepcopy(model)
    identities = [id(parameter) for parameter in model.parameters()]
    report = srnn.prune(model, sparsity=0.8)
    assert [id(parameter) for parameter in model.parameters()] == identities
    recurrent = torch.cat([p.flatten() for n, p in model.rnn.named_parameters() if n.startswith("weight")])
    was = torch.cat([p.flatten() for n, p in before.rnn.named_parameters() if n.startswith("weight")])
    assert int((recurrent == 0).sum()) == round(0.8 * len(was))
    assert was[recurrent == 0].abs().max() <= was[recurrent != 0].abs().min()
    assert torch.equal(recurrent[recurrent != 0], was[recurrent != 0])
    assert torch.equal(model.conv.weight, before.conv.weight)
    assert torch.equal(model.rnn.bias_hh_l0, before.rnn.bias_hh_l0)
    assert report.sparsity == pytest.approx(0.8, abs=1e-4)
    assert sum(row.zeros for row in report.rows) == sum(int((p == 0).sum()) for p in model.parameters())
    assert report.left_out == {"conv.weight": "is of type convolution, which is not in layer_types"}


@pytest.mark.parametrize("structure", ["element", "16x1", "4x4", "8x1", "2:4", "1:4"])
@pytest.mark.parametrize("share", ["layer_type", "matrix", "global"])
def test_every_structure_is_met_to_half_a_block(structure, share):
    model = Net()
    keep, colon, of = structure.partition(":")
    sparsity = 1 - int(keep) / int(of) if colon else 0.9
    report = srnn.prune(model, sparsity, structure, share)
    assert report.sparsity == pytest.approx(sparsity, abs=0.002)
    pruned = {row.parameter for row in report.rows}
    assert len(pruned) == 6
    for name in pruned:
        weight = model.get_parameter(name)
        if share == "matrix":
            assert share_of(weight) == pytest.approx(sparsity, abs=0.01), name
        if structure == "2:4":
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all(), name
    # The same masks as those of the method that it is.
    again = Net()
    again.load_state_dict(model.state_dict())
    srnn.prune(again, sparsity, structure, share)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in again.named_parameters())


def test_a_scope_leaves_out_by_matrix_and_gate_and_the_report_says_so():
    model = Net()
    scope = {"out.*": {"sparsity": 0}, "rnn.weight_hh_l0[fo]": {"sparsity": 0}, "conv.weight": {"sparsity": 0.5}}
    report = srnn.prune(model, 0.75, scope=scope)
    assert report.left_out == dict.fromkeys(["out.weight", "rnn.weight_hh_l0[fo]"], "has sparsity 0 in scope")
    assert share_of(model.out.weight) == 0
    assert share_of(model.conv.weight) == 0.5
    gates = {row.gate: row.sparsity for row in report.rows if row.parameter == "rnn.weight_hh_l0"}
    assert gates.keys() == {"i", "g"}
    assert "rnn.weight_hh_l0[fo] has sparsity 0 in scope" in str(report) == repr(report)
    assert "  conv.weight: 50.00 % (element)" in str(report)


def test_frozen_and_parametrised_weights_are_left_out_with_the_pruners_words():
    model = Net()
    model.embedding.weight.requires_grad_(False)
    parametrizations.weight_norm(model.out)
    with pytest.warns(UserWarning, match="dense") as said:
        report = srnn.prune(model, 0.5)
    told = " ".join(str(warning.message) for warning in said)
    assert "embedding.weight dense, also if they are trained later: they are frozen (requires_grad=False)" in told
    assert report.left_out["embedding.weight"] == "is frozen (requires_grad=False)"
    assert f"out.weight {report.left_out['out.weight']}" in told
    assert set(report.left_out) == {"embedding.weight", "out.weight", "conv.weight"}
    assert share_of(model.embedding.weight) == 0
    report = srnn.prune(model, 0.5, scope={"embedding.*": {"sparsity": 0.5}}, layer_types=["recurrent"])
    assert share_of(model.embedding.weight) == 0.5
    assert "embedding.weight" not in report.left_out


def test_training_on_keeps_the_zeros_with_fixed():
    model = nn.GRU(16, 32)
    srnn.prune(model, 0.9, "4x1")
    zeros = {name: weight == 0 for name, weight in model.named_parameters() if weight.ndim == 2}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = Pruner(model, "fixed", 3, optimizer)
    for _ in range(3):
        model(torch.randn(4, 2, 16))[0].square().mean().backward()
        optimizer.step()
        pruner.step()
    assert all(torch.equal(model.get_parameter(name) == 0, was) for name, was in zeros.items())


def test_a_network_that_is_sparser_already_is_told_once_before_anything_is_done():
    model = Net()
    srnn.prune(model, 0.9, layer_types=["recurrent", "linear"])
    before = copy.deepcopy(model.state_dict())
    srnn.prune(model, 0.9, layer_types=["recurrent", "linear"])
    words = r"of recurrent weights \(90\.00 %, 70\.00 % asked for\), linear weights \(90\.\d\d %, .* is pruned\."
    method = Hard(sparsity=0.7, prune_itr=0, layer_types=["recurrent", "linear"])
    with pytest.warns(UserWarning, match=words):
        Pruner(model, method, 1)
    Pruner(model, method, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_blocks_of_single_zeros_are_pruned_without_that_word():
    model = nn.Linear(64, 64)
    srnn.prune(model, 0.8)
    srnn.prune(model, 0.5, "16x1")
    assert share_of(model.weight) > 0.8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, r"pruning\.sparsity=1\.0 must be above 0 and below 1"),
        ({"sparsity": 0.0}, r"pruning\.sparsity=0\.0 must be above 0 and below 1"),
        ({"sparsity": 90}, r"pruning\.sparsity=90"),
        ({"sparsity": 0.9, "structure": "2:4"}, r"set pruning\.sparsity=0\.5"),
        ({"structure": "fine"}, "structure='?fine"),
        ({"share": "layer"}, r"pruning\.share='layer' .*layer_type"),
        ({"layer_types": ["convolution", "attention"]}, r"pruning\.layer_types"),
        ({"scope": {"decoder.*": {"sparsity": 0.5}}}, r'"decoder\.\*" matches no weight'),
        ({"score": "median"}, r"pruning\.score='median'"),
        ({"regrow": True}, r"regrow"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_touched(options, words):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=words):
        srnn.prune(model, **options)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_networks_that_cannot_be_pruned_are_refused():
    with pytest.raises(UserError, match="has no weights of these types to prune"):
        srnn.prune(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    with pytest.raises(UserError, match=r"1\.weight has no shape yet.*run the model on a batch"):
        srnn.prune(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4)))
    with pytest.raises(UserError, match="model='gru' must be a torch module"):
        srnn.prune("gru")
    broken = Net()
    before = broken.out.weight.clone()
    broken.rnn.weight_hh_l1.data[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"rnn\.weight_hh_l1 holds weights that are NaN or infinite"):
        srnn.prune(broken)
    assert torch.equal(broken.out.weight, before)


def test_compiled_and_wrapped_networks_and_other_floats_are_pruned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = nn.DataParallel(nn.GRU(16, 32))
        assert srnn.prune(wrapped, 0.5).rows[0].parameter == "weight_ih_l0"
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            model = nn.Linear(32, 32).to(dtype)
            srnn.prune(model, 0.75)
            assert share_of(model.weight) == 0.75


@pytest.mark.parametrize("score", ["mean", "energy"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_blocks_of_16_bit_networks_are_ranked_as_exactly_as_others(kind, score):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data.mul_(1e-3)  # squares of these are zero in fp16
    narrow = copy.deepcopy(layer).to(kind)
    exact = copy.deepcopy(narrow).double()
    for network in (narrow, exact):
        srnn.prune(network, 0.75, "4x1", score=score)
    assert torch.equal(narrow.weight == 0, exact.weight == 0)
