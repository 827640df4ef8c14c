"""``pruning=obd``: ranking by an optimiser's second moments, and by means of its own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner


def test_obd_keeps_the_largest_by_adams_second_moments():
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    pruner = Pruner(layer, "obd", 10, optimizer, sparsity=0.75, start_itr=1, end_itr=3, freq=1)
    for _ in range(3):
        weight = layer.weight.detach().clone()  # zeros where it is pruned, so that these are the smallest
        layer.weight.grad = torch.randn(6, 8) * torch.logspace(-3, 3, 8)
        optimizer.step()
        weight = torch.where(weight != 0, layer.weight.detach(), 0.0)
        squares = optimizer.state[layer.weight]["exp_avg_sq"].clone()
        pruner.step()
    loss = weight.square() * squares.sqrt()  # h w^2, twice what the loss rises by
    assert (pruner.masks()["weight"].flatten() == (loss.flatten() >= loss.flatten().sort().values[36])).all()
    by_size = weight.abs().flatten() >= weight.abs().flatten().sort().values[36]
    assert (pruner.masks()["weight"].flatten() != by_size).any()


def test_obd_keeps_a_mean_of_its_own_beside_an_optimizer_without_one():
    torch.manual_seed(0)
    layer, twin = nn.Linear(8, 6), nn.Linear(8, 6)
    twin.load_state_dict(layer.state_dict())
    adam = torch.optim.Adam(twin.parameters(), lr=0.0)
    options = {"sparsity": 0.75, "start_itr": 5, "end_itr": 6, "freq": 1}
    plain, reference = Pruner(layer, "obd", 10, **options), Pruner(twin, "obd", 10, adam, **options)
    for _ in range(6):
        layer.weight.grad = torch.randn(6, 8) * torch.logspace(-3, 3, 8)
        twin.weight.grad = layer.weight.grad.clone()
        adam.step()
        plain.step(), reference.step()
        if plain.itr == 3:
            saved, weights = plain.state_dict(), copy.deepcopy(layer.state_dict())
            (held,) = saved["method"].values()
            before, layer = held.clone(), nn.Linear(8, 6)
            layer.load_state_dict(weights)
            plain = Pruner(layer, "obd", 10, **options)
            plain.load_state_dict(saved)
            assert torch.equal(plain.method.state_dict()["weight"], before)
    assert torch.equal(held, before), "what was saved stays as it was"
    assert not plain.method.state_dict(), "pruning is over"
    assert plain.reached()
    assert torch.equal(plain.masks()["weight"], reference.masks()["weight"])
    bare = Pruner(nn.Linear(8, 6), "obd", 10, **options)
    with pytest.raises(UserError, match="there are none of weight: call pruner"):
        bare.step()
    zeroed = nn.Linear(8, 6)
    zeroed.weight.grad = torch.zeros_like(zeroed.weight)  # by zero_grad(set_to_none=False)
    bare = Pruner(zeroed, "obd", 10, **options | {"start_itr": 1})
    with pytest.raises(UserError, match="there are none of weight: call pruner"):
        bare.step()


@pytest.mark.parametrize("fused", [False, True])
def test_obd_passes_over_a_step_that_mixed_precision_skips(fused):
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    pruner = Pruner(layers, "obd", 10, optimizer, sparsity=0.5, start_itr=8, end_itr=9)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(sum(layer(torch.ones(1, 4)).sum() for layer in layers)).backward()
        if step in (0, 2):  # a fused optimiser leaves the gradients of the others as they were scaled then
            layers[1].bias.grad[1] = torch.inf
        scaler.step(optimizer), scaler.update()
        pruner.step()
    for mean in pruner.method.state_dict().values():
        torch.testing.assert_close(mean, torch.full((4, 4), 1 - 0.999**2))


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_obd_with_branches_not_taken_sparse_gradients_and_bfloat16(adam):
    torch.manual_seed(0)
    network = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    optimizer = torch.optim.Adam(network.parameters(), 0.01) if adam else torch.optim.SGD(network.parameters(), 0.01)
    pruner = Pruner(network, "obd", 10, optimizer, sparsity=0.5, start_itr=1, end_itr=4, freq=1)
    for _ in range(5):
        optimizer.zero_grad()
        network["used"](torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert pruner.reached()
    assert pruner.sparsities()["unused.weight"] > pruner.sparsities()["used.weight"]
    embedding = nn.Embedding(20, 8, sparse=True)
    pruner = Pruner(embedding, "obd", 10, sparsity=0.5, start_itr=1, end_itr=4, freq=1)
    for _ in range(5):
        embedding(torch.tensor([1, 2])).sum().backward()
        pruner.step()
    assert pruner.masks()["weight"][1:3].all()
    layer = nn.Linear(4, 4).bfloat16()
    layer.weight.grad = torch.ones_like(layer.weight)
    pruner = Pruner(layer, "obd", 2000, sparsity=0.5, start_itr=1500, end_itr=1600)
    for _ in range(1000):
        pruner.step()
    torch.testing.assert_close(pruner.method.state_dict()["weight"], torch.full((4, 4), 1 - 0.999**1000))


def test_obd_sees_the_gradients_of_tasks_that_take_turns_and_passes_over_steps_without_any():
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.01)
    pruner = Pruner(heads, "obd", 100, optimizer, sparsity=0.5)
    for step in range(100):
        optimizer.zero_grad()
        if step % 7 != 3:  # a batch that the loop skips, as Lightning does for a training_step that returns None
            heads[step % 2](torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert all(0.4 < sparsity < 0.6 for sparsity in pruner.sparsities().values())


def test_obd_beside_sgd_prunes_a_network_of_several_dtypes():
    torch.manual_seed(0)
    network = nn.ModuleList(nn.Linear(8, 8).to(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    pruner = Pruner(network, "obd", 10, optimizer, sparsity=0.5, start_itr=1, end_itr=4, freq=1)
    for _ in range(5):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        pruner.step()
    assert pruner.reached()


def test_what_obd_ranks_by_is_rounded_as_the_roots_of_a_gpu_are():
    """To the nearest, which torch's own are not on every CPU."""
    torch.manual_seed(0)
    weight, moment = torch.randn(300, 200), torch.rand(300, 200) * torch.logspace(-44, 30, 200)
    group = Pruner(nn.Linear(200, 300), "obd", 60).groups[0]
    group.parts[0].parameter.data.copy_(weight)
    group.importance.moments = {"weight": moment}
    wanted = weight.abs().numpy() * np.sqrt(np.sqrt(moment.numpy()))
    assert np.array_equal(group.importance(group.pieces[0])[0].numpy(), wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_obd_refuses_weights_without_gradients_that_share_no_threshold(frozen):
    layers = nn.ModuleDict({"used": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    layers["other"].weight.requires_grad_(not frozen)
    options = {"scope": {"other.weight": {"sparsity": 0.4}}, "sparsity": 0.5, "start_itr": 1}
    pruner = Pruner(layers, "obd", 10, torch.optim.Adam(layers.parameters()), **options)
    layers["used"](torch.randn(4, 8)).sum().backward()
    why = "they are frozen; leave them out" if frozen else "call pruner.step"
    with pytest.raises(UserError, match=rf"there are none of other.weight: {why}.*{{\"sparsity\": 0}}"):
        pruner.step()


@pytest.mark.parametrize("decays", [(0.95, None), (0.95, 0.999), (None, 0.9)])
def test_obd_compares_means_of_other_decays_as_if_they_were_as_old(decays):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)])
    layers[1].load_state_dict(layers[0].state_dict())
    groups = zip(layers, decays, strict=True)
    optimizers = [
        torch.optim.Adam(layer.parameters(), lr=0.0, betas=(0.9, decay))
        if decay
        else torch.optim.SGD(layer.parameters(), lr=0.0)
        for layer, decay in groups
    ]
    pruner = Pruner(layers, "obd", 20, optimizers, sparsity=0.5, start_itr=5, end_itr=6, freq=1)
    gradient = torch.randn(16, 16)
    for _ in range(6):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.weight.grad = gradient.clone()
            optimizer.step()
        pruner.step()
    first, second = pruner.masks().values()
    assert int((first != second).sum()) <= 1, "the same weights and gradients, so the same masks"


def test_obd_beside_sgd_takes_float64_and_complex_gradients():
    layer = nn.Linear(8, 8).double()
    filters = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    optimizer = torch.optim.SGD([*layer.parameters(), filters], lr=0.01)
    pruner = Pruner(layer, "obd", 10, optimizer, sparsity=0.5, start_itr=1, end_itr=3, freq=1)
    for _ in range(4):
        optimizer.zero_grad()
        (layer(torch.randn(4, 8).double()).square().sum() + filters.abs().sum()).backward()
        optimizer.step(), pruner.step()
    assert pruner.reached()


@pytest.mark.parametrize("start_itr", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_obd_says_that_no_step_had_finite_gradients(where, bad, start_itr):
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters())  # which a scaler, say, steps only where gradients are finite
    pruner = Pruner(layer, "obd", 20, optimizer, sparsity=0.5, start_itr=start_itr, end_itr=15)

    def train():
        for _ in range(10):
            for name, parameter in layer.named_parameters():
                parameter.grad = torch.full_like(parameter, bad if name == where else 1.0)
            pruner.step()

    with pytest.raises(UserError, match=r"obd ranks weight by .* no step so far had any that were all finite"):
        train()
