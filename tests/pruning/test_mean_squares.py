"""Means of squared gradients in one launch, in Triton's interpreter or on a GPU, against torch's operations."""

import copy
import pickle

import pytest
import torch

from srnn.pruning.clipping import GpuClipping
from srnn.pruning.mean_squares import DECAY, MeanSquares
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


def bits(tensor):
    return tensor.view(torch.int32)


@pytest.mark.gpu
@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("max_norm", [1e6, 0.5])
def test_means_of_squares_taken_in_by_clipping_are_those_of_a_pass_of_their_own(max_norm):
    """To the bit, masks and scaling included; a step with a gradient that is no number, or infinite, is none."""
    generator = torch.Generator().manual_seed(1)
    clipping, squares, sizes = GpuClipping(), MeanSquares(DECAY), (1, 0, 4096, 5001, 7)
    means = {name: one.square() for name, one in tensors(generator, sizes).items()}
    masks = {name: one > 0.5 for name, one in tensors(generator, sizes).items()} | {"7": None}
    means["5001"][~masks["5001"]] = torch.nan  # what is there of what is pruned stays within it
    apart = {name: mean.clone() for name, mean in means.items()}
    del means["4096"], apart["4096"]  # not all that is clipped has a mean
    gradients = tensors(generator, sizes)
    for step in range(7):  # new addresses, then the same ones until they are recorded
        if step < 3:
            gradients = tensors(generator, sizes)
        for name, gradient in gradients.items():
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
            if masks[name] is not None:
                gradient[~masks[name]] = torch.nan
        bad = {1: torch.nan, 3: torch.inf, 5: -torch.inf}.get(step)
        if bad is not None:
            gradients["7"][2] = bad
        plain, before = [gradient.clone() for gradient in gradients.values()], bits(means["7"]).clone()
        norm = clipping([*zip(gradients.values(), masks.values(), strict=True)], max_norm, [*map(means.get, gradients)])
        assert bool(norm.isfinite()) == (bad is None)
        GpuClipping()([*zip(plain, masks.values(), strict=True)], max_norm)
        for gradient, one in zip(gradients.values(), plain, strict=True):
            assert bits(gradient).equal(bits(one))
        squares._on_gpu(apart, gradients, torch.tensor(bad is None, device=DEVICE))
        for name, mean in means.items():
            assert bits(mean).equal(bits(apart[name]))
        assert bits(means["7"]).equal(before) == (bad is not None)


@pytest.mark.gpu
@here
def test_clipping_writes_nothing_beside_means():
    generator = torch.Generator().manual_seed(2)
    for size in (1, 4095, 4097):
        room = torch.full((size + 2,), torch.nan).to(DEVICE)
        mean, gradient = room[1:-1], torch.randn(size, generator=generator).to(DEVICE)
        mean.fill_(0.25)
        GpuClipping()([(gradient, None)], 1e6, [mean])
        torch.testing.assert_close(mean, 0.25 * DECAY + (1 - DECAY) * gradient.square())
        assert room[[0, -1]].isnan().all()


@pytest.mark.gpu
@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_clipping_takes_in_no_step_whose_norm_is_infinite():
    """Squares overflow where the gradients are finite: what is left of them is zero, and counts for nothing."""
    gradient, mean = torch.full((5,), 1e30).to(DEVICE), torch.ones(5).to(DEVICE)
    norm = GpuClipping()([(gradient, None)], 1.0, [mean])
    assert norm == torch.inf
    assert gradient.tolist() == [0] * 5
    assert mean.tolist() == [1] * 5
