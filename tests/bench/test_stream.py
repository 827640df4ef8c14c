import csv

import pytest
import torch
from torch import nn

from srnn.__main__ import main
from srnn.bench import stream


class Echo(nn.Module):
    """Counts its steps in the state that it is handed."""

    def step(self, x_BI, state):
        return x_BI, 1 if state is None else state + 1


def test_rows_are_of_each_network_and_number_of_threads(monkeypatch):
    monkeypatch.setattr(stream, "stream_networks", lambda: ({"one": Echo(), "two": Echo()}, torch.zeros(4, 1, 2)))
    before = torch.get_num_threads()
    rows = list(stream.measure_stream(150, [2, 1]))
    assert torch.get_num_threads() == before
    assert [(row.network, row.threads, row.steps) for row in rows] == [
        ("one", 2, 150), ("two", 2, 150), ("one", 1, 150), ("two", 1, 150),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= row.p50_us <= row.p99_us
        assert row.mean_us == round(row.mean_us, 1)


def test_every_counted_step_is_timed_once():
    times = stream.step_times({"one": Echo()}, torch.zeros(4, 1, 2), 250)
    assert {name: len(seconds) for name, seconds in times.items()} == {"one": 250}


@pytest.mark.slow
def test_a_stream_is_timed(tmp_path, capsys):
    assert main(["bench", "bench=stream", "steps=20", "threads=1", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "stream.csv").read_text().splitlines()))
    assert {row["network"] for row in rows} >= {"nn.GRU", "best dense", "cpu 16x1 fp32", "cpu 16x1 int8"}
    assert all(float(row["p50_us"]) <= float(row["p99_us"]) for row in rows)
