"""Means of squared gradients in one launch, in Triton's interpreter or on a GPU, against torch's operations."""

import copy
import pickle

import pytest
import torch

from srnn.pruning.mean_squares import MeanSquares
from tests.kernels.triton_cases import DEVICE, here, on_gpu


def tensors(generator, sizes):
    return {str(size): torch.randn(size, generator=generator).to(DEVICE) for size in sizes}


@pytest.mark.gpu
@here
def test_means_of_squares_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    squares, sizes = MeanSquares(0.9), (1, 0, 2048, 5000)
    means = {name: tensor.square() for name, tensor in tensors(generator, sizes).items()}
    wanted = {name: mean.double() for name, mean in means.items()}
    for step in range(5):  # from the third time on a GPU replays it
        if step in (0, 4):
            gradients = tensors(generator, sizes)
        counts = step != 1
        if not counts:
            gradients["5000"][7] = torch.nan
        squares._on_gpu(means, gradients, torch.tensor(counts, device=DEVICE))
        if not counts:
            gradients["5000"][7] = 2.0
            continue
        for name, gradient in gradients.items():
            wanted[name] = 0.9 * wanted[name] + 0.1 * gradient.double().square()
    for name, mean in means.items():
        torch.testing.assert_close(mean, wanted[name].float(), rtol=1e-5, atol=1e-7)
    assert pickle.loads(pickle.dumps(copy.deepcopy(squares))).decay == 0.9


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_a_step_is_one_launch_where_all_lie_alike(monkeypatch):
    generator, launched = torch.Generator().manual_seed(0), []
    plain = MeanSquares._on_gpu
    monkeypatch.setattr(MeanSquares, "_on_gpu", lambda self, *given: (launched.append(1), plain(self, *given)))
    finite = [torch.tensor(True, device="cuda")]
    for change in (lambda g: g, lambda g: g.bfloat16(), lambda g: None):
        means, gradients = tensors(generator, (7, 300)), tensors(generator, (7, 300))
        given = gradients | {"7": change(gradients["7"])}
        before = {name: mean.clone() for name, mean in means.items()}
        MeanSquares(0.9)(means, given, finite)
        for name, mean in means.items():
            square = 0.0 if given[name] is None else given[name].float().square()
            torch.testing.assert_close(mean, 0.9 * before[name] + 0.1 * square)
    assert len(launched) == 1
