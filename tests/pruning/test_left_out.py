"""Matrices that cannot be pruned are named, whatever stands in their place."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from srnn import Pruner, UserError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(16, 32), nn.Linear(32, 16)

    def forward(self, x_TBI):
        return self.out(self.rnn(x_TBI)[0])


def train(model, pruner, optimizer):
    for _ in range(pruner.run.total_steps):
        x_TBI = torch.randn(6, 2, 16)
        (model(x_TBI) - x_TBI).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finalize()


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights_are_named(norm):
    model = Net()
    getattr(parametrizations, norm)(model.rnn, "weight_hh_l0")
    getattr(parametrizations, norm)(model.out)
    with pytest.warns(UserWarning, match="leaves 2 matrices dense") as said:
        pruner = Pruner(model, "cubic", 20, sparsity=0.9)
    words = str(said[0].message)
    assert "rnn.weight_hh_l0 is parametrised (" in words
    assert "out.weight is parametrised (" in words
    assert "remove_parametrizations(layer, 'weight')" in words
    assert set(pruner.masks()) == {"rnn.weight_ih_l0"}
    for layer, name in ((model.rnn, "weight_hh_l0"), (model.out, "weight")):  # the advice helps
        nn.utils.parametrize.remove_parametrizations(layer, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Pruner(model, "cubic", 20, sparsity=0.9).masks()) == 3


def test_what_a_pattern_names_inside_a_parametrisation_is_not_left_out():
    torch.manual_seed(0)
    model = Net()
    parametrizations.spectral_norm(model.out)
    optimizer = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scope = {"out.parametrizations.weight.original": {"sparsity": 0.75}}
        pruner = Pruner(model, "cubic", 40, optimizer, sparsity=0.75, scope=scope)
        train(model, pruner, optimizer)
    assert float((model.out.weight == 0).float().mean()) == 0.75


def test_layers_that_are_not_chosen_are_not_named():
    model = Net()
    parametrizations.weight_norm(model.out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model, "cubic", 20, layer_types=["recurrent"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_the_old_weight_norm_is_named_and_left_alone():
    model = Net()
    nn.utils.weight_norm(model.rnn, "weight_hh_l0")
    nn.utils.weight_norm(model.out)
    with pytest.warns(UserWarning, match=r"rnn\.weight_hh_l0 is under weight norm: .*; out\.weight is under"):
        pruner = Pruner(model, "cubic", 20, sparsity=0.9)
    assert set(pruner.masks()) == {"rnn.weight_ih_l0"}, "neither lengths nor directions"


def test_zeros_reach_the_weight_in_use_under_torchs_pruning_and_old_spectral_norm():
    torch.manual_seed(0)
    model = Net()
    prune.random_unstructured(model.out, "weight", 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(model.rnn, "weight_hh_l0")
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, "cubic", 40, optimizer, sparsity=0.75, share="matrix")
    assert set(pruner.masks()) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0_orig", "out.weight_orig"}
    train(model, pruner, optimizer)
    model.eval()
    model(torch.randn(2, 1, 16))
    assert float((model.rnn.weight_hh_l0 == 0).float().mean()) == 0.75
    assert float((model.out.weight == 0).float().mean()) >= 0.75


def test_lazy_layers_have_to_be_built_first():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"0\.weight has no shape yet.* run the model on a batch"):
        Pruner(model, "cubic", 20)
    model(torch.randn(2, 4))
    assert set(Pruner(model, "cubic", 20).masks()) == {"0.weight", "1.weight"}


def test_weights_on_the_meta_device_have_to_get_values_first():
    with torch.device("meta"):
        model = nn.GRU(4, 8)
    with pytest.raises(UserError, match=r"weight_ih_l0 has no values yet.* model\.to_empty"):
        Pruner(model, "cubic", 20)
    assert Pruner(model.to_empty(device="cpu"), "cubic", 20).masks()


def test_a_weight_of_integers_or_no_parameter_at_all_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    fixed = model[1].weight.detach()
    del model[1].weight
    model[1].register_buffer("weight", fixed)
    words = r"0\.weight is of torch\.int8: .*; 1\.weight is no parameter"
    with pytest.warns(UserWarning, match=words):
        assert set(Pruner(model, "cubic", 20).masks()) == {"2.weight"}
