"""``recur_vectors``: one stream a row of programs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from srnn.cells import GATES
from srnn.kernels.contract import equal_lengths
from srnn.kernels.triton.backend import Triton
from srnn.kernels.triton.tuning import Tuning
from srnn.kernels.triton.vectors.layout import lay_out_vectors, padded
from srnn.sparse import SparseMatrix
from tests.kernels.triton_cases import DEVICE, check, check_both, here, layer, on_gpu, use_chip


@pytest.mark.gpu
@here
@pytest.mark.parametrize("height", [1, 8])
def test_weights_that_do_not_fit_one_tile(height, monkeypatch):
    chip = use_chip(monkeypatch, {"most_values": 2048, "least_values": 1 << 20})
    weights = layer("gru", 8, 130, height, density=0.5)
    assert lay_out_vectors([weights.w_hh], 1, chip.tuning).plan.tiles > 1
    check(weights, torch.float32, equal_lengths(2, 1))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
@pytest.mark.parametrize("sizes", [[3] * 4, [3, 2, 2, 1]])
def test_units_in_another_order(cell, sizes, monkeypatch):
    """The longest rows of each direction first: units are dealt out to programs one by one."""
    use_chip(monkeypatch, processors=8)
    monkeypatch.setattr("srnn.kernels.triton.recurrence.programs_of", lambda matrices, chip, streams: 4)
    both, gates = [], GATES[cell]
    for d in range(2):
        weights = layer(cell, 19, 37, reverse=d == 1, seed=d, density=0.6)
        dense = weights.w_hh.to_dense()
        dense.view(gates, 37, 37)[:, 12 + d :] = 0
        both.append(replace(weights, w_hh=SparseMatrix.from_dense(dense, weights.w_hh.structure, "fp32", gates)))
        check(both[-1], torch.float32, torch.tensor(sizes))
    layout = check_both(*both, torch.float32, torch.tensor(sizes)).layout(3)
    assert layout.places.gather(1, layout.units).equal(torch.arange(37, device=DEVICE).expand(2, -1))
    assert not layout.units[0].equal(layout.units[1])


@pytest.mark.gpu
@here
def test_a_matrix_of_zeros():
    weights = layer("lstm", 8, 20, density=0.0)
    assert weights.w_hh.blocks == 0
    check(weights, torch.float32, equal_lengths(2, 1))


@pytest.mark.gpu
@here
def test_a_state_that_looks_unwritten_is_a_nan():
    """The bits that mark what is not written yet may come from outside."""
    weights = layer("gru", 8, 40)
    strange = torch.full((1, 40), -1, dtype=torch.int32).view(torch.float32)
    ready = Triton().layer(weights, DEVICE, torch.float32)
    y, _ = ready.run(torch.randn(3, 8, device=DEVICE), equal_lengths(3, 1), (strange.to(DEVICE),))
    assert y.isnan().all()


def test_programs_get_equal_shares():
    """Rows of 0 to 60 blocks, in an order that would leave one program most of them."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.sort((torch.rand(512, generator=generator) * 61).long()).values
    dense = (torch.rand(512, 512, generator=generator).argsort(dim=1) < counts[:, None]).float()
    layout = lay_out_vectors([SparseMatrix.from_dense(dense)], 16, Tuning())
    programs = layout.plan.programs
    shares = (layout.columns.view(programs, -1) != padded(512)).sum(dim=1).numpy()
    assert shares.sum() == counts.sum()
    assert shares.max() <= 1.05 * np.mean(shares)


@pytest.mark.gpu
@on_gpu
def test_a_kernel_that_waits_in_vain_gives_up_and_says_so():
    weights = layer("gru", 64, 500, density=0.1)
    recurrence = Triton()._launched(weights, DEVICE, torch.float32)
    whole = recurrence.layout(1)
    programs = whole.plan.programs
    assert programs > 2
    recurrence.layouts[programs] = replace(whole, plan=replace(whole.plan, programs=programs - 1))
    u, sizes = torch.randn(10, 1500, device=DEVICE), equal_lengths(10, 1)
    state = (torch.zeros(1, 500, device=DEVICE),)
    y, _ = recurrence(u, sizes, state)
    torch.cuda.synchronize()
    assert y.isnan().any()
    recurrence.layouts[programs] = whole
    with pytest.raises(RuntimeError, match="gave up waiting"):
        recurrence(u, sizes, state)
    assert recurrence(u, sizes, state)[0].isfinite().all()
