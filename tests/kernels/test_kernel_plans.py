"""Which form of the recurrent kernels is planned, at the sizes it was measured for."""

from types import SimpleNamespace

import pytest
import torch

from srnn.kernels.contract import LayerWeights
from srnn.kernels.triton import backend, plan
from srnn.kernels.triton.plan import plan_blocks
from srnn.sparse import SparseMatrix

H100, RTX_4090 = 132, 128  # multiprocessors


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
    made = plan_blocks([matrix(gates, units, height, most)], H100, 2, streams)
    assert made.wide == wide
    assert made.each == (2 if made.by_gate and units / height > H100 else 1)
    assert made.fits(H100, 228 << 10, height, 2)
    assert not plan_blocks([matrix(gates, units, height, most)], H100, 2, streams, warpgroups=False).by_gate


@pytest.mark.parametrize(
    ("units", "height", "most", "streams"), [(1760, 32, 208, 33), (1024, 32, 140, 65), (1760, 16, 380, 17)]
)
def test_less_shared_memory_takes_narrower_slices(units, height, most, streams):
    """100 KB a multiprocessor."""
    fitting = plan_blocks([matrix(3, units, height, most)], RTX_4090, 2, streams, 100 << 10, False)
    assert fitting.fits(RTX_4090, 100 << 10, height, 2)
    assert fitting.tiles == 1
    assert fitting.wide < plan_blocks([matrix(3, units, height, most)], RTX_4090, 2, streams, 228 << 10, False).wide


@pytest.mark.parametrize(("size", "ieee", "tiles"), [(4, False, 1), (4, True, 3), (2, False, 1), (2, True, 1)])
def test_values_of_fp32_fit_registers_but_for_ieee(size, ieee, tiles):
    made = plan_blocks([matrix(3, 2560, 32, 297)], H100, size, 16, ieee=ieee)
    assert (made.wide, made.tiles) == (8 if size == 4 else 16, tiles)


def test_both_directions_share_the_multiprocessors():
    two = [matrix(3, 1024, 32, 120)] * 2
    assert plan_blocks(two, H100, 2, 64).wide == 32
    assert plan_blocks(two, H100, 2, 65).wide == 64


def test_sizes_in_two_powers():
    assert [plan._two_powers(n, 16) for n in (1, 16, 17, 33, 48, 49, 80, 97)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (32, 16), (64, 0), (64, 16), (128, 0),
    ]  # fmt: skip


def test_without_tf32_products_are_ieee(monkeypatch):
    matrix = SparseMatrix.from_dense(torch.ones(48, 16), "16x1", "fp32", 3)
    weights = LayerWeights("gru", matrix, matrix)
    monkeypatch.setattr(backend, "has_tf32", lambda device: False)
    assert backend.Triton("tf32x3").recurrence(weights, torch.device("cpu"), torch.float32).precision == "ieee"
    monkeypatch.setattr(backend, "has_tf32", lambda device: True)
    assert backend.Triton("tf32x3").recurrence(weights, torch.device("cpu"), torch.float32).precision == "tf32x3"
