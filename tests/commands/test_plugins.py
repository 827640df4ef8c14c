"""Plug-ins of every kind, from files and from an installed package; doctor and help."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from srnn.__main__ import COMMANDS, main
from tests.conftest import ROOT, SMALL

SETUP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "srnn-windows"
version = "1.2"
[project.entry-points."srnn.plugins"]
windows = "srnn_windows"
{more}
"""
MODULE = """
from srnn.datasets import Texts, TextStreams
from srnn.registry import register

@register.dataset("alphabet")
class Alphabet(TextStreams):
    "The alphabet, again and again."
    def __init__(self, repeats: int = 100) -> None:
        super().__init__(batch_size=4, sequence_length=8, eval_streams=2)
        self.repeats = repeats
    def texts(self):
        return Texts(*["abcdefghijklmnopqrstuvwxyz " * self.repeats] * 3)
"""


@pytest.mark.parametrize(
    "chosen",
    [
        ["model=skip_gru", "model.num_layers=2"],
        ["dataset=brackets", "dataset.train_characters=5000"],
        ["pruning=lottery", "pruning.sparsity=0.8", "pruning.at=[0.2,0.4]"],
        ["kernel=double"],
        ["optimizer=rmsprop"],
    ],
    ids=lambda chosen: chosen[0],
)
def test_the_examples_train(tmp_path, chosen):
    small = [o for o in SMALL if not ("model=skip_gru" in chosen and "embedding_size" in o)]
    assert main([*small, "tracking.mode=disabled", *chosen, f"hydra.run.dir={tmp_path}/run"]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.8 if "pruning=lottery" in chosen else 0.9, abs=0.002)
    assert main(["evaluate", f"run={tmp_path}/run"]) == 0
    assert main(["bench", f"run={tmp_path}/run", "limit=2"]) == 0


def test_what_trains_nothing_does_not_wait_for_lightning(tmp_path):
    """Plug-ins or not; and srnn's own names stay where a plug-in that imported them breaks."""
    (tmp_path / "pyproject.toml").write_text('[tool.srnn]\nplugins = "plugins"')
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/alphabet.py").write_text(MODULE)
    (tmp_path / "plugins/breaks.py").write_text(MODULE.replace("alphabet", "half") + "\n1 / 0")
    (tmp_path / "plugins/clashes.py").write_text(
        "from srnn.registry import register\n@register.averaging('ema')\ndef mine():\n    'Mine.'\n"
    )
    code = """
import sys
from srnn.__main__ import main
from srnn.registry import register
assert main(["generate", "--help"]) == 0
assert "torch" not in sys.modules
assert main(["generate", "none", "--prompt", "-h"]) == 2
assert ("dataset", "alphabet") in register.components, "a run may need it, whatever its prompt"
assert main(["list"]) == 0
assert main(["dataset=alphabet", "averaging=ema", "--cfg", "job"]) == 0
assert not {"pytorch_lightning", "torchmetrics", "wandb"} & set(sys.modules)
assert {"alphabet", "adding"} <= set(register.names("dataset"))
assert "half" not in register.names("dataset")
origins = [register.get("dataset", "alphabet").origin, register.get("averaging", "ema").origin]
assert origins == ["plug-in alphabet.py", "srnn.training.averaging.ema"], origins
assert len(register.broken_plugins) == 2, register.broken_plugins
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_there_is_an_example_of_every_kind(capsys):
    assert main(["list", "all"]) == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "plugins").glob("*.py"):
        assert f"plug-in {path.name}" in shown


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with an installed plug-in package that has a ``conf/``, and one whose module raises."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "srnn_windows/conf/dataset").mkdir(parents=True)
    (source / "srnn_windows/conf/experiment").mkdir()
    (source / "srnn_windows/__init__.py").write_text(MODULE)
    (source / "srnn_windows/conf/dataset/alphabet.yaml").write_text("name: alphabet\nrepeats: 60\n")
    (source / "srnn_windows/conf/experiment/letters.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /dataset: alphabet\nmodel:\n  hidden_size: 12\n"
    )
    (source / "srnn_broken").mkdir()
    (source / "srnn_broken/__init__.py").write_text(MODULE.replace("alphabet", "gru", 1).replace("dataset(", "model("))
    more = 'broken = "srnn_broken"\n[tool.hatch.build.targets.wheel]\npackages = ["srnn_windows", "srnn_broken"]'
    (source / "pyproject.toml").write_text(SETUP.format(more=more))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, source], check=True)
    return site


@pytest.mark.slow
def test_an_installed_plugin_brings_components_and_configs(site, tmp_path, srnn_command):
    path = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    chosen = ["experiment=letters", "trainer=fast", "kernel=dense", "tracking.mode=disabled", "hydra.run.dir=run"]
    done = srnn_command(*chosen, **path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "srnn-windows 1.2 is left out: UserError: model 'gru' is registered already" in done.stderr
    config = (tmp_path / "run/config.yaml").read_text()
    assert "repeats: 60" in config, "from the plug-in's own conf/"
    assert "hidden_size: 12" in config
    shutil.rmtree(tmp_path / "run")
    without = srnn_command(*chosen, "srnn.plugins=off", **path)
    assert without.returncode == 2
    assert "experiment=letters: no experiment has that name" in without.stderr
    told = srnn_command("doctor", **path)
    assert told.returncode == 1
    assert "srnn-windows 1.2" in told.stdout
    assert "dataset=alphabet" in told.stdout
    assert "registered already" in told.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: srnn" in shown
    assert len(shown.splitlines()) > 3


def test_doctor_names_what_is_in_the_way(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", f"srnn.plugins={ROOT}/plugins"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "torch",
        "cores",
        "kernel=cpu",
        "runs on: cpu",
        "from OMP_NUM_THREADS=1",
        "ready: scikit-learn",
        "(from SRNN_CACHE)",
        "GiB free",
        "dataset=brackets",
        "Nothing is in the way",
    ):
        assert word in shown
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("importlib.metadata.version", lambda name: _missing(name))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "is not installed: pip install wandb" in shown
    assert "pip install srnn" not in shown
    assert "needs scikit-learn: pip install 'srnn[digits]'" in shown
    assert "torch's own choice; OMP_NUM_THREADS=N sets another" in shown
    assert "cannot be written" in shown


def _missing(name):
    raise __import__("importlib").metadata.PackageNotFoundError(name)


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("SRNN_DEBUG", "1")
    with pytest.raises(Exception, match="no such command"):
        main(["trian"])
