"""``srnn prune``: a trained run is pruned without training, and is a run of its own."""

import json
import shutil

import pytest
import torch

from srnn.__main__ import main
from srnn.commands.prune import _quoted
from srnn.config.composing import parse_override
from srnn.inference.packed_file import read
from srnn.inference.weights import read_weights
from tests.conftest import SMALL, train

QUIETLY = ["tracking.mode=disabled"]


def matrices(folder):
    weights = read_weights(folder / "checkpoints/best.ckpt")
    return {name: weight for name, weight in weights.items() if weight.ndim == 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense LSTM on a text of its own, named from the folder where it was started."""
    folder = tmp_path_factory.mktemp("dense")
    (folder / "it's a text.txt").write_text("abcdefgh ijklm nop.\n" * 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["model=lstm", "pruning=none", "dataset=text", r"dataset.path='it\'s a text.txt'", "kernel=dense"]
        train(folder / "run", *options)
    return folder / "run"


def test_a_run_is_pruned_as_it_is(dense, tmp_path, monkeypatch, capsys):
    """Its model and data stand, and the result is what every other command reads."""
    monkeypatch.chdir(tmp_path)
    words = ["prune", f"init_from={dense}", "pruning.sparsity=0.75", "hydra.run.dir=pruned", *QUIETLY]
    assert main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "lstm on text, pruning=hard" in shown
    assert "training loop" not in shown
    report = json.loads((tmp_path / "pruned/report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.75, abs=1e-3)
    assert report["steps"] == report["epochs"] == report["scores"]["best"]["step"] == 0
    before, after = matrices(dense), matrices(tmp_path / "pruned")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight[weight != 0], before[name][weight != 0]), name
    original = json.loads((dense / "report.json").read_text())
    assert report["scores"]["test"]["loss"] > original["scores"]["test"]["loss"]
    assert report["config"]["model"] == original["config"]["model"]
    assert read(tmp_path / "pruned/model.safetensors").nonzeros
    for command in (
        ["evaluate", "run=pruned", "kernel=dense"],
        ["generate", "--run", "pruned", "--prompt", "ab", "--kernel", "dense"],
        ["export", "run=pruned", "values=fp32", "output=exported.safetensors"],
        ["rerun", "pruned", "output=again"],
        ["init_from=pruned", "pruning=fixed", *SMALL, "model=lstm", *QUIETLY, "kernel=dense", "hydra.run.dir=tuned",
         "dataset=text", f"dataset.path={dense.parent}/*.txt"],
    ):  # fmt: skip
        assert main(command) == 0, capsys.readouterr().err
    assert "numbers are the same, bit for bit" in capsys.readouterr().out
    tuned = matrices(tmp_path / "tuned")
    assert all((tuned[name][weight == 0] == 0).all() for name, weight in after.items())


def test_several_sparsities_are_a_sweep_and_files_of_a_run_know_it(dense, tmp_path, capsys):
    words = ["-m", "pruning.sparsity=0.5,0.75", "pruning.structure=4x1", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert main(["prune", f"init_from={dense}/checkpoints/best.ckpt", *words, *QUIETLY]) == 0, capsys.readouterr().err
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/report.json"))]
    assert [round(report["sparsity"]["reached"], 2) for report in reports] == [0.5, 0.75]
    assert {report["model"] for report in reports} == {"lstm"}


def test_a_file_of_nobodys_run_needs_model_and_data(dense, tmp_path, capsys):
    torch.save(read_weights(dense / "checkpoints/best.ckpt"), tmp_path / "plain.pt")
    once = ["prune", f"init_from={tmp_path}/plain.pt", f"hydra.run.dir={tmp_path}/run"]
    assert main([*once, "dataset=digits"]) == 2
    capsys.readouterr()
    options = ["model=lstm", "dataset=text", f"dataset.path={dense.parent}/*.txt", *SMALL, "kernel=dense", *QUIETLY]
    assert main([*once, *options]) == 0, capsys.readouterr().err
    assert "no vocabulary" in capsys.readouterr().out
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prune", "pruning.sparsity=0.9"], "say which trained network"),
        (["prune", "init_from=nowhere.pt"], "init_from=nowhere.pt: no such file"),
        (["prune", "-m", "init_from=x,y"], "init_from=x,y: name one network"),
        (["prune", "init_from=x", "pruning=cubic"], "pruning=cubic cannot be given: it prunes once"),
        (["prune", "init_from=x", "trainer.max_epochs=3"], "trainer.max_epochs=3 cannot be given"),
        (["prune", "init_from=x", "pruning.sparsity=1.0"], "pruning.sparsity=1.0 must be above 0 and below 1"),
        (["prune", "init_from=x", "pruning.freq=3"], "pruning.freq: unknown option"),
        (["trainer.max_epochs=0"], "pruning=gradual prunes while a network trains: to prune a trained one"),
        (["trainer.max_epochs=0", "pruning=none"], "name the trained network, init_from=FILE"),
    ],
)
def test_what_cannot_be_pruned_is_said(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "hydra.run.dir=run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_network_with_nan_is_refused(dense, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    checkpoint = torch.load(broken / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.rnn.weight_hh_l0"][0, 0] = float("nan")
    torch.save(checkpoint, broken / "checkpoints/best.ckpt")
    assert main(["prune", f"init_from={broken}", f"hydra.run.dir={tmp_path}/run", *QUIETLY]) == 2
    assert "rnn.weight_hh_l0 holds weights that are NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["it's", "a\\b", "a\\'b", "end\\", "a,b [c] {d: e}", "10", "null", "größe=1",
                                   3, 1e-3, None, True, ["a", 1], {"k": "v w"}])  # fmt: skip
def test_options_of_a_run_are_quoted_for_hydra(value):
    found = parse_override(f"key={_quoted(value)}").value()
    plain = getattr(found, "text", found)
    if isinstance(value, list | dict):
        plain = json.loads(json.dumps(found, default=lambda quoted: quoted.text))
    assert plain == value
    assert type(plain) is type(value)
