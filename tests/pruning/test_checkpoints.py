"""Going on from a checkpoint is bitwise going through, for every method in every phase; and what a checkpoint costs."""

import copy
import io

import pytest
import torch
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner, RunLength, prune
from srnn.registry import register
from srnn.registry.plugins import plugin_folders
from tests.pruning.test_zero import METHODS, OPTIMIZERS, Net, method_of, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # torch's own
    pytest.mark.filterwarnings("ignore:pruning left no weight of"),  # gates of a few weights
]
STEPS = 60
STOPS = (5, 15, 24, 46)  # dense, at the cut of `hard`, between updates, after the last one
MORE = {
    "cubic 2:4": {"name": "cubic", "structure": "2:4", "sparsity": 0.5},
    "gradual soft": {"name": "gradual", "soft": True, "scope": {"gru.weight_hh_l0[z]": {"sparsity": 0.9}}},
    "rigl averaged": {"name": "rigl", "grow": "random"},
    "lottery": {"name": "lottery"},
    "none": {"name": "none"},
}


def options(name):
    return MORE.get(name) or method_of(name)


def start(name, model):
    optimizer = OPTIMIZERS["adam"](model.parameters(), 0.01)
    return optimizer, Pruner(model, options(name), RunLength(STEPS, 6), optimizer)


@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_stopped_and_resumed_is_bitwise_the_whole_run(name):
    check_resuming(name, STOPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *MORE])
def test_stopped_anywhere(name):
    check_resuming(name, range(1, STEPS + 1, 5))  # at each place of an epoch of six steps


