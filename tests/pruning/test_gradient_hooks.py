"""Gradients of pruned weights are zero before clipping, or anything else, looks at them."""

import copy
import gc
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from srnn.errors import UserError
from srnn.pruning import Pruner


def small(seed=0):
    torch.manual_seed(seed)
    return nn.GRU(7, 9).double()


def loss_of(model, seed):
    x_TBI = torch.randn(5, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return model(x_TBI)[0].square().mean()


def zeros(parameter):
    return float((parameter.grad == 0).double().mean())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_norm_is_that_of_masking_in_the_forward_pass(accumulate):
    model = small()
    pruner = Pruner(model, "hard", 10, sparsity=0.8, prune_itr=1)
    pruner.step()
    pruner.step()  # as Algorithm 1 is printed, masks act on weights from the next step on
    masks, other = pruner.masks(), small()
    for seed in range(accumulate):
        loss_of(model, seed).backward()
        # As tools do that mask in the forward pass: gradients are zero by the chain rule.
        masked = {name: parameter * masks.get(name, 1) for name, parameter in other.named_parameters()}
        loss_of(partial(functional_call, other, masked), seed).backward()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-15)
    assert 0.7 < zeros(model.weight_hh_l0) < 0.9
    norm, other_norm = (clip_grad_norm_(each.parameters(), 1e-3) for each in (model, other))
    torch.testing.assert_close(norm, other_norm, rtol=1e-12, atol=0)


def test_where_no_clip_binds_training_is_bitwise_what_it_was():
    weights = []
    for masked in (True, False):
        model = small()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pruner = Pruner(model, "gradual", 40, optimizer, sparsity=0.8)
        if not masked:
            pruner._gradient_hooks.remove()
            pruner._checked = True
            pruner._gradient_hooks.attach = lambda parameters: None
        for seed in range(40):
            loss_of(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [
        ("gradual", {}, 0.8),
        ("gradual", {"soft": True}, 0.0),  # until the end of pruning, weights may come back
        ("rigl", {"density": "uniform", "freq": 10}, 0.8),
        ("random", {}, 0.8),
    ],
)
def test_which_gradients_are_masked(method, options, share):
    model = small()
    pruner = Pruner(model, method, 100, sparsity=0.8, **options)
    for _ in range(48):  # the step after these is no update
        model.zero_grad()
        loss_of(model, 0).backward()
        pruner.step()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert zeros(model.weight_hh_l0) == pytest.approx(pruner.sparsities()["weight_hh_l0"] if share else 0, abs=1e-9)
    assert (zeros(model.weight_hh_l0) > 0.3) == (share > 0)


def test_rigl_sees_the_dense_gradient_where_it_regrows():
    model = small()
    pruner = Pruner(model, "rigl", 100, sparsity=0.8, freq=10, end_itr=60)
    shares = []
    for _ in range(20):
        model.zero_grad()
        loss_of(model, 0).backward()
        shares.append(zeros(model.weight_hh_l0))
        pruner.step()
    assert [itr + 1 for itr, share in enumerate(shares) if share == 0] == [10, 20]


