"""Masking by one kernel: on a GPU, or on a CPU in Triton's interpreter, see ``tests/kernels/test_triton.py``."""

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, here


@pytest.mark.gpu
@here
@pytest.mark.parametrize("mostly_zero", [False, True])
def test_all_are_masked_at_once_to_the_bit(mostly_zero):
    """Of several sizes, with what is not finite, at odd places, and not contiguous; also after an address changed."""
    from srnn.pruning.masking import GpuMasking

    generator = torch.Generator().manual_seed(0)
    floats = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    masking = GpuMasking(mostly_zero)
    rows = []
    for shape in ((70, 100), (5,), (4097,), (3, 8, 5, 5)):
        mask = torch.rand(shape, generator=generator) < 0.5
        tensors = [torch.randn(shape, generator=generator).to(kind) for kind in floats]
        tensors[0].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        apart = torch.zeros(mask.numel() + 1)[1:].view(shape)  # 4 bytes after where memory begins
        apart.copy_(tensors[0])
        if len(shape) == 4:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        rows.append((mask.to(DEVICE), [tensor.to(DEVICE) for tensor in (*tensors, apart)]))
    for turn in range(8):
        wanted = [[tensor.clone().masked_fill_(~mask, 0) for tensor in tensors] for mask, tensors in rows]
        masking(rows)
        for (mask, tensors), several in zip(rows, wanted, strict=True):
            for tensor, truth in zip(tensors, several, strict=True):
                bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
                assert tensor.view(bits).equal(truth.view(bits))
            if turn == 0:
                mask.copy_(mask.flip(0))  # in place
            if turn == 2:
                tensors[1] = tensors[1] + 1
            else:
                tensors[1] += 1


@pytest.mark.gpu
@here
def test_what_is_found_is_told():
    from srnn.pruning.masking import GpuMasking

    found = torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE.type == "cuda")
    masking = GpuMasking(mostly_zero=True, found=found)
    masks = [torch.arange(size, device=DEVICE) % 3 == 0 for size in (3000, 7, 1500)]
    weights = [torch.randn(len(mask), device=DEVICE).masked_fill_(~mask, 0) for mask in masks]
    for turn in range(6):
        assert masking([(mask, (weight,)) for mask, weight in zip(masks, weights, strict=True)])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        assert found.item() == (turn == 4)
        if turn == 3:
            weights[2][1499] = 1e-30
        assert turn == 3 or all((weight[~mask] == 0).all() for mask, weight in zip(masks, weights, strict=True))
        found.zero_()


def test_what_was_used_last_is_kept():
    from srnn.pruning.launches import RecentLaunches

    recent, made = RecentLaunches(kept=2), []
    for key in (1, 2, 1, 3, 1, 2):  # 1 is in use all along, though it was made first
        recent.get(key, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 2]
