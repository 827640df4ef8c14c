"""``recur_gates``: slices of 64 streams, one product a gate."""

import pytest
import torch

from srnn.kernels.contract import equal_lengths
from srnn.kernels.triton.forms import plan_streams
from srnn.kernels.triton.gates.plan import GatePlan
from srnn.kernels.triton.slices.plan import Workload
from tests.kernels.triton_cases import check, check_both, here, layer, use_chip


@pytest.mark.gpu
@here
@pytest.mark.parametrize(
    ("cell", "reverse", "dtype"),
    [("gru", False, torch.float16), ("lstm", True, torch.float16), ("tanh", False, torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("height", "processors", "wide"), [(32, 3, 64), (16, 6, 64), (16, 3, 64), (16, 12, 64), (16, 18, 32)]
)
def test_many_streams_in_wide_slices(cell, reverse, dtype, height, processors, wide, monkeypatch):
    """Of 64 in one product a gate where slices of 32 would not all run at once; the last slice is not full."""
    chip = use_chip(monkeypatch, processors=processors)
    weights = layer(cell, 19, 90, height, density=0.8, reverse=reverse)
    crowded = processors == 3 and height == 16
    if crowded and cell == "lstm":  # whose pairs of groups are slower than slices of 16, if those fit
        assert plan_streams(Workload.of([weights.w_hh], 2, 70), chip).wide == 16
        chip = use_chip(monkeypatch, {"operand_registers": {4: 0}})
    plan = plan_streams(Workload.of([weights.w_hh], 2, 70), chip)
    assert plan.wide == (wide if cell != "tanh" else 64), "a single gate is always faster so"
    assert plan.each == (2 if crowded and cell != "tanh" else 1)
    assert plan.resident == (2 if crowded and cell == "tanh" else 1)
    assert (plan.k_2 > 0) == isinstance(plan, GatePlan)
    check(weights, dtype, equal_lengths(2, 70))
    check(weights, dtype, torch.tensor([70, 33, 1]))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(("hidden", "processors"), [(70, 3), (33, 2)])
def test_an_odd_number_of_groups_in_pairs(cell, hidden, processors, monkeypatch):
    """The last program has one group, and that is not full."""
    chip = use_chip(monkeypatch, {"operand_registers": {4: 0}}, processors=processors)
    weights = layer(cell, 19, hidden, 16, density=0.8)
    assert plan_streams(Workload.of([weights.w_hh], 2, 40), chip).each == 2
    check(weights, torch.float16, equal_lengths(2, 40))
    check(weights, torch.float16, torch.tensor([130, 33, 1]))


@pytest.mark.gpu
@here
@pytest.mark.parametrize(("hidden", "height", "processors", "each"), [(90, 32, 6, 1), (37, 16, 4, 2)])
def test_both_directions_by_gates(hidden, height, processors, each, monkeypatch):
    use_chip(monkeypatch, processors=processors)
    forward, backward = (layer("gru", 19, hidden, height, density=0.8, reverse=d == 1, seed=d) for d in range(2))
    for sizes in (equal_lengths(3, 40), torch.tensor([40, 33, 1])):
        recurrence = check_both(forward, backward, torch.float16, sizes)
        assert isinstance(recurrence.slices(40).plan, GatePlan)
        assert recurrence.slices(40).plan.each == each
