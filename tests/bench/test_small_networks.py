import csv

import pytest
import torch
from torch import nn

from srnn.__main__ import main
from srnn.bench import small_networks
from srnn.bench.cases import Format
from srnn.bench.verdict import small_verdict
from srnn.commands.bench import main as bench
from srnn.errors import UserError

TINY = small_networks.SmallNetwork("tiny", nn.GRU, 5, 20, 2, 3)


def test_a_network_is_pruned_to_order_and_rounded_as_stored():
    network = small_networks._pruned_network(TINY, Format(0.8, "element", "fp16"))
    for weight in network.parameters():
        if weight.ndim == 2:
            assert abs(float((weight == 0).float().mean()) - 0.8) < 0.02
            assert torch.equal(weight, weight.half().float())


def test_every_length_is_timed_against_dense(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(small_networks, "NETWORKS", (TINY, TINY))
    monkeypatch.setattr(small_networks, "_TURN", 0.0)
    arguments = ["sparsity=0.9", "structure=16x1", "shard=1/2", f"output={tmp_path}"]
    assert main(["bench", "bench=small", *arguments]) == 0
    rows = list(csv.DictReader((tmp_path / "small.csv").read_text().splitlines()))
    assert [row["steps"] for row in rows] == ["1", "16", "100", "400"]
    for row in rows:
        best = min(float(row[f"{name}_us"]) for name in ("torch", "onednn", "onnxruntime"))
        assert float(row["auto_over_dense"]) == pytest.approx(best / float(row["auto_us"]), abs=1e-3)
        assert float(row["auto_over_torch"]) >= float(row["auto_over_dense"])
        assert "1 stream, 100 steps" in row["chosen"]
    assert "auto over torch and oneDNN" in capsys.readouterr().out


def test_a_wrong_backend_stops(monkeypatch):
    monkeypatch.setattr(small_networks, "relative_error", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match="computes tiny"):
        next(small_networks.measure_small(TINY, Format(0.9, "element", "fp32")))


@pytest.mark.parametrize("shard", ["2/2", "1", "x/3", "-1/2", "0/0"])
def test_a_shard_is_a_share(shard):
    with pytest.raises(UserError, match="shard"):
        bench(["bench=small", f"shard={shard}"])


def test_nothing_measured_says_nothing():
    assert small_verdict([]) is None
