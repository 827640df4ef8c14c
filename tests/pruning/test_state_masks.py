"""State of pruned weights is zero after every step, whatever a loop does; it is masked only where it has to be."""

import pytest
import torch
from torch import nn

from srnn.pruning import Pruner
from srnn.pruning.state_masks import state_beside

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True, foreach=True),
    "fused adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.1),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),  # whose largest gradient is never zero
}


def noise(model, pruner):
    for parameter in model.parameters():
        parameter.grad += torch.randn_like(parameter)


def by_hand(model, pruner):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def add_one(parameter):
    parameter.grad += 1


def a_later_hook(model, pruner):
    if not hasattr(model, "hooked"):
        model.hooked = True
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(add_one)


def clip(model, pruner):
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def train(optimizer, change=lambda model, pruner: None, since=0, method="gradual", steps=40, each=None, **options):
    torch.manual_seed(0)
    model = nn.GRU(7, 9)
    made = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, method, 60, made, sparsity=0.8, **options)
    for step in range(steps):
        made.zero_grad()
        model(torch.randn(5, 3, 7))[0].square().mean().backward()
        if step >= since:
            change(model, pruner)
        made.step()
        masks = {name: mask.clone() for name, mask in pruner.masks().items()}  # an update's act from the next step on
        pruner.step()
        if each is not None and pruner.itr > max(1, pruner.method.dense_until):
            each(model, pruner, made, masks)
    return pruner


def state_is_zero(model, pruner, optimizer, masks):
    for name, parameter in model.named_parameters():
        if name in masks:
            assert (parameter[~masks[name]] == 0).all()
            assert all((state[~masks[name]] == 0).all() for state in state_beside([optimizer], parameter))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", [clip, noise, by_hand, a_later_hook])
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_state_is_zero_after_every_step(optimizer, change):
    pruner = train(optimizer, change, each=state_is_zero)
    assert 0.3 < pruner.sparsity < 0.95
    assert pruner._masker.state_on_cpu.leaks == (change is not clip or optimizer == "adamax")


def test_a_loop_that_turns_noisy_is_found_out():
    """At once where it does at the step after an update; else when it is the tensor's turn, for good from then on."""
    told = []

    def look(model, pruner, optimizer, masks):
        told.append(pruner._masker.state_on_cpu.leaks)
        if told[-1]:
            state_is_zero(model, pruner, optimizer, masks)

    train("adam", noise, since=30, method="hard", prune_itr=5, each=look)
    assert not any(told[:20])
    assert told[-1]
    assert told.index(True) <= 25 + 6, "two matrices with three tensors each"


def test_lbfgs_and_no_optimizer_have_no_such_state():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    pruner = Pruner(model, "hard", 10, optimizer, sparsity=0.6, prune_itr=1)
    x = torch.randn(8, 6)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5]).square().mean()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        pruner.step()
        assert pruner.itr < 2 or (model.weight[~pruner.masks()["weight"]] == 0).all()


def test_loaded_state_is_masked_at_the_next_step():
    torch.manual_seed(0)
    model = nn.GRU(7, 9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, "hard", 60, optimizer, sparsity=0.8, prune_itr=2)
    for _ in range(9):
        model(torch.randn(5, 3, 7))[0].square().mean().backward()
        optimizer.step()
        pruner.step()
    for parameter in model.parameters():
        for value in state_beside([optimizer], parameter):
            value += 1
    pruner.load_state_dict(pruner.state_dict())
    pruner.step()
    state_is_zero(model, pruner, optimizer, pruner.masks())
    assert not pruner._masker.state_on_cpu.leaks
