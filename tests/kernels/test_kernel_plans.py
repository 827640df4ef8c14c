"""Which form of the recurrent kernels is planned, at the sizes it was measured for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srnn.kernels.contract import LayerWeights
from srnn.kernels.triton import backend
from srnn.kernels.triton.arrange import two_powers
from srnn.kernels.triton.chip import Chip
from srnn.kernels.triton.forms import plan_streams
from srnn.kernels.triton.gates.plan import GatePlan
from srnn.kernels.triton.recurrence import TritonRecurrence
from srnn.kernels.triton.slices.plan import RESERVED, Workload
from srnn.kernels.triton.tuning import Tuning
from srnn.kernels.triton.vectors.plan import programs_of, share_out, sizes_of
from srnn.sparse import SparseMatrix

H100 = Chip(132, 228 << 10, True, True, Tuning())
RTX_4090 = Chip(128, 100 << 10, False, True, Tuning())


def matrix(gates, units, height, most):
    """A stand-in for a matrix whose fullest row group has so many blocks."""
    groups = -(-units // height)
    pointers = torch.arange(gates * groups + 1) * most
    return SimpleNamespace(gates=gates, groups=gates * groups, height=height, row_pointers=pointers)


@pytest.mark.parametrize(
    ("gates", "units", "height", "most", "streams", "wide"),
    [
        (3, 1760, 32, 208, 16, 16),
        (3, 1760, 32, 208, 64, 32),  # two slices side by side
        (3, 1760, 32, 208, 65, 64),  # which would take two goes
        (3, 2560, 32, 297, 32, 32),
        (3, 2560, 32, 297, 33, 64),
        (3, 3568, 32, 401, 16, 16),
        (3, 3568, 32, 401, 17, 64),
        (3, 2560, 32, 603, 8, 8),
        (3, 2560, 32, 603, 16, 16),
        (3, 2560, 32, 603, 17, 64),
        (3, 2560, 32, 641, 64, 16),  # too many for a gate at once: from the cache
        (3, 2560, 16, 297, 32, 16),  # more groups than multiprocessors
        (3, 2560, 16, 297, 33, 64),
        (4, 2150, 16, 250, 64, 16),
        (4, 2150, 16, 400, 64, 64),  # too many for registers
        (1, 1760, 32, 199, 32, 16),
        (1, 1760, 32, 199, 33, 64),
        (1, 3072, 32, 347, 64, 64),
    ],
)
def test_streams_of_a_slice(gates, units, height, most, streams, wide):
    work = Workload.of([matrix(gates, units, height, most)], 2, streams)
    made = plan_streams(work, H100)
    assert made.wide == wide
    assert made.each == (2 if isinstance(made, GatePlan) and units / height > H100.processors else 1)
    assert made.fits(work, H100)
    assert not isinstance(plan_streams(work, replace(H100, warpgroups=False)), GatePlan)


@pytest.mark.parametrize(
    ("units", "height", "most", "streams"), [(1760, 32, 208, 33), (1024, 32, 140, 65), (1760, 16, 380, 17)]
)
def test_less_shared_memory_takes_narrower_slices(units, height, most, streams):
    """100 KB a multiprocessor."""
    work = Workload.of([matrix(3, units, height, most)], 2, streams)
    fitting = plan_streams(work, RTX_4090)
    assert fitting.fits(work, RTX_4090)
    assert fitting.tiles == 1
    assert fitting.wide < plan_streams(work, replace(RTX_4090, shared_memory=228 << 10)).wide


@pytest.mark.parametrize(("size", "ieee", "tiles"), [(4, False, 1), (4, True, 3), (2, False, 1), (2, True, 1)])
def test_values_of_fp32_fit_registers_but_for_ieee(size, ieee, tiles):
    made = plan_streams(Workload.of([matrix(3, 2560, 32, 297)], size, 16, ieee), H100)
    assert (made.wide, made.tiles) == (8 if size == 4 else 16, tiles)


def test_both_directions_share_the_multiprocessors():
    two = [matrix(3, 1024, 32, 120)] * 2
    assert plan_streams(Workload.of(two, 2, 64), H100).wide == 32
    assert plan_streams(Workload.of(two, 2, 65), H100).wide == 64


def test_sizes_in_two_powers():
    assert [two_powers(n, 16) for n in (1, 16, 17, 33, 48, 49, 80, 97)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (32, 16), (64, 0), (64, 16), (128, 0),
    ]  # fmt: skip


def test_without_tf32_products_are_ieee(monkeypatch):
    matrix = SparseMatrix.from_dense(torch.ones(48, 16), "16x1", "fp32", 3)
    weights = LayerWeights("gru", matrix, matrix)
    monkeypatch.setattr(backend, "chip_of", lambda device: replace(H100, tf32=False))
    assert backend.Triton("tf32x3").recurrence(weights, torch.device("cpu"), torch.float32).precision == "ieee"
    monkeypatch.setattr(backend, "chip_of", lambda device: H100)
    assert backend.Triton("tf32x3").recurrence(weights, torch.device("cpu"), torch.float32).precision == "tf32x3"


@st.composite
def chips(draw):
    """Cards of 60 to 200 multiprocessors with 100 to 228 KB of shared memory, as they have been since Ampere."""
    return Chip(
        draw(st.integers(60, 200)),
        draw(st.sampled_from([100, 128, 164, 228])) << 10,
        draw(st.booleans()),
        True,
        Tuning(),
    )


@given(
    chips(), st.sampled_from([1, 3, 4]), st.integers(1, 4096), st.sampled_from([16, 32]), st.floats(0, 0.3),
    st.integers(2, 200), st.sampled_from([2, 4]), st.integers(1, 2),
)  # fmt: skip
def test_what_is_launched_on_other_cards_runs_all_at_once(
    chip, gates, units, height, density, streams, size, directions
):
    """Programs wait for each other: none may be left for later, for lack of multiprocessors or of shared memory."""
    most = max(1, round(density * units))
    work = Workload.of([matrix(gates, units, height, most)] * directions, size, streams)
    plan = plan_streams(work, chip)
    blocks = (plan.k + plan.k_2) * plan.tiles * (plan.chunks if gates == 1 else plan.chunks // 4)
    if isinstance(plan, GatePlan):
        assert chip.warpgroups
        blocks = plan.k + plan.k_2
        assert plan.programs * plan.each >= work.groups
    assert blocks >= most, "all blocks have a place"
    if plan.fits(work, chip):
        on_each = -(-plan.programs * directions // chip.processors)
        assert on_each <= plan.resident
        assert on_each * (plan.shared_bytes(height, size) + RESERVED) <= chip.shared_memory


@given(chips(), st.integers(1, 300), st.sampled_from([1, 16]), st.integers(1, 40), st.integers(1, 2))
def test_one_after_the_other_runs_on_any_card(chip, units, height, streams, directions):
    dense = (torch.rand(3, -(-units // height), units) < 0.3).float().repeat_interleave(height, dim=1)[:, :units]
    given_matrix = SparseMatrix.from_dense(dense.reshape(-1, units), "element" if height == 1 else "16x1", "fp16", 3)
    programs = programs_of([given_matrix] * directions, chip, streams)
    assert 1 <= programs * directions <= chip.processors
    shares = share_out(given_matrix, 1, programs)
    chunk, per_tile, warps = sizes_of(given_matrix, shares, chip.tuning)
    assert chunk * per_tile * height <= chip.tuning.most_values * (1 if height == 1 else 2)
    assert warps in (4, 8, 16)


def test_slices_that_do_not_fit_go_one_after_the_other():
    """A layer of 8,000 units on a small card: no plan fits, and it runs all the same."""
    dense = torch.zeros(8000, 8000)
    dense[:, ::80] = 1
    blocks = SparseMatrix.from_dense(dense, "16x1", "fp16", 1)
    small = Chip(60, 100 << 10, False, True, Tuning())
    recurrence = TritonRecurrence(
        (LayerWeights("tanh", blocks, blocks),), torch.device("cpu"), torch.float16, "ieee", small
    )
    assert recurrence.slices(16) is None
    assert 1 <= recurrence.layout(16).plan.programs <= 60
