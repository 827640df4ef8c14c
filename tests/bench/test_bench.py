import csv

import pytest
import torch
from srnn.bench.measure import measure
from srnn.bench.pruning import METHODS

from srnn.__main__ import main
from srnn.bench.cases import NAMED, Case, Format, Plan, Problem, Shape, pruned
from srnn.errors import UserError
from srnn.kernels import Cpu

CPU = torch.device("cpu")
TINY = ["shapes=gru:24,product:16x8", "sparsity=0.5,0.9", "batch=1,3", "threads=1", "steps=5", "limit=60"]


@pytest.mark.parametrize("structure", ["element", "4x1", "16x1"])
def test_weights_are_as_sparse_as_asked(structure):
    generator = torch.Generator().manual_seed(0)
    weight = pruned(3 * 64, 50, 3, Format(0.9, structure, "fp32"), generator)
    assert float((weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_a_bench_leaves_rows_and_a_plot(tmp_path, capsys):
    assert main(["bench", *TINY, f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    cases = {(row["shape"], row["batch"]) for row in rows}
    assert cases == {(shape, batch) for shape in ("gru:24", "product:16x8") for batch in ("1", "3")}
    for case in cases:
        here = [row for row in rows if (row["shape"], row["batch"]) == case]
        dense = {row["backend"]: float(row["median_us"]) for row in here if row["structure"] == "dense"}
        assert set(dense) == {"torch", "onednn", "int8"}
        best = min(dense["torch"], dense["onednn"])
        sparse = [row for row in here if row["structure"] != "dense"]
        assert {(row["backend"], row["structure"], row["sparsity"]) for row in sparse} == {
            (backend, structure, sparsity)
            for backend in ("cpu", "csr") for structure in ("element", "16x1") for sparsity in ("0.5", "0.9")
        }  # fmt: skip
        for row in sparse:
            assert float(row["over_dense"]) == pytest.approx(best / float(row["median_us"]), rel=0.01)
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
    plan = Plan((Shape("gru", 12, 12),), (0.5,), ("element",), steps=4)
    rows, left_out = measure(plan, {"liar": Liar()}, CPU, 10, lambda *_: None)
    (row,) = (row for row in rows if row.backend == "liar")
    assert row.median_us is row.over_dense is row.over_int8 is None
    assert any("liar" in line and "WRONG" in line for line in left_out)


def test_what_the_limit_leaves_out_is_said(tmp_path, capsys):
    assert main(["bench", *TINY, "limit=0.0001", f"output={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert out.count("left out") == 3
    assert "the time was over (--limit=0.0001)" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [["device=cuda"], ["bench=gpu"], ["bench=network"]])
def test_without_a_gpu_it_says_so(options, tmp_path, capsys):
    assert main(["bench", *options, f"output={tmp_path}"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err


def test_dense_zeros_are_counted_as_slower(tmp_path, capsys):
    """Sparse kernels lose on a full matrix, and the table says so."""
    main(["bench", "shapes=gru:128", "sparsity=0", "batch=64", "steps=2", "kernels=csr", "structure=element",
          "threads=1", f"output={tmp_path}"])  # fmt: skip
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=gru", "a shape is gru:2560"),
        ("shapes=cnn:12", "a shape is gru:2560"),
        ("shapes=gru:0", "a shape is gru:2560"),
        ("shapes=product:12", "a shape is gru:2560"),
        ("sparsity=1.0", "--sparsity=1.0 must be a number from 0 to"),
        ("sparsity=x", "--sparsity=x must be a number"),
        ("batch=0", "--batch=0 must be a number from 1"),
        ("threads=4096", "--threads=4096 must be a number from 1"),
        ("steps=0", "--steps=0 must be"),
        ("structure=2x2", "structure=2x2: there are element"),
        ("values=fp64", "--values=fp64: there are fp32"),
        ("kernels=gpu", "--kernels=gpu: there are"),
        ("limit=-1", "--limit=-1 must be above 0"),
        ("bench=all", "invalid choice: 'all'"),
        ("output=/dev/null/x", "--output=/dev/null/x: this folder cannot be written: Not a directory"),
        ("run=nowhere", "no such folder"),
        (
            "bench=pruning structure=16x1",
            "--structure does nothing with bench=pruning, which takes device, output, shapes",
        ),
        ("bench=gpu config=x", "--config does nothing with bench=gpu, which takes batch, device"),
        ("run=nowhere bench=gpu", "--bench does nothing with run=nowhere, which takes limit"),
        ("bench=network device=cpu", "bench=network runs on a CUDA GPU, not with device=cpu"),
    ],
)
def test_mistakes_are_told(argument, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argument.split()]) == 2
    assert message in capsys.readouterr().err


def test_named_plans_are_what_they_are_called():
    shapes = {str(shape) for shape in NAMED["paper"].shapes}
    assert shapes == {"gru:2560", "gru:1024", "lstm:1500", "tanh:1760"}
    assert NAMED["paper"].sparsities == (0.8, 0.9, 0.95)
    assert len(list(NAMED["paper"].cases())) == 4 * 3 * 2
    assert {str(shape) for shape in NAMED["deepbench"].shapes} == {"product:7680x2560", "product:10752x3584"}


def test_a_problem_is_the_same_each_time():
    case = Case(Shape("lstm", 6, 8), 2, 3, 1)
    one, two = (Problem(case, Format(0.5, "4x1", "fp16"), CPU) for _ in range(2))
    assert torch.equal(one.truth(3), two.truth(3))
    with pytest.raises(UserError):
        Shape.parse("gru:12x12")


def test_a_whole_network_runs_dense_and_sparse():
    from srnn.bench.gpu import network_calls

    calls = network_calls(CPU, torch.float32, "cpu", size=48, layers=2, vocabulary=30)
    assert set(calls) == {(n, w) for n in ("dense", "90 % element", "90 % 32x1") for w in ("sequence", "step")}
    with torch.inference_mode():
        for (name, what), call in calls.items():
            logits, state = call()
            assert logits.shape == (256 if what == "sequence" else 1, 1, 30), name
            assert state.shape == (2, 1, 48)


@pytest.mark.slow
def test_a_stream_is_timed(tmp_path, capsys):
    assert main(["bench", "bench=stream", "steps=20", "threads=1", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "stream.csv").read_text().splitlines()))
    assert {row["network"] for row in rows} >= {"nn.GRU", "best dense", "cpu 16x1 fp32", "cpu 16x1 int8"}
    assert all(float(row["p50_us"]) <= float(row["p99_us"]) for row in rows)


def test_pruning_is_timed_for_each_method(tmp_path, capsys):
    assert main(["bench", "bench=pruning", "shapes=gru:24,relu:40,product:40x20", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "pruning.csv").read_text().splitlines()))
    assert {row["shape"] for row in rows} == {"gru:24", "relu:40", "product:40x20"}
    assert {row["method"] for row in rows} == set(METHODS)
    assert all(float(row["update_ms"]) > 0 and float(row["step_ms"]) > 0 for row in rows)
    assert {int(row["weights"]) for row in rows} == {6 * 24 * 24, 2 * 40 * 40, 800}
    assert "update" in capsys.readouterr().out
