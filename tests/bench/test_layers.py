import csv

import pytest
import torch

from srnn.__main__ import main
from srnn.bench.cases import LayerPlan, LayerShape
from srnn.bench.layers import measure_layers
from srnn.kernels import Cpu

CPU = torch.device("cpu")
TINY = ["shapes=gru:24,product:16x8", "sparsity=0.5,0.9", "batch=1,3", "threads=1", "steps=5", "limit=60"]


def test_a_bench_leaves_rows_and_a_plot(tmp_path, capsys):
    assert main(["bench", *TINY, f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    cases = {(row["shape"], row["batch"]) for row in rows}
    assert cases == {(shape, batch) for shape in ("gru:24", "product:16x8") for batch in ("1", "3")}
    for case in cases:
        here = [row for row in rows if (row["shape"], row["batch"]) == case]
        dense = {row["backend"]: float(row["median_us"]) for row in here if row["structure"] == "dense"}
        quantised = {"int8", "onnxruntime int8"} - ({"onnxruntime int8"} if "gru" in case[0] else set())
        assert set(dense) == {"torch", "onednn", "onnxruntime"} | quantised
        best = min(dense["torch"], dense["onednn"], dense["onnxruntime"])
        best_int8 = min(dense[name] for name in quantised)
        sparse = [row for row in here if row["structure"] != "dense"]
        assert {(row["backend"], row["structure"], row["sparsity"]) for row in sparse} == {
            (backend, structure, sparsity)
            for backend in ("cpu", "csr") for structure in ("element", "16x1") for sparsity in ("0.5", "0.9")
        }  # fmt: skip
        for row in sparse:
            assert float(row["over_dense"]) == pytest.approx(best / float(row["median_us"]), rel=0.01)
            assert float(row["over_int8"]) == pytest.approx(best_int8 / float(row["median_us"]), rel=0.01)
            assert float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
            assert float(row["error"]) < 1e-5
    assert "torch " in rows[0]["device"]
    assert "over dense" in capsys.readouterr().out


class Liar(Cpu):
    """Fast, because it computes nothing."""

    def layer(self, weights, device, dtype):
        class Nothing:
            def run(self, x, sizes, state):
                return torch.zeros(len(x), weights.hidden_size), state

        return Nothing()


def test_a_wrong_result_gets_no_speed():
    plan = LayerPlan((LayerShape("gru", 12, 12),), (0.5,), ("element",), steps=4)
    rows, left_out = measure_layers(plan, {"liar": Liar()}, CPU, 10, lambda *_: None)
    (row,) = (row for row in rows if row.backend == "liar")
    assert row.median_us is row.over_dense is row.over_int8 is None
    assert any("liar" in line and "WRONG" in line for line in left_out)


def test_what_the_limit_leaves_out_is_said(tmp_path, capsys):
    assert main(["bench", *TINY, "limit=0.0001", f"output={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count(": the time was over (--limit=0.0001)") == 3


def test_dense_zeros_are_counted_as_slower(tmp_path, capsys):
    """Sparse kernels lose on a full matrix, and the table says so."""
    main(["bench", "shapes=gru:128", "sparsity=0", "batch=64", "steps=2", "kernels=csr", "structure=element",
          "threads=1", f"output={tmp_path}"])  # fmt: skip
    assert "SLOWER" in capsys.readouterr().out
