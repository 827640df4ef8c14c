"""Numbers of a card: measured by ``srnn doctor --tune``, kept in the cache folder, read by the plans."""

import json
from types import SimpleNamespace

import pytest
import torch

from srnn.__main__ import main
from srnn.kernels.remembering import choices_file, remember
from srnn.kernels.triton import chip, tuning
from srnn.kernels.triton.products import crossovers
from srnn.kernels.triton.products.plan import is_faster_sparse
from srnn.kernels.triton.tuning import BOUNDS, KEPT, Tuning, tuned
from srnn.sparse import SparseMatrix
from tests.kernels.triton_cases import DEVICE, on_gpu

GPU = torch.device("cuda")


def timed(few_of_elements, few_of_blocks, density):
    """A card on which the forms for few rows win up to so many, and dense from this density on."""
    bounds = [few_of_elements, few_of_blocks]
    rows = []

    def seconds_of(calls):
        if "few" not in calls:
            return {"least": 0.1, "more": 0.2, "dense": density}
        rows.append(calls["few"].args[0].shape[0])
        if len(rows) > 1 and rows[-1] == 1:
            bounds.pop(0)
        return {"few": rows[-1], "other": bounds[0] + 0.5}

    return seconds_of


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ((4, 2, 0.21), {"few_rows": 4, "few_rows_of_blocks": 2, "dense_from": 152}),
        ((0, 0, 0.05), {"few_rows": 0, "few_rows_of_blocks": 1, "dense_from": 640}),
        ((99, 99, 99), {"few_rows": 8, "few_rows_of_blocks": 8, "dense_from": 32}),
    ],
)
def test_where_forms_are_equally_fast(card, wanted):
    found = crossovers.crossovers(torch.device("cpu"), timed(*card), shape=(96, 64))
    assert found == wanted
    made = tuned(found)
    assert (made.few_rows, made.dense_from) == (wanted["few_rows"], wanted["dense_from"])
    assert made.gate_streams == Tuning().gate_streams
    half = SparseMatrix.from_dense(torch.ones(32, 64) * (torch.arange(64) % 4 == 0), "32x1", "fp16")
    assert is_faster_sparse(half, 4096, torch.float16, made) == (0.25 * wanted["dense_from"] <= 32)


@on_gpu
@pytest.mark.gpu
def test_a_gpu_is_measured():
    found = crossovers.crossovers(GPU, crossovers._timer(GPU), shape=(768, 256))
    assert found.keys() == BOUNDS.keys()
    assert tuned(found) is not None


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that is not here, and an empty cache folder."""
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "hardware", lambda device: "NVIDIA L40S; torch 9")
    found = SimpleNamespace(multi_processor_count=142, shared_memory_per_multiprocessor=100 << 10, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(chip, "interpreted", lambda: False)
    chip.chip_of.cache_clear()
    yield found
    chip.chip_of.cache_clear()


def test_what_was_measured_is_kept_under_the_name_of_the_card(card):
    assert chip.chip_of(GPU).tuning == Tuning()
    assert not tuning.is_measured(GPU)
    remember("NVIDIA L40S; torch 9", KEPT, {"few_rows": 2, "few_rows_of_blocks": 4, "dense_from": 90})
    remember("NVIDIA B200; torch 9", KEPT, {"few_rows": 8, "few_rows_of_blocks": 8, "dense_from": 33})
    chip.chip_of.cache_clear()
    made = chip.chip_of(GPU)
    assert (made.processors, made.shared_memory, made.warpgroups, made.tf32) == (142, 100 << 10, False, True)
    assert (made.tuning.few_rows, made.tuning.few_rows_of_blocks, made.tuning.dense_from) == (2, 4, 90)
    assert tuning.is_measured(GPU)


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\x00",
        json.dumps({"NVIDIA L40S; torch 9": []}).encode(),
        json.dumps({"NVIDIA L40S; torch 9": {KEPT: [4]}}).encode(),
        json.dumps({"NVIDIA L40S; torch 9": {KEPT: {"few_rows": "4", "dense_from": 0, "processors": 7}}}).encode(),
        json.dumps({"NVIDIA L40S; torch 9": {KEPT: {"few_rows": True, "few_rows_of_blocks": 1e9}}}).encode(),
    ],
)
def test_a_damaged_file_is_passed_over(card, kept):
    choices_file().parent.mkdir(parents=True, exist_ok=True)
    choices_file().write_bytes(kept)
    assert chip.chip_of(GPU).tuning == Tuning()


@pytest.mark.skipif(DEVICE.type == "cuda" and torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    assert main(["doctor", "--tune"]) == 2
    assert "doctor: --tune measures the Triton kernels on a GPU, and needs a" in capsys.readouterr().err
