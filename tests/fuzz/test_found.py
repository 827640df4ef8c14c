"""Inputs that were answered wrongly once: by a traceback, after hours, or by other numbers without a word."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from srnn.__main__ import main
from srnn.config.composing import compose_settings, read_settings
from srnn.config.sweeps import identity_of
from srnn.errors import UserError
from srnn.inference.packed_file import _checksum
from srnn.inference.weights import read_weights
from srnn.run_folder import RunFolder
from srnn.training import run as training
from srnn.vocabulary import Vocabulary
from tests.conftest import QUIET
from tests.inference.test_files_of_others import header_of
from tests.training.test_resume import check_same_run, interrupt_after


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("srnn: ")
    return error


@pytest.fixture
def run(tmp_path, text_run):
    """A finished run that a test may damage."""
    return RunFolder(shutil.copytree(text_run, tmp_path / "run"))


def test_a_number_of_more_digits_than_python_reads():
    with pytest.raises(UserError, match=r"seed=9+: not an override"):
        compose_settings([f"seed={'9' * 5000}"])


@pytest.mark.parametrize(
    "text",
    ["a: " + "[" * 3000, "a: &a [x]\nb: [*a, *a]\n", "a: !!timestamp 2001-99-99", "a: !!float x", "a: \x07", "\ud800"],
)
def test_configs_of_folders(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        read_settings(path)
    assert identity_of(path) is None


@pytest.mark.parametrize("text", ["{1: 2, a: {1: 2, b: 3}}", "a: !!binary eA=="])
def test_what_no_config_holds_has_no_identity(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert identity_of(tmp_path / "config.yaml") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["seconds"].update(training_loop="long"),
        lambda report: report["scores"].update(best=3),
        lambda report: report["scores"]["test_packed"].update(loss="low"),
        lambda report: report["size"].update(nonzeros=10**400),
        lambda report: report.update(config=[]),
        lambda report: report["config"].pop("seed"),
    ],
)
def test_reports_that_are_compared(run, capsys, change):
    report = run.read_report()
    change(report)
    run.report.write_text(json.dumps(report))
    assert "its report or metrics are damaged" in refused(capsys, "compare", run, "--mode", "disabled")


def test_metrics_that_are_compared(run, capsys):
    run.metrics.write_text("step,train_loss\r\n1," + "9" * 200_000)
    assert "its report or metrics are damaged" in refused(capsys, "compare", run, "--mode", "disabled")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", "{}", '{"scores": 1}'])
def test_a_report_is_read_before_its_run_is_repeated(run, capsys, monkeypatch, text):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it was repeated"))
    run.report.write_text(text)
    assert "report.json is damaged" in refused(capsys, "rerun", run)


def test_evaluate_reads_around_damaged_notes(run, capsys):
    report = run.read_report() | {"limits": {"test": "all"}}
    run.report.write_text(json.dumps(report))
    made_in = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps(made_in | {"data": {"train": 5}}))
    assert main(["evaluate", f"run={run}", "kernel=dense"]) == 0
    assert "train was SHA-256 5" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_packed_files_of_others(run, capsys, command):
    header, tensors = header_of(run.packed), load_file(run.packed)
    header["about"]["dataset"] = "python_source"
    header["vocabulary"]["tokens"].append("\u2603")
    header.pop("sha256")
    header["sha256"] = _checksum(header, tensors)
    save_file(tensors, run.packed, {"srnn": json.dumps(header)})
    assert "not as many as the network" in refused(capsys, command, f"run={run.packed}")
    header["vocabulary"]["tokens"].pop()
    header.pop("sha256")
    header["sha256"] = _checksum(header, tensors)
    save_file(tensors, run.packed, {"srnn": json.dumps(header)})
    if command == "evaluate":
        assert "does not say which data" in refused(capsys, command, f"run={run.packed}")


@pytest.mark.parametrize("command", ["evaluate", "generate", "export", "rerun", "compare"])
def test_a_home_that_is_not_there(capsys, command):
    assert "~nobody_here/run" in refused(capsys, command, "~nobody_here/run")


@pytest.mark.parametrize("weight", [torch.zeros(2).to_sparse(), torch.zeros(2, dtype=torch.complex64)])
def test_tensors_that_are_no_weights(tmp_path, weight):
    torch.save({"a": weight}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"a is a .* tensor: save it dense, of real numbers"):
        read_weights(tmp_path / "weights.pt")


def test_a_prompt_that_is_no_text():
    """A terminal may send any bytes: Python keeps those that are no UTF-8 in characters of their own."""
    assert Vocabulary.build("bytes", "").encode(b"a\xff".decode(errors="surrogateescape")).tolist() == [97, 255]


def test_a_rank_that_is_no_number(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "junior")
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "x")
    assert main(["list", "kernel"]) == 0
    said = capsys.readouterr().err
    assert "RANK=junior is passed over" in said
    assert "TORCH_DISTRIBUTED_DEBUG=x is passed over: torch takes OFF, INFO, DETAIL." in said
    assert not {"RANK", "TORCH_DISTRIBUTED_DEBUG"} & os.environ.keys()


# ---- a run that was stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*QUIET, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 36)
        assert main([*QUIET, f"hydra.run.dir={folder}"]) == 130
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_once):
    return RunFolder(shutil.copytree(stopped_once, tmp_path / "run"))


def test_a_run_goes_on_in_a_folder_that_was_moved(stopped, whole, capsys):
    """Lightning forgets the best score there, and keeps whatever network comes next."""
    assert main([f"resume={stopped}"]) == 0
    check_same_run(whole, stopped.path)
    stopped.path.joinpath(".lock").write_text("")  # as of a process killed after the report
    assert "this run is finished" in refused(capsys, f"resume={stopped}")
    assert not list(stopped.path.glob(".*"))


def test_a_single_bit_of_a_checkpoint(stopped, capsys):
    data = bytearray(stopped.last.read_bytes())
    weight = torch.load(stopped.last, weights_only=True)["state_dict"]["model.rnn.weight_hh_l0"]
    data[data.index(weight[weight != 0][:1].numpy().tobytes()[:3])] ^= 1
    stopped.last.write_bytes(data)
    assert "last.ckpt is no checkpoint, or damaged" in refused(capsys, f"resume={stopped}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.pop("random"), "last.ckpt is damaged: it has no random"),
        (lambda saved: saved.pop("loops"), "last.ckpt is damaged: it has no loops"),
        (lambda saved: saved["callbacks"].popitem(), "last.ckpt is damaged: it has no BestWhile-best"),
        (lambda saved: saved["optimizer_states"].clear(), "last.ckpt is damaged: it has no optimizer_states"),
        (
            lambda saved: saved["callbacks"]["Recorder"].update(loop_seconds=torch.zeros(2)),
            "cannot go on from it: ValueErr",
        ),
        (
            lambda saved: saved["callbacks"]["Recorder"]["validations"][0].update(step={}),
            "cannot go on from it: TypeErr",
        ),
        (lambda saved: saved.update(random=[None]), "the run cannot go on from it: TypeError"),
        (lambda saved: saved.update(vocabulary=[]), "last.ckpt is damaged: a vocabulary must be a mapping"),
        (lambda saved: saved["state_dict"].popitem(), "does not fit the network of its run"),
    ],
)
def test_checkpoints_of_other_content(stopped, capsys, change, words):
    saved = torch.load(stopped.last, weights_only=True)
    change(saved)
    torch.save(saved, stopped.last)
    assert words in refused(capsys, f"resume={stopped}")


@pytest.mark.parametrize("change", [lambda lines: lines[:5], lambda lines: [*lines[:4], "x" + lines[4], *lines[5:]]])
def test_metrics_are_looked_at_before_a_run_goes_on(stopped, capsys, monkeypatch, change):
    monkeypatch.setattr(training, "_finish", lambda *_: pytest.fail("it went on"))
    lines = stopped.metrics.read_text().splitlines(keepends=True)
    stopped.metrics.write_text("".join(change(lines)))
    assert "metrics.csv is damaged" in refused(capsys, f"resume={stopped}")


def test_data_of_another_kind_in_the_environment(stopped, capsys):
    made_in = json.loads(stopped.environment.read_text())
    stopped.environment.write_text(json.dumps(made_in | {"data": []}))
    assert "environment.json is damaged: its data are a list" in refused(capsys, f"resume={stopped}")
