"""Pruning is the same whatever dtype and device torch makes tensors with by default."""

import pytest
import torch
from torch import nn

from srnn.pruning import Pruner
from srnn.pruning.cutting import GpuCut
from srnn.pruning.launches import blocks_of, put
from tests.kernels.triton_cases import on_gpu

CPU = torch.device("cpu")


@pytest.fixture
def by_default():
    """A function that sets either; both are as they were in the end."""

    def choose(chosen):
        if isinstance(chosen, torch.dtype):
            torch.set_default_dtype(chosen)
        else:
            torch.set_default_device(chosen)

    yield choose
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def pruned(method, device, choose=lambda: None, dtype=torch.float32):
    """Masks, thresholds and what the method remembers, of a training that was resumed; its pruner is made by then."""
    torch.manual_seed(0)
    model = nn.LSTM(12, 16).to(device, dtype)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    choose()
    pruner = Pruner(model, method, 60, optimizer, sparsity=0.7)
    for step in range(60):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient * (1 + step % 3)
        optimizer.step()
        pruner.step()
        if step == 20:
            pruner.load_state_dict(pruner.state_dict())
        if step == 25:
            held = {name: mean.cpu() for name, mean in pruner.method.state_dict().items()}
    pruner.finalize()
    return {name: mask.cpu() for name, mask in pruner.masks().items()}, pruner.thresholds, held


def assert_alike(one, other):
    for name, mask in one[0].items():
        assert mask.equal(other[0][name])
    assert other[1] == pytest.approx(one[1], rel=1e-5)
    torch.testing.assert_close(other[2], one[2])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("method", ["gradual", "obd", "rigl", "random", "block"])
@pytest.mark.filterwarnings("ignore:pruning left no weight of")
def test_pruning_is_the_same(method, default, by_default):
    wanted = pruned(method, CPU)
    assert_alike(wanted, pruned(method, CPU, lambda: by_default(default)))


def test_obd_beside_sgd_forgets_gradients_in_a_network_of_bfloat16(by_default):
    """0.999 would be 1 in it."""
    wanted = pruned("obd", CPU, dtype=torch.bfloat16)
    assert_alike(wanted, pruned("obd", CPU, lambda: by_default(torch.bfloat16), torch.bfloat16))


def test_what_a_gpu_is_told_is_made_on_the_host(by_default):
    """Only there memory can be pinned."""
    by_default("meta")
    assert put(((1, 2), (3, 4)), CPU).tolist() == [[1, 2], [3, 4]]
    owners, firsts = blocks_of((3, 5), 2, CPU)
    assert owners.tolist() == [0, 0, 1, 1, 1]
    assert firsts.tolist() == [0, 2]
    assert GpuCut()._begin(CPU).tolist() == [0, 0]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("method", ["gradual", "obd", "rigl", "block"])
@pytest.mark.filterwarnings("ignore:pruning left no weight of")
def test_on_a_gpu_that_gpu_may_be_the_default(method, by_default):
    wanted = pruned(method, torch.device("cuda"))
    assert_alike(wanted, pruned(method, torch.device("cuda"), lambda: by_default("cuda")))
