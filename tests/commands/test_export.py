"""``export`` and the commands that run what it writes, on one small trained network."""

import json
import re

import pytest

from srnn.__main__ import main
from srnn.inference.packed_file import read
from tests.conftest import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of kernel=auto, and not shared with other files: an export lands in the run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)
    return folder


def bits(text):
    return [float(number) for number in re.findall(r"\d\.\d{4}(?= │\n)", text)]


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16", "int8"])
def test_an_export_says_what_it_costs(run, values, capsys):
    assert main(["export", f"run={run}", f"values={values}"]) == 0
    out = capsys.readouterr().out
    path = run / f"model-{values}-auto.safetensors"
    packed = read(path)
    assert {m.values_name for m in packed.matrices.values()} == {values}
    before, by_the_run, after = bits(out)
    assert re.search(r"pruned, not packed, fp32 .*\n.* model.safetensors, .*fp16 .*\n.* exported, ", out)
    cost = float(re.search(r"costs ([+-]\d\.\d{4}) bits per character over 'pruned, not packed, fp32'", out)[1])
    assert cost == pytest.approx(after - before, abs=1.1e-4)
    assert by_the_run == pytest.approx(before, abs=1e-3)
    assert abs(after - before) < {"fp32": 1e-4, "fp16": 1e-3, "bf16": 0.01, "int8": 0.05}[values]
    assert f"{path.stat().st_size:,}" in out
    for source, score in ((path, after), (run, by_the_run)):
        assert main(["evaluate", f"run={source}", "kernel=cpu"]) == 0
        assert bits(capsys.readouterr().out)[-1] == pytest.approx(score, abs=2e-4)


def test_an_export_of_a_packed_file_is_compared_with_it(run, capsys):
    assert main(["export", f"run={run}/model.safetensors", "values=bf16", f"output={run}/again.safetensors"]) == 0
    out = capsys.readouterr().out
    assert len(bits(out)) == 2
    assert re.search(r"bits per character over 'model\.safetensors, .*fp16'", out)


def test_nothing_costs_no_negative_zero(run, capsys, monkeypatch):
    scores = iter([2.0, 2.0, 1.99999])
    monkeypatch.setattr("srnn.objectives.next_token.NextToken.score", lambda *_: {"bits_per_character": next(scores)})
    assert main(["export", f"run={run}", "values=fp32"]) == 0
    assert "costs +0.0000 bits per character" in capsys.readouterr().out


def test_evaluate_says_where_it_scores_more_than_the_run_did(run, capsys):
    limit = json.loads((run / "report.json").read_text())["config"]["trainer"]["limit_eval_batches"]
    assert main(["evaluate", f"run={run}", "kernel=cpu"]) == 0
    shown = capsys.readouterr().out
    for part in ("valid", "test"):
        assert re.search(rf"report is of the first {limit} of \d\d+ batches of the {part} part", shown)


def test_blocks_that_are_not_there_are_refused(run, capsys):
    assert main(["export", f"run={run}", "structure=16x1"]) == 2
    assert "is not pruned in 16x1 blocks" in capsys.readouterr().err
    assert not (run / "model-fp16-16x1.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["values=fp8"], "invalid choice: 'fp8'"),
        (["structure=3x3"], "invalid choice: '3x3'"),
        (["output=model.bin"], "*.safetensors. For a *.onnx file give format=onnx. For a *.c file give format=c."),
        (["output=model.c"], "must be a file named *.safetensors. For a *.c file give format=c.\n"),
        (["format=onnx", "output=model.bin"], "named *.onnx. For a *.safetensors file give format=packed. For a *.c "),
        (["output=/dev/null/m.safetensors"], "--output=/dev/null: this folder cannot be written: File exists"),
        (["output={run}/model.safetensors"], "is the packed file that is read: name another"),
    ],
)
def test_mistakes_are_told(run, arguments, message, capsys):
    assert main(["export", f"run={run}", *(argument.format(run=run) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_the_report_tells_how_fast_and_why(run):
    latency = json.loads((run / "report.json").read_text())["latency"]
    for kind in ("sequence", "step"):
        assert set(latency[kind]) == {"dense", "sparse"}
        assert all(0 < seconds < 10 for seconds in latency[kind].values())
    assert latency["dense_runtimes"] == ["torch", "oneDNN", "onnxruntime"]
    assert latency["read_back_error"] < 1e-4
    assert latency["threads"] == 1
    used = {(choice["layer"], choice["use"]) for choice in latency["choices"]}
    lengths = ("1 step", "16 steps", "100 steps")
    assert {("whole network", f"1 stream, {length}") for length in lengths} <= used
    assert all(choice["winner"] in choice["seconds"] and choice["what"] for choice in latency["choices"])


def test_a_run_is_timed_on_every_backend(run, capsys):
    assert main(["bench", f"run={run}", "limit=1"]) == 0
    out = capsys.readouterr().out
    for name in ("dense", "auto", "cpu", "csr"):
        assert out.count(f"│ {name} ") == 2


def test_it_writes_text_on_any_backend(run, capsys):
    texts = []
    for kernel in ("cpu", "dense"):
        assert main(["generate", f"run={run}", f"--kernel={kernel}", "--prompt=import ", "--length=20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", f"run={run}", "--kernel=gpu"]) == 2
    assert "no such kernel" in capsys.readouterr().err