def check_resuming(name, stops):
    register.load_plugins(plugin_folders())
    torch.manual_seed(3)
    model = Net()
    optimizer, pruner = start(name, model)
    files = {}

    def save():
        """At each step: to ask for its state masks, and must change nothing, as those that go on ask no more."""
        state = (model.state_dict(), optimizer.state_dict(), pruner.state_dict(), torch.get_rng_state())
        if pruner.itr in stops:
            torch.save(state, files.setdefault(pruner.itr, io.BytesIO()))

    train(model, optimizer, pruner, STEPS, after=save)
    pruner.finalize()
    for itr, file in files.items():
        file.seek(0)
        weights, of_optimizer, of_pruner, random = torch.load(file, weights_only=True)
        again = Net()
        again.load_state_dict(weights)
        optimizer, resumed = start(name, again)
        optimizer.load_state_dict(of_optimizer)
        resumed.load_state_dict(of_pruner)
        torch.set_rng_state(random)
        train(again, optimizer, resumed, STEPS - itr)
        resumed.finalize()
        for key, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], weight), (itr, key)
        for key, mask in pruner.masks().items():
            assert torch.equal(resumed.masks()[key], mask), (itr, key)
        assert resumed.thresholds == pruner.thresholds, itr
        rows = [[vars(row) for row in one.report()] for one in (pruner, resumed)]
        assert rows[0] == rows[1], itr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_was_written_behind_torchs_back_is_not_saved(device):
    """On a GPU a step looks through one parameter, in turn; nothing counts what is written to ``data``."""
    torch.manual_seed(0)
    model = nn.GRU(9, 11, 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, "hard", 90, optimizer, sparsity=0.8, prune_itr=1)
    for step in range(24):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 9, device=device))[0].square().mean().backward()
        optimizer.step()
        pruner.step()
        if step >= 12:
            name = list(pruner.masks())[step % 4]
            model.get_parameter(name).data += 1
            weights, _ = model.state_dict(), pruner.state_dict()
            assert not any(weights[name][~mask].any() for name, mask in pruner.masks().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_grows_by_a_bit_a_weight(name):
    model = nn.GRU(128, 256)
    pruner = Pruner(model, options(name), 100, torch.optim.SGD(model.parameters(), lr=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(60):
        pruner.step()
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    fp32_bytes = sum(4 * part.size for part in pruner.parts)
    assert len(file.getvalue()) <= fp32_bytes / 32 + 64 * 1024


@pytest.mark.parametrize("order", ["weights first", "pruner built first", "pruner's state first"])
def test_going_on_is_the_same_in_any_order(order):
    """The first masks of ``rigl`` take weights at once, of whoever resumes, too: they are of no more than its own."""
    model = nn.Linear(20, 10)
    pruner = Pruner(model, "rigl", 100)
    first = pruner.masks()["weight"].clone()
    while torch.equal(first, pruner.masks()["weight"]):
        model.weight.grad = torch.randn(10, 20)
        pruner.step()
    with torch.no_grad():
        model.weight[pruner.masks()["weight"]] += 1  # what has grown, too
    trained, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    again = nn.Linear(20, 10)
    if order == "weights first":
        again.load_state_dict(trained)
    resumed = Pruner(again, "rigl", 100)
    if order == "weights first":
        assert not torch.equal(again.weight, trained["weight"]), "other first masks"
    if order == "pruner built first":
        again.load_state_dict(trained)
    resumed.load_state_dict(state)
    if order == "pruner's state first":
        again.load_state_dict(trained)
    assert torch.equal(again.weight, trained["weight"])
    resumed.finalize()
    assert torch.equal(again.weight, trained["weight"])


@pytest.mark.parametrize("method", ["rigl", "fixed"])
def test_weights_are_those_of_the_masks_that_are_loaded(method):
    """Of methods that begin with masks, before the first step; ``fixed`` takes them from the weights."""
    models = [nn.GRU(6, 16), nn.GRU(6, 16)]
    for model in models:
        prune(model, sparsity=0.5, layer_types=["recurrent"])
    first, second = (Pruner(model, method, 100) for model in models)
    with torch.no_grad():
        models[1].weight_hh_l0.fill_(1.0)
    second.load_state_dict(first.state_dict())
    for name, mask in second.masks().items():
        weight = models[1].get_parameter(name)
        assert not weight[~mask].any(), name
        assert mask.equal(first.masks()[name])
    assert models[1].weight_hh_l0.any(), "what is kept stays"


def test_what_diverged_before_a_state_was_loaded_is_over():
    """A GPU tells at one of the next steps that weights could not be ranked; they are others by then."""
    pruner = Pruner(nn.GRU(8, 8), "cubic", STEPS)
    state = pruner.state_dict()
    pruner.step()
    pruner.groups[0]._gpu_cut.note_unrankable(torch.tensor([torch.nan]))
    pruner.load_state_dict(state)
    pruner.groups[0]._gpu_cut.note_unrankable(torch.ones(1))
    pruner.step()


def test_a_state_of_other_settings_is_refused():
    state = Pruner(nn.Linear(20, 10), "cubic", 100, sparsity=0.9).state_dict()
    for options, words in (
        ({"sparsity": 0.8}, r"sparsity was 0\.9 and is 0\.8\."),
        ({"sparsity": 0.9, "structure": "2x1"}, r"structure was 'element' and is '2x1'\."),
    ):
        with pytest.raises(UserError, match=f"belongs to other settings: {words}$"):
            Pruner(nn.Linear(20, 10), "cubic", 100, **options).load_state_dict(state)
    with pytest.raises(UserError, match=r"settings: method was Cubic and is Gradual, initial_sparsity was 0\.0 and"):
        Pruner(nn.Linear(20, 10), "gradual", 100, start_itr=1, ramp_itr=50, end_itr=90).load_state_dict(state)


def test_optimizers_are_looked_at():
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5))
    for wrong in ("adam", ["adam"]):
        with pytest.raises(UserError, match="optimizer='adam' must be a torch optimizer"):
            Pruner(model, "cubic", 100, wrong)
    one, other = (torch.optim.SGD(part.parameters(), 0.1) for part in model)
    with pytest.warns(UserWarning, match="no optimizer given to the Pruner updates 1.weight"):
        Pruner(model, "cubic", 100, one)
    Pruner(model, "cubic", 100, [one, other])
