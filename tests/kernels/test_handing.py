"""Inputs and outputs that a graph's own kernels copy, from and to where each call has them."""

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, here


@pytest.mark.gpu
@here
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.int8])
def test_each_call_has_its_own(kind, monkeypatch):
    """More calls than rows, of which none is awaited, and some are interrupted; sizes that fill no word."""
    from srnn.kernels.triton import handing
    from srnn.kernels.triton.handing import Handing

    monkeypatch.setattr(handing, "CALLS", 4)
    monkeypatch.setattr(handing, "_PROGRAMS", 2)
    stream = torch.cuda.current_stream() if DEVICE.type == "cuda" else None

    def numbers(*shape):
        return torch.randint(100, shape, device=DEVICE).to(kind)

    inputs = [numbers(3, 1001), numbers(7)]
    outputs = [numbers(3, 1001), numbers(7), numbers(2, 5, 4).transpose(0, 1)]
    assert Handing.takes(inputs, outputs)
    assert not Handing.takes(inputs, [numbers(4, 6)[:, :3]])
    assert not Handing.takes(inputs, [numbers(0)])
    hands = Handing(inputs, outputs)
    hands.recorded(inputs, outputs)

    def graph():
        hands.take()
        outputs[0].copy_(inputs[0] + 1)
        outputs[1].copy_(inputs[1] * 2)
        outputs[2].copy_(outputs[2] + 1)
        hands.give()

    def interrupted(before):
        if not before:
            graph()
        raise KeyboardInterrupt

    calls = []
    for turn in range(11):
        given, got = [numbers(*part.shape) for part in inputs], [torch.empty_like(part) for part in outputs]
        if turn in (3, 6):
            with pytest.raises(KeyboardInterrupt):
                hands.call(given, got, stream, lambda turn=turn: interrupted(turn == 3))
        hands.call(given, got, stream, graph)
        calls.append((given, got, outputs[2].clone()))
    for given, got, last in calls:
        assert got[0].equal(given[0] + 1)
        assert got[1].equal(given[1] * 2)
        assert got[2].equal(last)
