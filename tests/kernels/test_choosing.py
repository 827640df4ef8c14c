import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from srnn.kernels import Auto, Dense, LayerWeights
from srnn.kernels.choosing import described_matrix, fastest
from srnn.kernels.dense import Torch
from srnn.kernels.remembering import choices_file
from srnn.kernels.timing import interleaved
from srnn.sparse import SparseMatrix

CPU = torch.device("cpu")


def layer():
    weight = torch.randn(3 * 8, 8) * (torch.rand(3 * 8, 8) < 0.3)
    return LayerWeights("gru", *(SparseMatrix.from_dense(weight, gates=3) for _ in range(2)))


def run(kernel, batch=1, steps=4):
    ready = kernel.layer(layer_fixed, CPU, torch.float32)
    return ready.run(torch.randn(steps * batch, 8), torch.full((steps,), batch), (torch.zeros(batch, 8),))


torch.manual_seed(0)
layer_fixed = layer()


def test_each_round_has_another_order():
    """What comes right after a call of the same code finds it in the caches."""
    called = []
    calls = {name: partial(called.append, name) for name in "abcd"}
    times = interleaved(calls, CPU, 30, 60.0)
    assert [len(each) for each in times.values()] == [30] * 4
    rounds = [tuple(called[at : at + 4]) for at in range(4, 4 + 30 * 4, 4)]
    assert all(sorted(each) == [*"abcd"] for each in rounds)
    assert {each[0] for each in rounds} == {each[-1] for each in rounds} == {*"abcd"}


def sleeper(milliseconds):
    return lambda: time.sleep(milliseconds / 1000)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"torch": 6, "onednn": 9, "cpu": 2}, "cpu"),
        ({"torch": 2, "onednn": 9, "cpu": 6}, "torch"),
        ({"torch": 9, "onednn": 2, "csr": 6, "cpu": 6}, "onednn"),
        ({"cpu": 2, "csr": 6}, "cpu"),
    ],
)
def test_the_fastest_wins(times, winner):
    choice = fastest("something", {name: sleeper(t) for name, t in times.items()}, CPU, {})
    assert choice.winner == winner
    assert set(choice.seconds) == set(times)


def test_a_tie_goes_to_dense(monkeypatch):
    monkeypatch.setattr("srnn.kernels.choosing.interleaved", lambda *_: {"torch": [1.0], "cpu": [0.99]})
    assert fastest("something", {"torch": None, "cpu": None}, CPU, {}).winner == "torch"


def test_a_backend_can_wait_to_be_asked(monkeypatch):
    from srnn.kernels import Csr

    assert "csr" in Auto()._all
    monkeypatch.setattr(Csr, "unasked", False)
    assert "csr" not in Auto()._all


def test_a_sparse_backend_that_fails_is_left_out(monkeypatch, caplog):
    from srnn.kernels import Csr

    def fail(*_):
        raise MemoryError("out of shared memory\nat some line")

    monkeypatch.setattr(Csr, "layer", fail)
    auto = Auto()
    run(auto, batch=3)
    (choice,) = auto.choices.values()
    assert choice.left_out["csr"] == "failed: out of shared memory"
    assert "csr" not in choice.seconds
    assert "csr cannot be used: failed: out of shared memory" in caplog.text
    monkeypatch.setattr(Torch, "layer", fail)
    with pytest.raises(MemoryError):
        run(Auto(), batch=9)


@pytest.mark.parametrize(
    ("structure", "words"), [("element", "(about 8,200 non-zeros)"), ("16x1", "(about 510 blocks)")]
)
def test_a_shape_is_told_in_plain_figures(structure, words):
    matrix = SparseMatrix.from_dense(torch.ones(96, 85), structure, "fp16")
    assert described_matrix(matrix) == f"96x85 {structure} fp16 {words}"


def test_auto_measures_once_and_remembers(monkeypatch, caplog):
    caplog.set_level("INFO", "srnn.kernels")
    first = Auto()
    run(first)
    (choice,) = first.choices.values()
    assert set(choice.seconds) == {"torch", "onednn", "csr", "cpu"}
    assert choice.winner in caplog.text
    assert len(caplog.records) == 1, "one line"
    assert "us" in str(choice)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("srnn.kernels.choosing.fastest", refuse)
    again = Auto()
    run(again)
    assert again.choices == first.choices
    with pytest.raises(AssertionError, match="measured again"):
        run(again, batch=5)  # other streams are another question
    monkeypatch.setattr("srnn.kernels.choosing.hardware", lambda _: "another machine")
    with pytest.raises(AssertionError, match="measured again"):
        run(Auto())


def test_single_steps_short_and_long_sequences_are_measured_apart():
    kernel = Auto()
    for steps in (1, 2, 32, 33, 200):
        run(kernel, batch=2, steps=steps)
    assert [choice.use for choice in kernel.choices.values()] == [
        f"2 streams, {n}" for n in ("1 step", "16 steps", "100 steps")
    ]


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"x": 3', b"\xff\xfe"])
def test_a_damaged_cache_is_measured_anew(damage):
    run(Dense())
    choices_file().write_bytes(damage)
    kernel = Dense()
    run(kernel)
    assert len(kernel.choices) == 1
    assert isinstance(json.loads(choices_file().read_bytes()), dict)


def test_entries_of_another_kind_are_measured_anew():
    kernel = Dense()
    run(kernel)
    cache = json.loads(choices_file().read_bytes())
    for entries in cache.values():
        for entry in entries.values():
            entry["winner"] = "nonsense"
    choices_file().write_text(json.dumps(cache))
    again = Dense()
    run(again)
    assert next(iter(again.choices.values())).winner in ("torch", "onednn")


def test_a_cache_that_cannot_be_written_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "file"))
    kernel = Dense()
    run(kernel)
    assert len(kernel.choices) == 1


def test_who_cannot_run_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr("srnn.kernels.cpu.backend.Cpu.supports", lambda *_: "it is Monday")
    kernel = Auto()
    run(kernel)
    (choice,) = kernel.choices.values()
    assert choice.left_out == {"cpu": "it is Monday"}
    assert "not cpu: it is Monday" in str(choice)


def test_dense_is_never_worse_than_its_parts():
    assert set(Dense().candidates()) == {"torch", "onednn"}
    assert isinstance(Dense().candidates()["torch"], Torch)
    assert set(Dense("int8").candidates()) == {"int8"}


@pytest.mark.slow
def test_six_processes_at_once_lose_no_choice():
    """Each adds its own to the file, ten times, while the others do."""
    code = (
        "import sys; from srnn.kernels.remembering import remember\n"
        "for n in range(10): remember('key cpu', f'{sys.argv[1]} {n}', {'winner': 'cpu'})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(6)]
    assert [process.wait(120) for process in processes] == [0] * 6
    kept = json.loads(choices_file().read_bytes())["key cpu"]
    assert set(kept) == {f"{number} {n}" for number in range(6) for n in range(10)}


def test_what_was_measured_on_a_busy_machine_is_measured_again(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    first, second = Dense(), Dense()
    run(first, batch=70)
    (what,) = first.choices
    run(second, batch=70)
    assert what not in str(choices_file().read_text() if choices_file().exists() else "")
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 0.0, 0.0))
    run(third := Dense(), batch=70)
    assert json.loads(choices_file().read_bytes())
    assert what in choices_file().read_text()
    run(fourth := Dense(), batch=70)
    assert fourth.choices == third.choices, "remembered"
