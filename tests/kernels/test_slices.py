"""``recur_slices``: slices of 8 to 32 streams."""

import pytest
import torch

from srnn.kernels.contract import equal_lengths
from srnn.kernels.triton.backend import Triton
from srnn.kernels.triton.forms import plan_streams
from srnn.kernels.triton.slices.plan import Workload
from tests.kernels.triton_cases import DEVICE, check, here, layer, on_gpu, use_chip


@pytest.mark.gpu
@here
@pytest.mark.parametrize(("precision", "tiles"), [("tf32x3", 1), ("ieee", 3), ("tf32", 1)])
def test_precisions_of_fp32(precision, tiles, monkeypatch):
    """On tensor cores more values fit the registers."""
    use_chip(monkeypatch, processors=40)
    weights = layer("gru", 8, 300, 32, density=1.0)
    assert Triton(precision)._launched(weights, DEVICE, torch.float32).slices(9).plan.tiles == tiles
    check(weights, torch.float32, equal_lengths(2, 9), precision)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
@pytest.mark.parametrize(("registers", "warps", "tiles"), [({4: 0, 8: 0, 16: 999}, 16, 1), ({4: 0, 8: 0, 16: 0}, 8, 2)])
def test_blocks_in_more_warps_or_from_the_cache(cell, registers, warps, tiles, monkeypatch):
    chip = use_chip(monkeypatch, {"operand_registers": registers, "most_gate_blocks": 0}, processors=40)
    hidden = 300 if cell != "tanh" else 1100  # blocks of one gate fall into four times as many chunks
    weights = layer(cell, 8, hidden, 32, density=1.0)
    made = plan_streams(Workload.of([weights.w_hh], 2, 9), chip)
    assert (made.warps, made.tiles) == (warps, tiles)
    check(weights, torch.float16, equal_lengths(2, 9))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("streams", [9, 40])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_slices_of_streams_of_different_lengths(cell, reverse, streams):
    """Several slices a program, of which the last is not full."""
    lengths = torch.arange(streams) % 4 + 1
    lengths[0] = 4
    sizes = torch.tensor([int((lengths > t).sum()) for t in range(4)])
    check(layer(cell, 19, 40, 16, reverse=reverse), torch.float32, sizes)


@pytest.mark.gpu
@here
def test_the_given_state_of_one_unit_stays_as_it_is():
    """In any order of its dimensions it is one piece of memory, so that nothing but a copy keeps it."""
    check(layer("lstm", 4, 1, 16), torch.float32, equal_lengths(3, 8))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("name", "streams", "height", "hidden"), [("recur_slices", 4, 16, 500), ("recur_gates", 64, 32, 2560)]
)
def test_many_streams_that_wait_in_vain_give_up_too(name, streams, height, hidden, monkeypatch):
    """One program fewer than the others wait for."""
    from srnn.kernels.triton.gates import kernel as gates
    from srnn.kernels.triton.slices import kernel as slices

    class OneShort:
        def __getitem__(self, grid):
            if name == "recur_slices":
                return whole[(grid[0] - 1, *grid[1:])]
            # Programs count how many there are: one that there is more than were counted in is what they wait for.
            return lambda **given: whole[grid](**given | {"counters": given["counters"] - 1})

    kernels = slices if name == "recur_slices" else gates
    whole = getattr(kernels, name)
    dtype = torch.float32 if name == "recur_slices" else torch.float16
    weights = layer("gru", 64, hidden, height, density=0.1, values="fp32" if dtype == torch.float32 else "fp16")
    recurrence = Triton()._launched(weights, DEVICE, dtype)
    u, sizes = torch.randn(5 * streams, 3 * hidden, device=DEVICE, dtype=dtype), equal_lengths(5, streams)
    state = (torch.zeros(streams, hidden, device=DEVICE, dtype=dtype),)
    monkeypatch.setattr(kernels, name, OneShort())
    y, _ = recurrence(u, sizes, state)
    torch.cuda.synchronize()
    # Units wait for those they depend on, or for all.
    lost = y.view(5, streams, hidden)[(2 if name == "recur_slices" else 1) :, :, : hidden * 4 // 5]
    assert lost.isnan().all(), "all depend on what was never written"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        recurrence(u, sizes, state)
    assert recurrence(u, sizes, state)[0].isfinite().all()