def test_soft_masks_gradients_once_nothing_comes_back():
    model = small()
    pruner = Pruner(model, "gradual", 40, sparsity=0.8, soft=True)
    for seed in range(40):
        model.zero_grad()
        loss_of(model, seed).backward()
        pruner.step()
    model.zero_grad()
    loss_of(model, 0).backward()
    assert zeros(model.weight_hh_l0) == pytest.approx(pruner.sparsities()["weight_hh_l0"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_mask_their_own(copied):
    model = small()
    pruner = Pruner(model, "hard", 10, sparsity=0.8, prune_itr=1)
    pruner.step()
    if copied == "deepcopy":
        model, pruner = copy.deepcopy((model, pruner))
    elif copied == "pickle":
        model, pruner = pickle.loads(pickle.dumps((model, pruner)))
    else:
        file = io.BytesIO()
        torch.save((model, pruner), file)
        file.seek(0)
        model, pruner = torch.load(file, weights_only=False)
    pruner.step()
    loss_of(model, 0).backward()
    assert zeros(model.weight_hh_l0) == pytest.approx(0.8, abs=0.05)


def test_hooks_end_with_the_pruner():
    for end in (lambda pruner: pruner.finalize(), lambda pruner: None):
        model = small()
        pruner = Pruner(model, "hard", 10, sparsity=0.8, prune_itr=1)
        pruner.step()
        end(pruner)
        del pruner
        gc.collect()
        loss_of(model, 0).backward()
        assert zeros(model.weight_hh_l0) == 0


def test_a_matrix_that_is_trained_later_is_masked_then():
    model = small()
    model.weight_hh_l0.requires_grad_(False)
    pruner = Pruner(model, "hard", 300, sparsity=0.8, prune_itr=1, scope={"weight_hh_l0": {"sparsity": 0.7}})
    pruner.step()
    model.weight_hh_l0.requires_grad_(True)
    for _ in range(100):
        pruner.step()
    loss_of(model, 0).backward()
    assert zeros(model.weight_hh_l0) == pytest.approx(pruner.sparsities().get("weight_hh_l0", 0.0), abs=0.01)


def test_sparse_gradients_of_embeddings():
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 6, sparse=True)
    pruner = Pruner(embedding, "hard", 10, sparsity=0.5, prune_itr=1)
    pruner.step()
    embedding(torch.tensor([3, 3, 10, 0])).square().sum().backward()
    weight = embedding.weight
    assert weight.grad.is_sparse
    assert not bool((weight.grad.to_dense() != 0)[~pruner.masks()["weight"]].any())
    assert bool((weight.grad.to_dense() != 0).any())


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_on_a_gpu_all_are_masked_when_the_backward_pass_ends(reentrant):
    """As on a CPU: in eager passes, whose gradients move in memory, with a sparse gradient, and after a failed pass."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(50, 24, sparse=True), nn.GRU(24, 64, 2), nn.Linear(64, 50)]).cuda()
    pruner = Pruner(model, "hard", 10, sparsity=0.8, prune_itr=1)
    pruner.step()
    pruner.step()
    embedding, rnn, linear = model
    for turn in range(8):
        tokens = torch.randint(50, (6, 3), device="cuda")
        x = embedding(tokens)
        y = checkpoint(lambda x: rnn(x)[0], x, use_reentrant=True) if reentrant else rnn(x)[0]
        if turn == 3:
            y.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                linear(y).square().mean().backward()
            model.zero_grad()
            continue
        linear(y).square().mean().backward()
        for name, mask in pruner.masks().items():
            gradient = model.get_parameter(name).grad
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            assert (gradient[~mask] == 0).all()
            assert (gradient[mask] != 0).any()
        kept = [torch.empty(turn * 1000, device="cuda")]  # so that memory is dealt out otherwise
        model.zero_grad()
    del kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_model_that_is_cast_while_it_is_pruned(optimizer, dtype):
    layer = nn.GRU(8, 16)
    adam = optimizer(layer.parameters(), lr=0.001)
    pruner = Pruner(layer, "cubic", 12, adam, sparsity=0.75, start_itr=2, end_itr=10, freq=1)
    for step in range(12):
        if step == 5:
            layer.to(dtype)
        x_TBI = torch.randn(3, 2, 8, dtype=dtype if step >= 5 else torch.float32)
        loss, now = layer(x_TBI)[0].square().mean(), str(dtype).removeprefix("torch.")
        if step == 5 and optimizer is not torch.optim.SGD:  # which computes with state of another dtype
            with pytest.raises(UserError, match=rf"was float32 when .* is {now} now, .* {optimizer.__name__} keeps"):
                loss.backward(retain_graph=True)
            adam.load_state_dict(adam.state_dict())
        adam.zero_grad()
        loss.backward()
        adam.step()
        pruner.step()
    pruner.finalize()
    assert pruner.reached()
    assert all(
        (weight[~pruner.masks()[name]] == 0).all()
        for name, weight in layer.named_parameters()
        if name in pruner.masks()
    )


@pytest.mark.parametrize("cast_state", [False, True])
def test_adam_is_told_that_it_divides_by_zero_in_fp16(cast_state):
    """Its state of a pruned weight is zero, and so is its eps there: 0 / 0."""
    layer = nn.GRU(8, 8)
    optimizer = torch.optim.Adam(layer.parameters())
    pruner = Pruner(layer, "cubic", 20, optimizer)
    for step in range(6):
        if step == 5:
            layer.half()
            if cast_state:
                optimizer.load_state_dict(optimizer.state_dict())
        loss = layer(torch.randn(3, 2, 8, dtype=layer.weight_hh_l0.dtype))[0].square().mean()
        if step == 5:
            with pytest.raises(UserError, match=r"is float16 now, in which Adam's eps=1e-08 is 0: .* torch\.autocast"):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
            pruner.step()
    assert all(weight.isfinite().all() for weight in layer.parameters())


@pytest.mark.parametrize(("kind", "eps"), [(torch.optim.Adam, 1e-4), (torch.optim.Adafactor, (None, 1e-3))])
def test_a_larger_eps_trains_in_fp16(kind, eps):
    layer = nn.GRU(8, 8)
    optimizer = kind(layer.parameters(), eps=eps)
    pruner = Pruner(layer, "cubic", 20, optimizer)
    for step in range(20):
        if step == 5:
            layer.half()
            optimizer.load_state_dict(optimizer.state_dict())
        layer(torch.randn(3, 2, 8, dtype=layer.weight_hh_l0.dtype))[0].square().mean().backward()
        optimizer.step()
        pruner.step()
    assert all(weight.isfinite().all() for weight in layer.parameters())


def test_weights_that_diverge_in_fp16_are_told_why():
    layer = nn.GRU(8, 8).half()
    pruner = Pruner(layer, "hard", 20, sparsity=0.5, prune_itr=1)
    torch.nn.init.constant_(layer.weight_hh_l0, torch.nan)
    with pytest.raises(
        UserError, match=r"the training has diverged; lower the .* beside Adam, whose eps is 0 in float16"
    ):
        pruner.step()
